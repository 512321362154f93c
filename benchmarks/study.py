"""Carry out a study, which is a suite whose contrasts are declared before it runs, and print the contrasts.

    python benchmarks/study.py benchmarks/studies/pair.yaml --out DIR [--set KEY=VALUE ...] [--draws 2000]

A study is a suite file in `benchmarks/studies`: a family is a recipe, with its pair of models. `kdlora suite` carries
it out too, and writes its tables; this command adds what a suite's tables do not have: each contrast that
`studies/contrasts.yaml` declares for the study, its mean over the tasks with an interval over rows and seeds, corrected
for all of them (Bonferroni). Nothing that is finished is trained again, so it resumes, and `kdlora suite --on ray` may
have done the work. Several files are one study: the first one names it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import yaml

from kdlora import load_suite, run_suite
from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.stats import PairedArms, contrast
from kdlora.experiment.suite import SuiteResult
from kdlora.report.findings import align

STUDIES = Path(__file__).parent / "studies"
Side = tuple[str, str]
Scored = dict[int, tuple[Task, Predictions]]
"""By seed."""


def declared_contrasts(name: str) -> list[tuple[Side, Side]]:
    """Read the contrasts of a study; a side is `family/arm`."""
    pairs = yaml.safe_load((STUDIES / "contrasts.yaml").read_text(encoding="utf-8"))[name]
    sides = [[tuple(side.rsplit("/", 1)) for side in pair] for pair in pairs]
    return [(first, second) for first, second in sides]


def scored_runs(result: SuiteResult) -> Iterator[tuple[str, Side, Scored]]:
    """Give the finished runs of each task and side on the rows that are reported: test rows where there are any."""
    for cell in result.plan.cells:
        runs: Scored = {}
        for run in cell.runs:
            record = result.records.get(run.key)
            if record is not None and record.status == "finished":
                found = read_predictions(run.layout(result.folder).run(run.arm, run.seed).predictions)
                split = "test" if "test" in found.split else "validation"
                runs[run.seed] = Task.from_dict(record.task), found.only(split)
        yield cell.task, (cell.family, cell.arm), runs


def pair_up(first: Scored, second: Scored) -> PairedArms | None:
    """Bring two sides of a task together, seed by seed and row by row."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    aligned = align([side[seed][1] for side in (first, second) for seed in seeds])
    if aligned is None or aligned[0].labels is None:
        raise SystemExit("two sides of a contrast have other rows")
    logits = [one.logits for one in aligned]
    task = first[seeds[0]][0]
    return PairedArms(task, aligned[0].labels, logits[: len(seeds)], logits[len(seeds) :])


def contrast_table(name: str, results: list[SuiteResult], draws: int) -> list[str]:
    """Write the declared contrasts as Markdown."""
    contrasts = declared_contrasts(name)
    level = 1 - 0.05 / len(contrasts)
    runs = {(task, side): scored for result in results for task, side, scored in scored_runs(result)}
    tasks = list(dict.fromkeys(task for task, _ in runs))
    lines = ["| contrast | points | interval | seeds | tasks |", "|---|---|---|---|---|"]
    for first, second in contrasts:
        paired = [pair_up(runs.get((task, first), {}), runs.get((task, second), {})) for task in tasks]
        pairs = [pair for pair in paired if pair is not None]
        cells = "– | – | – | –"
        if pairs:
            found = contrast(pairs, draws=draws, level=level)
            seeds = found.n_seeds if found.n_seeds > 1 else "one seed: no verdict"
            span = f"{found.low:+.1f} to {found.high:+.1f}"
            cells = f"{found.difference:+.1f} | {span} | {seeds} | {len(pairs)}"
        lines.append(f"| {first[0]} `{first[1]}` − {second[0]} `{second[1]}` | {cells} |")
    told = f"Intervals over rows and seeds at {100 * level:.2f}% each, 95% for all {len(contrasts)} (Bonferroni)."
    return [*lines, "", told]


def main(options: argparse.Namespace) -> None:
    """Carry out what is not finished, and print."""
    name = options.suites[0].stem
    declared_contrasts(name)
    results = [run_suite(load_suite(file, options.set), options.out / file.stem) for file in options.suites]
    print("\n".join(contrast_table(name, results, options.draws)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", type=Path, nargs="+", help="suite files of one study")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as of `kdlora suite`")
    parser.add_argument("--draws", type=int, default=2_000)
    main(parser.parse_args())
