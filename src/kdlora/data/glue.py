"""GLUE in the benchmark's own layout, with the Hub's names for its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdlora.data.read import RawTable, Source, open_file
from kdlora.data.tasks import GlueTask
from kdlora.errors import DataError

HUB_IDS = ("nyu-mll/glue", "glue")
SINGLE_FILE_NAMES = ("diagnostic.tsv", "ax.tsv", "AX.tsv", "test.tsv")
"""What the diagnostic set's only file is called in the downloads in use."""


def open_glue_folder(path: Path, glue: GlueTask) -> dict[str, dict[str, Source]]:
    """Open the files of a task: the sources of each split by group."""
    inside = {entry.name.casefold(): entry for entry in path.iterdir()}
    names = [name.casefold() for name in (glue.folder, glue.name)]
    folder = next((inside[name] for name in names if name in inside and inside[name].is_dir()), path)
    if not any((folder / file).is_file() for file in glue.files.values()) and folder == path:
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) + (" ..." if len(inside) > 12 else "")
        raise DataError(
            f"{path} (data.path) holds neither a folder {glue.folder!r} nor the files of the GLUE task {glue.name!r} "
            f"({', '.join(glue.files.values())}); it holds {held or 'nothing'}"
        )
    splits: dict[str, dict[str, Source]] = {}
    for part, file in glue.files.items():
        split, _, group = part.partition("/")
        if split == "test" and not (folder / file).exists():
            continue  # only good for a submission to the benchmark; not every copy has it
        header = glue.headerless if split != "test" else ()
        source = open_file(folder / file, "data.path", header=header, benchmark=True)
        splits.setdefault(split, {})[group] = source
    return splits


def open_any_file(file: Path, key: str, glue: GlueTask | None, *, plain: bool = False) -> Source:
    """Open a file that may be one of GLUE's own, whichever split it is."""
    if glue is None or file.suffix.lower() != ".tsv":
        return open_file(file, key, plain=plain)
    source = open_file(file, key, benchmark=True)
    if glue.headerless and len(source.columns) == len(glue.headerless) and glue.text[0] not in source.columns:
        return open_file(file, key, header=glue.headerless, benchmark=True)
    return source


def with_hub_columns(source: Source, glue: GlueTask | None) -> Source:
    """Give the columns of a GLUE task the Hub's names, where a source has those of the benchmark's files."""
    if glue is None or source.plain:
        return source
    folded = {column.casefold(): column for column in source.columns}
    spellings = (glue.text, glue.file_text or glue.text)
    spelling = next((names for names in spellings if all(name.casefold() in folded for name in names)), None)
    if spelling is None:
        expected = " or ".join(sorted({", ".join(map(repr, names)) for names in spellings}))
        raise DataError(
            f"{source.name} lacks the text columns of the GLUE task {glue.name!r} ({expected}); "
            f"it has {', '.join(map(repr, source.columns))}"
        )
    found = {name: folded[own.casefold()] for name, own in zip(glue.text, spelling, strict=True)}
    for name in ("label", glue.file_label):
        if name in source.columns:
            found["label"] = name
    taken = {*found, *found.values()}

    def read(wanted: Sequence[str]) -> RawTable:
        raw = source.read([found.get(column, column) for column in wanted])
        names = {column: raw.class_names.get(found.get(column, column)) for column in wanted}
        known = {column: values for column, values in names.items() if values}
        return replace(raw, table=raw.table.rename_columns(list(wanted)), class_names=known)

    return replace(source, columns=(*found, *(name for name in source.columns if name not in taken)), read=read)
