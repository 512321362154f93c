"""The verbs that work on a model folder, and those that decide by its probabilities what it answers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from typer import Argument, Option

from kdlora.cli.app import IdColumn, Json, Text, Threads, app, print_found, print_json, print_table
from kdlora.errors import ConfigError, counted, did_you_mean, harmless, told_apart
from kdlora.terminal import Show, draw_bars

if TYPE_CHECKING:
    from kdlora.data.lines import Format
    from kdlora.deploy.cascade import CascadeCurve
    from kdlora.deploy.stream import Progress

InputFormat = Annotated[
    str | None,
    Option(
        metavar="FORMAT",
        help="csv, tsv, jsonl or text (one a line, as of standard input); of predict parquet and conll, too. "
        "Default: by the file's name.",
    ),
]


@app.command()
def predict(
    model: Annotated[
        Path, Argument(help="Model folder, experiment (its export), or Hub id such as USER/REPO/onnx@REVISION.")
    ],
    source: Annotated[str, Argument(help="CSV, TSV, JSON Lines, Parquet or text file, or - for standard input.")],
    to: Annotated[str, Option("--to", help="Output file, or - for JSON Lines on standard output.")] = "-",
    text: Text = None,
    id_column: IdColumn = "id",
    input_format: InputFormat = None,
    batch_size: Annotated[int, Option(help="Largest number of texts in one forward pass.")] = 32,
    strict: Annotated[bool, Option(help="Stop at the first bad row.")] = False,
    as_json: Json = False,
) -> None:
    """Predict the label of every row of a file, or its entities, in constant memory.

    From a file into a file (--to), the same command continues after an interruption. Entities are written as JSON
    Lines.

    Example: kdlora predict runs/mrpc/student new.csv --to labelled.csv

    Example: echo "what a film" | kdlora predict runs/demo -
    """
    from kdlora.deploy.stream import predict_file

    to_stdout = to == "-"  # as JSON, a line for each row
    with draw_bars() as show:
        summary = predict_file(
            model,
            source,
            to,
            text=text,
            id_column=id_column,
            input_format=cast("Format | None", input_format),
            batch_size=batch_size,
            strict=strict,
            progress=None if to_stdout else _advance(show),
        )
    if as_json and not to_stdout:
        print_json(summary)
    elif not to_stdout:
        print(f"{counted(summary.rows, 'row')}, {summary.errors} of them bad, in {summary.to}", file=sys.stderr)


def _advance(show: Show) -> Progress:
    return lambda done, share: show("rows", done, done / share if share else None, f"{done:,}")


@app.command()
def redact(
    model: Annotated[Path, Argument(help="Folder of a model that marks entities, experiment (its export), or Hub id.")],
    source: Annotated[
        str, Argument(help="Text file (a text per line), CSV, TSV, JSON Lines, or - for standard input.")
    ],
    to: Annotated[str, Option("--to", help="Output file, or - for standard output.")] = "-",
    text: Annotated[
        str | None,
        Option(metavar="COLUMN", help="Text column. Default: that of the training data (no column of words), or text."),
    ] = None,
    input_format: InputFormat = None,
    types: Annotated[str | None, Option(metavar="TYPE,...", help="Only these types. Default: all.")] = None,
    replacements: Annotated[
        list[str] | None,
        Option("--with", metavar="TEXT | TYPE=TEXT", help="What stands for them. Default: the type, in brackets."),
    ] = None,
    batch_size: Annotated[int, Option(help="Largest number of texts in one forward pass.")] = 32,
    as_json: Json = False,
) -> None:
    """Replace names or other entities in every row of a file, in constant memory. Other columns stay as they are.

    It stops at a row that it cannot read. The output file appears when it is whole.

    Example: kdlora redact runs/names/student-onnx letters.txt --to redacted.txt --types PER,LOC --with PER='[NAME]'

    Example: kdlora redact runs/names/student-onnx letters.jsonl --text body --with '***'
    """
    from kdlora.deploy.redact import redact_file
    from kdlora.deploy.tagger import Tagger, load_for_many

    tagger = load_for_many(model, Tagger.load)
    replaced = [name.strip() for name in types.split(",")] if types else list(tagger.types)
    with draw_bars() as show:
        summary = redact_file(
            tagger,
            source,
            to,
            text=text,
            placeholders=_placeholders(replaced, replacements or ()),
            input_format=cast("Format | None", input_format),
            batch_size=batch_size,
            progress=None if to == "-" else _advance(show),
        )
    if as_json and to != "-":
        print_json(summary)
    else:
        counts = ", ".join(f"{count:,} {name}" for name, count in summary.replaced.items())
        print(harmless(f"{summary.rows:,} rows, replaced {counts}"), file=sys.stderr)


def _placeholders(types: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Say what stands for each type: TYPE=TEXT for one, TEXT for all others."""
    own = dict(one.split("=", 1) for one in given if "=" in one)
    if unknown := [name for name in own if name not in types]:
        hint = did_you_mean(unknown[0], types)
        raise ConfigError(f"--with: {unknown[0]!r} is none of the types to replace, {', '.join(types)}.{hint}")
    common = [one for one in given if "=" not in one]
    return {name: own.get(name, common[-1] if common else f"[{name}]") for name in types}


@app.command()
def export(
    model: Annotated[Path, Argument(help="Experiment folder, merged model folder, or Hub id.")],
    to: Annotated[Path, Option("--to", help="Folder to write.")],
    formats: Annotated[
        Literal["onnx", "onnx-int8", "all", "openvino"],
        Option("--format", help="onnx, onnx-int8, all (both), or openvino (all three)."),
    ] = "all",
    data: Annotated[str | None, Option(help="Labelled file for the checks. Default: the validation rows.")] = None,
    web: Annotated[
        bool, Option("--web", help="Write a page for the browser, of an export or an experiment that has one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export to ONNX and int8. Each file is compared with the one before it, and refused if it differs too much.

    Example: kdlora export runs/mrpc --to mrpc-onnx

    Example: kdlora export runs/mrpc/student --to mrpc-onnx --data validation.csv

    Example: kdlora export runs/mrpc --to mrpc-page --web
    """
    if web:
        if data is not None or formats != "all":
            raise ConfigError("--web takes what is exported already; leave --data and --format out")
        from kdlora.deploy.webpage import write_web_page

        page = write_web_page(model, to)
        if as_json:
            print_json(page)
            return
        print(f"{page.model} in {page.folder}, {page.size_bytes / 1e6:.1f} MB that a browser loads")
        folder = shlex.quote(str(page.folder))
        print(f"serve it, for example: python -m http.server --bind 127.0.0.1 --directory {folder}")
        return
    from kdlora.experiment.deployment import export_model
    from kdlora.report.shipped import stage_table

    result = export_model(model, to, formats=formats, data=data)
    print_found(result, [stage_table(result, result.stages)], as_json)
    if not as_json:
        print(f"in {result.folder}")


@app.command()
def benchmark(
    models: Annotated[
        list[Path],
        Argument(
            help="Model folders, .onnx files, experiments (their student/; student-onnx/ has all files) or Hub ids."
        ),
    ],
    data: Annotated[str | None, Option(help="Labelled file, for texts and scores.")] = None,
    threads: Threads = None,
    plot: Annotated[Path | None, Option(help="With --cascade: image file to draw.")] = None,
    cascade: Annotated[
        bool, Option("--cascade", help="Let the second model answer what the first is unsure about: score and cost.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure models in turns, each in its own process: latency, throughput, memory, size, score.

    Example: kdlora benchmark runs/mrpc/teacher runs/mrpc/student runs/mrpc/student-onnx --data test.csv
    """
    from kdlora.experiment.deployment import benchmark_cascade, benchmark_models

    if cascade:
        from kdlora.report.plots import picture_format, plot_cascade

        if plot is not None:  # before minutes of measuring
            picture_format(plot)
        curve = benchmark_cascade(models, data=data, threads=threads)
        if plot is not None:
            plot_cascade([(point.cost, point.score) for point in curve.points], plot)
        _print_cascade(curve, as_json)
        return
    if plot is not None:
        raise ConfigError("--plot draws a cascade; give --cascade, too")
    result = benchmark_models(models, data=data, threads=threads)
    print_found(result, [result.table()], as_json)


def _print_cascade(curve: CascadeCurve, as_json: bool) -> None:
    if as_json:
        print_json(curve)
        return
    rows = [
        (
            f"{point.handed_on:.0%}",
            told_apart(point.threshold) if point.handed_on < 1 else "none",
            f"{point.score:.2f}",
            f"{point.cost:.0%}",
        )
        for point in curve.points
        if point in (curve.points[0], curve.points[-1]) or round(100 * point.handed_on) % 5 == 0
    ]
    print_table(("handed on", "least probability", "score", "time, of the teacher's"), rows)
    best = next(point for point in curve.points if point.score >= curve.points[-1].score - 0.2)
    print(
        f"within 0.2 points of the teacher ({curve.points[-1].score:.2f}) where {best.handed_on:.0%} are handed on, at "
        f"{best.cost:.0%} of its time; this was chosen on these {curve.texts} rows, so score it on others"
    )


@app.command()
def push(
    experiment: Annotated[Path, Argument(help="Experiment folder, or a merged model folder.")],
    repo: Annotated[str, Argument(help="Hub repository, USER/NAME. It is created if it does not exist.")],
    public: Annotated[bool, Option("--public", help="Create it as public. Default: private.")] = False,
    report: Annotated[bool, Option("--report", help="Send the report, too. It quotes rows of your data.")] = False,
    revision: Annotated[str | None, Option(help="Branch. It is created if it does not exist.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Send the student, its ONNX export and its model card to the Hub, in one commit. Log in with `hf auth login`.

    It lists the files with their sizes first, and sends only the files of a model.
    After an interruption, the same command sends only what is missing.

    Example: kdlora push runs/mrpc USER/mrpc-student --dry-run
    """
    from kdlora.deploy.hub import plan_push, push_experiment

    parcel = plan_push(experiment, repo, report=report)
    for name, size in parcel.sizes.items():
        print(f"{size / 1e6:>10.3f} MB  {name}", file=sys.stderr)
    if parcel.stays:
        print(harmless(f"not sent: {', '.join(parcel.stays)}"), file=sys.stderr)
    pushed = None if dry_run else push_experiment(experiment, repo, public=public, report=report, revision=revision)
    if pushed is not None and pushed.removed:
        print(harmless(f"removed there, as an earlier model's: {', '.join(pushed.removed)}"), file=sys.stderr)
    if as_json:
        print_json(pushed or parcel)
    elif pushed is not None:
        print(f"{pushed.url} ({'private' if pushed.private else 'public'}, {len(pushed.files)} files)")


@app.command()
def defer(
    experiment: Annotated[Path, Argument(help="Experiment folder.")],
    error: Annotated[float, Option(help="Largest share of wrong answers.")] = 0.02,
    confidence: Annotated[float, Option(help="Confidence of that promise.")] = 0.95,
    sureness: Annotated[
        Literal["probability", "margin", "energy"], Option(help="Number that is compared with the threshold.")
    ] = "probability",
    data: Annotated[str | None, Option(help="Labelled rows not used before. Default: the test split.")] = None,
    unknown: Annotated[str | None, Option(help="Texts of no known class: how many would be deferred?")] = None,
    as_json: Json = False,
) -> None:
    """Promise an error rate for the shipped model. From then on it gives no label where it is not sure enough.

    Example: kdlora defer runs/reviews --error 0.02 --confidence 0.95
    """
    from kdlora.evidence.defer import NoPromiseError
    from kdlora.experiment.deferral import defer_experiment
    from kdlora.report.deferred import deferral_tables
    from kdlora.report.report import make_report

    try:
        found = defer_experiment(
            experiment, data=data, unknown=unknown, error=error, confidence=confidence, sureness=sureness
        )
    except NoPromiseError:
        make_report(experiment)  # which must not go on with an earlier promise
        raise
    make_report(experiment)
    print_found(found, deferral_tables(found), as_json)


@app.command()
def thresholds(
    experiment: Annotated[Path, Argument(help="Experiment folder.")],
    metric: Annotated[
        str | None, Option(help="f1, macro_f1, accuracy, balanced_accuracy, matthews. Default: the task's, else f1.")
    ] = None,
    precision: Annotated[float | None, Option(help="Instead: this precision, with the highest recall.")] = None,
    label: Annotated[
        list[str] | None,
        Option("--label", "--positive", metavar="NAME", help="Only this label. With two labels: the positive one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit the probability above which a label is predicted, for each shipped file, on validation rows.

    A multi-label task has one per label; a task with two labels has one, of the second or the one --positive names.
    Without options, a threshold that would lower the task's own score there is left out.

    Example: kdlora thresholds runs/topics --precision 0.9 --label sport
    """
    from kdlora.experiment.fitting import fit_thresholds
    from kdlora.report.deferred import threshold_table
    from kdlora.report.report import make_report

    if metric is not None and precision is not None:
        raise ConfigError("--metric and --precision are two goals; give one of them")
    goal = precision if precision is not None else metric
    found = fit_thresholds(experiment, goal if label is None else dict.fromkeys(label, goal))
    make_report(experiment)
    print_found(found, [threshold_table(found)], as_json)
