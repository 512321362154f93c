"""Carry out a study, which is a suite whose contrasts are declared before it runs, and print the contrasts.

    python benchmarks/study.py benchmarks/studies/pair.yaml --out DIR [--set KEY=VALUE ...] [--draws 2000]

A study is a suite file in `benchmarks/studies`: a family is a recipe, with its pair of models. `kdlora suite` carries
it out too, and writes its tables; this command adds what a suite's tables do not have: each contrast that
`studies/contrasts.yaml` declares for the study, its mean over the tasks with an interval over rows and seeds, corrected
for all of them (Bonferroni). Texts that a study names and that are not there are written first: the rest of the task's
training rows. Nothing that is finished is trained again, so it resumes, and `kdlora suite --on ray` may
have done the work. Several files are one study: the first one names it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from harness import command_line, markdown, pair_up

from kdlora import load_splits, load_suite, run_suite
from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.stats import contrast
from kdlora.experiment.plan import whole_config
from kdlora.experiment.suite import SuiteResult
from kdlora.experiment.suitefile import SuiteConfig
from kdlora.system.storage import atomic_file

STUDIES = Path(__file__).parent / "studies"
Side = tuple[str, str]
"""A family and one of its arms."""


def declared_contrasts(name: str) -> list[tuple[Side, Side]]:
    """Read the contrasts of a study; a side is `family/arm`."""
    declared = yaml.safe_load((STUDIES / "contrasts.yaml").read_text(encoding="utf-8"))
    if name not in declared:
        raise SystemExit(f"contrasts.yaml declares none for {name}; put one of {', '.join(declared)} first")
    pairs = declared[name]
    sides = [[tuple(side.rsplit("/", 1)) for side in pair] for pair in pairs]
    return [(first, second) for first, second in sides]


def write_texts(suite: SuiteConfig) -> None:
    """Write the unlabelled texts that a suite names: a task's training rows beyond those that train."""
    for task in suite.tasks:
        config = whole_config(suite, task, next(iter(suite.families)))
        if config.data.unlabelled is None or Path(config.data.unlabelled).exists():
            continue
        changes = {"unlabelled": None, "max_unlabelled_examples": None, "max_train_examples": None, "augment": 0}
        splits = load_splits(config.task, config.data.model_copy(update=changes))
        rest = splits.train.select(range(config.data.max_train_examples or 0, len(splits.train)))
        names = dict(zip(("text", "text_pair"), splits.task.text, strict=False))
        Path(config.data.unlabelled).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(config.data.unlabelled) as part:
            rest.select_columns(list(names)).to_pandas().rename(columns=names).to_csv(part, index=False)


def contrast_table(contrasts: list[tuple[Side, Side]], results: list[SuiteResult], draws: int) -> str:
    """Write the contrasts as Markdown, over the tasks and seeds that both sides have finished.

    The rows are those that are reported: test rows where there are any.
    """
    level, lines = 1 - 0.05 / len(contrasts), []
    runs: dict[tuple[str, Side], dict[int, Predictions]] = {}
    tasks: dict[str, Task] = {}
    for result in results:
        for (name, family, arm), planned in result.plan.cells.items():
            for run in planned:
                record = result.records.get(run.key)
                if record is not None and record.status == "finished":
                    found = read_predictions(run.layout(result.folder).run(run.arm, run.seed).predictions)
                    split = "test" if "test" in found.split else "validation"
                    runs.setdefault((name, (family, arm)), {})[run.seed] = found.only(split)
                    tasks[name] = Task.from_dict(record.task)
    for first, second in contrasts:
        pairs = [
            pair_up(task, runs.get((name, first), {}), runs.get((name, second), {})) for name, task in tasks.items()
        ]
        pairs = [pair for pair in pairs if pair is not None]
        cells = ["–"] * 4
        if pairs:
            found = contrast(pairs, draws=draws, level=level)
            seeds = str(found.n_seeds) if found.n_seeds > 1 else "one seed: no verdict"
            cells = [f"{found.difference:+.1f}", f"{found.low:+.1f} to {found.high:+.1f}", seeds, str(len(pairs))]
        lines.append((f"{first[0]} `{first[1]}` − {second[0]} `{second[1]}`", *cells))
    told = f"Intervals over rows and seeds at {100 * level:.2f}% each, 95% for all {len(contrasts)} (Bonferroni)."
    return markdown(("contrast", "points", "interval", "seeds", "tasks"), lines) + f"\n\n{told}"


def main(options: argparse.Namespace) -> None:
    """Carry out what is not finished, and print."""
    contrasts = declared_contrasts(options.suites[0].stem)
    results = []
    for file in options.suites:
        suite = load_suite(file, options.set)
        write_texts(suite)
        results.append(run_suite(suite, options.out / file.stem))
    print(contrast_table(contrasts, results, options.draws))


if __name__ == "__main__":
    parser = command_line(__doc__, "out")
    parser.add_argument("suites", type=Path, nargs="+", help="suite files of one study")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `kdlora suite`")
    parser.add_argument("--draws", type=int, default=2_000)
    main(parser.parse_args())
