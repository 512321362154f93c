"""The verbs that make an experiment or read one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Exit, Option

from kdlora.cli.app import Json, Out, Set, Text, app, completing, print_json, print_table, verb
from kdlora.defaults import FAMILIES, FamilyName
from kdlora.errors import ConfigError, KdLoraError, harmless, told_apart
from kdlora.terminal import SafeConsole, live_progress, print_plan, print_result

if TYPE_CHECKING:
    from kdlora.config import Config
    from kdlora.evidence.records import ExperimentLayout
    from kdlora.experiment.preview import ExperimentPlan

_HOURS_UNASKED = 4.0
_WITHOUT_A_FILE = (
    "Without a config file, give the data (--train FILE --text COLUMN --label COLUMN, or --task NAME --data FOLDER) "
    "and the models (--family NAME, or --teacher and --student); `kdlora run --help` has examples"
)


def _glue_tasks() -> Iterable[str]:
    from kdlora.data.tasks import GLUE

    return GLUE


@dataclass(frozen=True)
class Run:
    """What `kdlora run` is told."""

    config: Annotated[Path | None, Argument(help="Config file (YAML), or use the options below.")] = None
    out: Out = None
    overrides: Set = None
    task: Annotated[str | None, Option(help="GLUE task. Needs --data.", autocompletion=completing(_glue_tasks))] = None
    data: Annotated[str | None, Option(help="Folder or Hub id with the data.")] = None
    train: Annotated[str | None, Option(help="Training file.")] = None
    validation: Annotated[str | None, Option(help="Validation file. Default: a part of the training rows.")] = None
    test: Annotated[str | None, Option(help="Test file.")] = None
    text: Text = None
    label: Annotated[
        list[str] | None,
        Option(metavar="COLUMN", help="Label column. Several columns of 0 and 1 make a multi-label task."),
    ] = None
    family: Annotated[
        FamilyName | None, Option(help="bert, roberta or deberta-v3: the paper's teacher and student.")
    ] = None
    teacher: Annotated[str | None, Option(help="Pretrained teacher: Hub id or folder.")] = None
    student: Annotated[str | None, Option(help="Pretrained student: Hub id or folder.")] = None
    fail_fast: Annotated[bool, Option("--fail-fast", help="Stop at the first failed run.")] = False
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the plan, the data and the estimated time, and write nothing.")
    ] = False
    yes: Annotated[bool, Option("--yes", help="Do not ask before a training of hours.")] = False
    as_json: Json = False

    def load(self) -> Config:
        from kdlora.configfile import build_config, load_config

        given: dict[str, Any] = {"family": self.family, "run.fail_fast": self.fail_fast}
        given |= {"task.name": self.task, "task.text": self.text, "task.label": self.label, "data.path": self.data}
        given |= {"data.train": self.train, "data.validation": self.validation, "data.test": self.test}
        given |= {"teacher.model": self.teacher, "student.model": self.student}
        overrides: list[str | tuple[str, Any]] = [
            *((key, value) for key, value in given.items() if value),
            *(self.overrides or []),
        ]
        if self.config is not None:
            return self._followed(load_config(self.config, overrides))
        try:
            return build_config({}, overrides, where="the command line")
        except ConfigError as error:
            if (self.train or self.task) and (self.family or (self.teacher and self.student)):
                raise
            raise ConfigError(f"{error}\n{_WITHOUT_A_FILE}") from None

    def _followed(self, config: Config) -> Config:
        """Refuse an option that the file leaves without effect."""
        named = FAMILIES.get(self.family) if self.family else None
        if named and config.teacher.model != named[0] and config.student.model != named[1]:
            raise ConfigError(f"--family {self.family}: both models are named already; leave it out")
        is_used = "lora" in config.run.arms or config.student.from_teacher_layers is not None
        if self.teacher and config.given_teacher and not is_used:
            raise ConfigError(
                "--teacher: the config gives a teacher (teacher.fine_tuned, .logits or .probabilities); take it out"
            )
        return config


@verb(Run)
def run(options: Run) -> None:
    """Train the teacher, distil it into the student, train the controls, and write the report.

    It first prints the data, the number of steps, and about how long it will take.

    Example: kdlora run configs/mrpc.yaml --set student.train.learning_rate=1e-3

    Example: kdlora run --train reviews.csv --text review --label sentiment --family bert

    Example: kdlora run configs/reviews.yaml --dry-run
    """
    config = options.load()
    if not options.dry_run:
        _run(config, options.out, options.as_json, yes=options.yes)
        return
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import check_alone

    check_alone("run --dry-run")
    prepare_children("kdlora.experiment.preview")
    from kdlora.experiment.run import plan_experiment

    plan = plan_experiment(config, options.out)
    print_json(plan.to_dict()) if options.as_json else print_plan(plan, SafeConsole())


@app.command()
def demo(out: Out = None, as_json: Json = False) -> None:
    """Run an experiment on film reviews with a small encoder, both downloaded, and write a page to try the student.

    Example: kdlora demo
    """
    from kdlora.demo import demo_config

    _run(demo_config(), out, as_json, yes=True, page=True)


@app.command()
def validate(
    config: Annotated[Path, Argument(help="Config file (YAML).")], overrides: Set = None, as_json: Json = False
) -> None:
    """Check a config and print it with all its defaults. Nothing is loaded or trained.

    Example: kdlora validate configs/mrpc.yaml
    """
    from kdlora.configfile import load_config, save_config

    checked = load_config(config, overrides or [])
    print_json(checked.model_dump(mode="json")) if as_json else print(save_config(checked), end="")


@app.command()
def evaluate(
    experiment: Annotated[Path, Argument(help="Experiment folder.")],
    data: Annotated[str, Argument(help="File with labelled rows, columns as in the experiment.")],
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let the teacher's own code run, if the config also allows it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score the shipped student, and the teacher if its weights are there, on another labelled file.

    Both decide by their fitted thresholds, where they have some.

    Example: kdlora evaluate runs/mrpc new-examples.csv
    """
    from kdlora.experiment.scoring import evaluate_experiment, open_finished
    from kdlora.report.wording import figure, of_label

    scores = evaluate_experiment(experiment, data, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(scores)
        return
    rows = [("examples", *(str(one["examples"]) for one in scores))]
    rows += [("score", *(f"{one['score']:.2f}" for one in scores))]
    _, _, task = open_finished(experiment)
    figures = {of_label(name, task): name for name in scores[0]["metrics"]}
    rows += [(shown, *(figure(one["metrics"][name]) for one in scores)) for shown, name in figures.items()]
    thresholds = scores[0]["thresholds"]
    told = [f"{label} {told_apart(value)}" for label, value in thresholds.items()]
    if len(thresholds) > 1 and len(set(thresholds.values())) == 1:  # one for all labels
        told = [told_apart(next(iter(thresholds.values())))]
    note = f"By fitted thresholds, the {scores[0]['model']}'s: {', '.join(told)}" if told else None
    print_table(("", *(one["model"] for one in scores)), rows, caption=note)


@app.command()
def compare(
    experiments: Annotated[list[Path], Argument(help="Experiment folders, or folders of single runs.")],
    out: Annotated[Path, Option("--out", help="Folder for compare.md and compare.html.")] = Path(),
    as_json: Json = False,
) -> None:
    """Compare experiments or single runs in one table and one plot, row by row where they have the same rows.

    Example: kdlora compare runs/first runs/second/runs/kd-lora-seed0 --out comparison
    """
    from kdlora.report.compare import compare as compare_runs

    _print_paths(compare_runs(experiments, out=out).paths, as_json)


@app.command()
def report(
    experiment: Annotated[Path, Argument(help="Experiment folder.")],
    out: Annotated[Path | None, Option("--out", help="Output folder. Default: the experiment's.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of an experiment again, as Markdown and HTML.

    Example: kdlora report runs/mrpc
    """
    from kdlora.report.report import make_report

    _print_paths(make_report(experiment, out=out).paths, as_json)


def _print_paths(paths: Sequence[Path], as_json: bool) -> None:
    print_json({"paths": paths}) if as_json else print("\n".join(map(str, paths)))


def _run(config: Config, out: Path | None, as_json: bool, *, yes: bool, page: bool = False) -> None:
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import read_launch

    launch = read_launch()
    if launch.count > 1:  # before PyTorch is imported: it prints a backtrace where another process goes
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prepare_children("kdlora.experiment.stages")
    from kdlora.experiment.run import run_experiment

    told: list[str] = []

    def announce(plan: ExperimentPlan) -> None:
        told.extend(plan.notes)
        print_plan(plan, SafeConsole(stderr=True))
        is_asked = plan.hours > _HOURS_UNASKED and not yes and sys.stdin.isatty() and sys.stderr.isatty()
        if is_asked and not typer.confirm("Begin?", default=True, err=True):
            raise Exit(1)

    if launch.rank > 0:  # the first of several processes does the talking
        raise Exit(1 if run_experiment(config, out).failed else 0)
    with live_progress() as listen:
        result = run_experiment(config, out, listen=listen, before=announce)
    if page and result.shipped is not None and not result.layout.page.exists():
        _add_page(result.layout)
    if as_json:
        results = json.loads(result.layout.results.read_text(encoding="utf-8"))
        print(json.dumps({"folder": str(result.folder), "notes": result.notes, **results}))
    else:
        print_result(result, told)
    raise Exit(1 if result.failed or result.is_export_lost else 0)


def _add_page(layout: ExperimentLayout) -> None:
    """Put a page for the browser beside the report, or say why there is none."""
    from kdlora.deploy.webpage import write_web_page
    from kdlora.report.report import make_report

    try:
        write_web_page(layout.root, layout.page)
    except (KdLoraError, OSError) as error:
        print(harmless(f"no page for the browser was built: {error}"), file=sys.stderr)
    else:
        make_report(layout.root)
