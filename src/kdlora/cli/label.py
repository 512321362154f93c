"""The verb that labels large collections."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdlora.cli.app import Json, app


@app.command()
def label(
    model: Annotated[str, typer.Argument(help="Fine-tuned teacher: a folder, such as runs/NAME/teacher, or a Hub id.")],
    data: Annotated[str, typer.Argument(help="File, folder or quoted pattern: Parquet, JSON Lines, CSV, TSV, text.")],
    to: Annotated[Path, typer.Option("--to", help="Folder of the labelled collection; the same command goes on.")],
    on: Annotated[
        str | None, typer.Option("--on", metavar="ray[://HOST:PORT]", help="Spread the work over a Ray cluster.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="Text column; twice for a pair.")] = None,
    id_column: Annotated[str, typer.Option(metavar="COLUMN", help="Column that names a row.")] = "id",
    label_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name of an output, in order; once for each.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub id.")] = None,
    max_length: Annotated[int, typer.Option(help="Longest input in tokens.")] = 128,
    rows_per_shard: Annotated[int, typer.Option(help="Rows in one file: the most that a kill can cost.")] = 50_000,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    texts: Annotated[
        bool, typer.Option("--with-texts/--without-texts", help="Keep the texts, for data.unlabelled.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row.")] = False,
    as_json: Json = False,
) -> None:
    """Store a teacher's logits for a collection of any size, by id, in bounded memory; a killed call is continued.

    The folder serves as data.unlabelled, or as teacher.logits.

    Example: kdlora label runs/reviews/teacher 'texts/*.parquet' --to labelled --text body
    """
    from kdlora.experiment.launch import check_alone

    check_alone("label")
    from kdlora.progress import counting_progress
    from kdlora.scale.label import describe, label_collection

    with counting_progress("rows") as advance:
        summary = label_collection(
            model,
            data,
            to,
            text=text,
            id_column=id_column,
            label_names=label_name,
            revision=revision,
            max_length=max_length,
            rows_per_shard=rows_per_shard,
            precision=precision,
            device=device,
            texts=texts,
            strict=strict,
            on=on,
            progress=None if advance is None else lambda done, total: advance(done, done / total if total else None),
        )
    if as_json:
        print(json.dumps(describe(summary), indent=2))
        return
    bad = f", {summary.rejected} rejected (rejected-*.jsonl)" if summary.rejected else ""
    cut = f", {summary.truncated} cut at {max_length} tokens" if summary.truncated else ""
    print(f"{summary.rows} rows{bad}{cut} in {summary.shards} files in {summary.folder}", file=sys.stderr)
