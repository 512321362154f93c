"""Texts without labels: read from plain text, and what of them may teach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from kdlora.data.canonical import Columns, corrupt_rows, to_canonical
from kdlora.data.faults import encoding_error
from kdlora.data.lines import Lines, LongLineError
from kdlora.data.sources import RawTable
from kdlora.data.spool import read_column, spool
from kdlora.data.tasks import Task
from kdlora.errors import DataError

TEXTS = ("text", "text_pair")
_CHUNK_LINES = 10_000


def is_text_file(file: Path) -> bool:
    """Whether a file is read as one text a line, by its name."""
    return file.suffix.lower() == ".txt" and file.is_file() and file.stat().st_size > 0


def read_lines(file: Path, task: Task) -> Dataset:
    """Read one text a line; a row's id is its line's number from 0, and empty lines are left out."""
    if len(task.text) > 1:
        raise DataError(
            f"{file} (data.unlabelled) holds one text a line, but the task has pairs ({', '.join(task.text)}); give "
            "CSV, JSON Lines or Parquet with these columns"
        )
    raw, columns = RawTable(str(file), spool(_line_batches(file), str(file))), Columns(("text",), (), None)
    filled = raw.keep(pc.invert(corrupt_rows(raw, columns)))
    if not filled.table.num_rows:
        raise DataError(f"{file} (data.unlabelled) has no line with text; expected one text a line")
    return to_canonical(filled, columns, task)


def _line_batches(file: Path) -> Iterator[pa.RecordBatch]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            lines = Lines(stream)
            while chunk := [line.rstrip("\n") for line in islice(lines, _CHUNK_LINES)]:
                yield pa.RecordBatch.from_arrays([pa.array(chunk)], names=["text"])
    except UnicodeDecodeError as error:
        raise encoding_error(file) or DataError(f"{file} is not UTF-8 ({error})") from None
    except LongLineError as error:
        raise DataError(f"{file} (data.unlabelled): {error}; expected one text a line") from None


def keep_unscored(rows: Dataset, scored: Sequence[Dataset]) -> Dataset:
    """Leave out the rows whose text, or pair of texts, a score is measured on.

    A teacher's answer to a validation text would teach the student that very text, and its score would no longer be
    one on new texts.
    """
    names = [name for name in TEXTS if name in rows.column_names]
    taken = [pc.is_in(read_column(rows, name), _values(scored, name)) for name in names]
    candidates = np.flatnonzero(np.logical_and.reduce([column.to_numpy() for column in taken]))
    if not len(candidates):
        return rows
    known = {texts for part in scored for texts in _tuples(part, names)}
    found = _tuples(rows.select(candidates), names)  # of a pair, each text may be known from another pair
    seen = [row for row, texts in zip(candidates.tolist(), found, strict=True) if texts in known]
    kept = np.ones(len(rows), dtype=bool)
    kept[seen] = False
    return rows.select(np.flatnonzero(kept)) if seen else rows


def _values(parts: Sequence[Dataset], name: str) -> pa.Array:
    chunks = [chunk for part in parts for chunk in read_column(part, name).chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.string())


def _tuples(rows: Dataset, names: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(read_column(rows, name).to_pylist() for name in names), strict=True))
