"""GLUE in the benchmark's own layout, and the GLUE columns of any source."""

from __future__ import annotations

from pathlib import Path

from kdlora.data.sources import Source, open_file
from kdlora.data.tasks import GlueTask
from kdlora.errors import DataError

HUB_IDS = ("nyu-mll/glue", "glue")
SINGLE_FILE_NAMES = ("diagnostic.tsv", "ax.tsv", "AX.tsv", "test.tsv")
"""What the diagnostic set's only file is called in the downloads in use."""


def find_glue_folder(path: Path, glue: GlueTask) -> Path | None:
    """Find a task's folder."""
    names = [glue.folder, *glue.other_folders, glue.name]
    inside = {entry.name.casefold(): entry for entry in path.iterdir() if entry.is_dir()}
    for name in names:
        if name.casefold() in inside:
            return inside[name.casefold()]
    files = SINGLE_FILE_NAMES if glue.name == "ax" else tuple(glue.files.values())
    return path if any((path / file).is_file() for file in files) else None


def open_glue_folder(path: Path, glue: GlueTask) -> dict[str, dict[str, Source]]:
    """Open the files of a task."""
    folder = find_glue_folder(path, glue)
    if folder is None:
        raise DataError(
            f"{path} (data.path) holds neither a folder {glue.folder!r} nor the files of the GLUE task {glue.name!r} "
            f"({', '.join(glue.files.values())}); it holds {_listing(path)}"
        )
    splits: dict[str, dict[str, Source]] = {}
    for part, file in glue.files.items():
        split, _, group = part.partition("/")
        if split == "test" and not (folder / file).exists():
            continue  # only good for a submission to the benchmark; not every copy has it
        header = glue.headerless if split in glue.headerless_splits else ()
        source = open_file(folder / file, "data.path", glue_header=header, benchmark=True)
        splits.setdefault(split, {})[group] = source
    return splits


def open_glue_file(file: Path, glue: GlueTask) -> Source:
    """Open one file of GLUE, whichever split it is; the diagnostic set can be given as its folder."""
    if file.suffix.lower() != ".tsv":
        return open_file(file, "the data file")
    source = open_file(file, "the data file", benchmark=True)
    if glue.headerless and len(source.columns) == len(glue.headerless) and glue.text[0] not in source.columns:
        return open_file(file, "the data file", glue_header=glue.headerless, benchmark=True)
    return source


def glue_text_columns(source: Source, glue: GlueTask) -> tuple[str, ...]:
    """Find the text columns under the Hub's names or under those of the benchmark's files."""
    folded = {column.casefold(): column for column in source.columns}
    spellings = (glue.text, glue.file_text)
    for names in spellings:
        if all(name.casefold() in folded for name in names):
            return tuple(folded[name.casefold()] for name in names)
    expected = " or ".join(sorted({", ".join(map(repr, names)) for names in spellings}))
    raise DataError(
        f"{source.name} lacks the text columns of the GLUE task {glue.name!r} ({expected}); "
        f"it has {', '.join(map(repr, source.columns))}"
    )


def glue_label_column(source: Source, glue: GlueTask) -> str | None:
    """Find the label column under the Hub's name or under that of the benchmark's files."""
    names = [name for name in (glue.file_label, "label") if name is not None and name in source.columns]
    return names[0] if names else None


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "nothing"
