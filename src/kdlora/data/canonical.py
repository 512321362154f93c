"""One shape for every source: `id`, `text`, `text_pair`, `label`; what does not fit is named by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from kdlora.data.ids import are_distinct
from kdlora.data.labels import encode_labels
from kdlora.data.sources import RawTable, Source, is_text
from kdlora.data.spool import make_dataset, spool
from kdlora.data.tasks import Task
from kdlora.errors import DataError

_ROWS = 65_536
_NOT_BLANK = r"[^\s\p{Z}\x{FEFF}\x{200B}\x{0085}]"


@dataclass(frozen=True)
class Columns:
    """Which columns of one source play which part.

    Attributes:
        text: one text column, or two.
        label: the label columns; none where labels are not wanted.
        id: the id column; None takes the row number.
    """

    text: tuple[str, ...]
    label: tuple[str, ...]
    id: str | None

    @property
    def wanted(self) -> list[str]:
        """Every column once."""
        return list(dict.fromkeys([*([self.id] if self.id else []), *self.text, *self.label]))


def find_id_column(source: Source, id_column: str) -> str | None:
    """Return the id column, or None where the default `id` is not there and row numbers serve.

    Args:
        source: an opened file or split.
        id_column: `data.id_column`.

    Raises:
        DataError: a column was named by the user but is missing.
    """
    return None if id_column == "id" and "id" not in source.columns else source.require(id_column, "data.id_column")


def to_canonical(raw: RawTable, columns: Columns, task: Task, *, prefix: str = "") -> Dataset:
    """Check every row and bring the columns into the shape that the other rooms expect.

    Args:
        raw: the rows; texts stay where they are mapped.
        columns: which column plays which part; without labels the result has none.
        task: kind and label names.
        prefix: put before each id.

    Returns:
        Columns `id`, `text`, `text_pair` (pairs), `label` (int64, float32, or list of float32).

    Raises:
        DataError: a text that is empty or no text, an id that is empty or not unique, a label that does not fit.
    """
    arrays = {"id": _ids(raw, columns.id, prefix)}
    for name, column in zip(("text", "text_pair"), columns.text, strict=False):
        arrays[name] = _texts(raw, column)
    if columns.label:
        labels = pa.table({"label": encode_labels(raw, columns.label, task)})
        arrays["label"] = spool(iter(labels.to_batches(_ROWS)), raw.source)["label"]
    return make_dataset(pa.table(arrays))


def corrupt_rows(raw: RawTable, columns: Columns) -> pa.Array:
    """Find the rows without text or label that GLUE's own files and Hub splits contain.

    Args:
        raw: rows of a GLUE split.
        columns: which column plays which part.

    Returns:
        Bool, one per row: true where the row has to go.
    """
    corrupt = pa.chunked_array([pa.repeat(False, raw.table.num_rows)])
    for column in columns.text:
        corrupt = pc.or_(corrupt, _blank(raw.table[column].cast(pa.string())))
    for column in columns.label:
        label = raw.table[column].cast(pa.string())
        corrupt = pc.or_(corrupt, pc.fill_null(pc.is_in(label, pa.array(["", "-", "-1", "-1.0"])), True))
    return corrupt


def _blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.invert(pc.fill_null(pc.match_substring_regex(column, _NOT_BLANK), False))


def _texts(raw: RawTable, column: str) -> pa.ChunkedArray:
    values = raw.table[column]
    if pa.types.is_null(values.type):
        raise DataError(f"{raw.where(0)}: the text {column!r} is empty, in every row; expected text")
    if not is_text(values.type):
        raise DataError(f"{raw.source}: the text column {column!r} holds {values.type}, not text; check task.text")
    values = values.cast(pa.string())
    blank = _blank(values)
    if (position := pc.index(blank, True).as_py()) >= 0:
        more = pc.sum(blank).as_py() - 1
        others = f" ({more} more such rows)" if more else ""
        raise DataError(f"{raw.where(position)}: the text {column!r} is empty{others}; remove the row or fill it in")
    return values


def _ids(raw: RawTable, column: str | None, prefix: str) -> pa.ChunkedArray:
    given = _row_numbers(raw) if column is None else iter(_given_ids(raw, column).chunks)
    tables = (pa.table({"id": pc.binary_join_element_wise(prefix, ids, "") if prefix else ids}) for ids in given)
    return spool((batch for table in tables for batch in table.to_batches()), raw.source)["id"]


def _row_numbers(raw: RawTable) -> Iterator[pa.Array | pa.ChunkedArray]:
    """Spell the row numbers, a part at a time."""
    count = raw.table.num_rows
    for start in range(0, count, _ROWS):
        numbers = np.arange(start, min(start + _ROWS, count))
        yield (pa.array(numbers) if raw.rows is None else raw.rows.slice(start, _ROWS)).cast(pa.string())


def _given_ids(raw: RawTable, column: str) -> pa.ChunkedArray:
    try:
        ids = raw.table[column].cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        kind = raw.table[column].type
        raise DataError(f"{raw.source}: the id column {column!r} holds {kind}; expected text or integers") from None
    missing = pc.fill_null(pc.equal(ids, ""), True)
    if (position := pc.index(missing, True).as_py()) >= 0:
        raise DataError(f"{raw.where(position)}: the id ({column!r}) is empty; every example needs one")
    if not are_distinct(ids):
        _report_duplicate(raw, column, ids)
    return ids


def _report_duplicate(raw: RawTable, column: str, ids: pa.ChunkedArray) -> None:
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0]
    first = pc.index(ids, repeated).as_py()
    second = pc.index(ids, repeated, first + 1).as_py()
    raise DataError(
        f"{raw.where(second)}: the id {repeated.as_py()!r} ({column!r}) is also that of row {first + 1}; ids must be "
        "unique within a file. Make them so, or set data.id_column to another column"
    )
