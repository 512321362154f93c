"""The verbs that work on a model folder."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kdlora.cli.app import Json, app, complete_formats, print_json


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Model folder, experiment, or Hub id such as USER/REPO/onnx@REVISION.")],
    source: Annotated[str, typer.Argument(help="CSV, TSV, JSON Lines, Parquet or text file; - for standard input.")],
    to: Annotated[str, typer.Option("--to", help="Output file; - for JSON Lines on standard output.")] = "-",
    text: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="Text column; twice for a pair.")] = None,
    id_column: Annotated[str, typer.Option(metavar="COLUMN", help="Column that names a row.")] = "id",
    batch_size: Annotated[int, typer.Option(help="Most texts in one forward pass.")] = 32,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad row.")] = False,
    as_json: Json = False,
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
    if as_json and to != "-":  # what goes to standard output is JSON, a line for each row
        print_json(asdict(summary))
    elif to != "-":
        print(f"{summary.rows} rows, {summary.errors} of them bad, in {summary.to}", file=sys.stderr)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Experiment folder, merged model folder, or Hub id.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write.")],
    formats: Annotated[
        str, typer.Option("--format", help="onnx, onnx-int8 or all.", autocompletion=complete_formats)
    ] = "all",
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
        print_json(asdict(result))
        return
    table = Table("stage", "against", "score", "largest logit difference", "same predictions")
    for stage in result.stages:
        score = "–" if stage.score is None else f"{stage.score:.2f}"
        table.add_row(stage.stage, stage.reference, score, f"{stage.largest_difference:.2e}", f"{stage.agreement:.2%}")
    Console().print(table)
    print(f"in {result.folder}" + (f"; int8 by {result.recipe}" if result.recipe else ""))


@app.command("benchmark")
def benchmark_command(
    models: Annotated[list[Path], typer.Argument(help="Model folders, .onnx files, experiments or Hub ids.")],
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
        print_json(result.to_dict())
        return
    header, rows = result.table()
    table = Table(*header, caption=f"{result.threads} threads, {result.rounds} rounds, {result.texts} texts")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@app.command()
def push(
    experiment: Annotated[Path, typer.Argument(help="Experiment folder, or a merged model folder.")],
    repo: Annotated[str, typer.Argument(help="Repository of the Hub, USER/NAME; made where it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public; the default is private.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Push the report too; it quotes examples.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where it does not exist.")] = None,
    as_json: Json = False,
) -> None:
    """Put the student, its ONNX export and its model card on the Hub, in one commit; log in with `hf auth login`.

    The same command again sends only what is missing there, so an interrupted push goes on where it stopped.

    Example: kdlora push runs/mrpc USER/mrpc-student
    """
    from kdlora.deploy.hub import push_experiment

    pushed = push_experiment(experiment, repo, public=public, report=report, revision=revision)
    if as_json:
        print_json(asdict(pushed))
    else:
        print(f"{pushed.url} ({'private' if pushed.private else 'public'}, {len(pushed.files)} files)")
