"""Where examples come from, whatever the format: named columns in, a memory-mapped Arrow table out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features

from kdlora.data.delimited import Dialect, choose_dialect, delimited_batches, delimited_columns
from kdlora.data.faults import REMEDY, UNREADABLE, refuse_duplicates
from kdlora.data.jsonlines import json_batches, json_columns
from kdlora.data.rows import spool
from kdlora.errors import DataError, did_you_mean

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_PARQUET_ROWS = 65536


@dataclass(frozen=True)
class RawTable:
    """Columns as they were found.

    Attributes:
        source: how messages call the file or split.
        table: the columns that were asked for.
        class_names: label names of the columns whose values are codes of a `ClassLabel`.
        rows: row numbers from 0 in the source, where rows were dropped; None means 0, 1, 2 ...
        ragged: how many rows were left out because their columns did not fit the header.
    """

    source: str
    table: pa.Table
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: pa.Array | None = None
    ragged: int = 0

    def where(self, position: int) -> str:
        """Name a row for a message; rows are counted from 1 and a header does not count."""
        row = position if self.rows is None else self.rows[position].as_py()
        return f"{self.source}, row {row + 1}"

    def keep(self, mask: pa.Array) -> RawTable:
        """Drop the rows where `mask` (bool, one per row) is false; the others keep their row number."""
        rows = pa.array(np.arange(self.table.num_rows)) if self.rows is None else self.rows
        return replace(self, table=self.table.filter(mask), rows=rows.filter(mask))


@dataclass(frozen=True)
class Source:
    """A file or split that has been opened: its columns are known, its rows are not read.

    Attributes:
        name: how messages call it.
        columns: all its columns.
        read: reads the columns with these names.
        benchmark: whether GLUE's publishers made it; its corrupt rows are dropped, a user's are an error.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], RawTable]
    benchmark: bool = False

    def require(self, column: str, key: str) -> str:
        """Return `column` if the source has it.

        Args:
            column: the wanted column.
            key: the config key that names it.

        Raises:
            DataError: it does not.
        """
        if column not in self.columns:
            raise DataError(
                f"{self.name} has no column {column!r} ({key}); it has {', '.join(map(repr, self.columns))}."
                + did_you_mean(column, self.columns)
            )
        return column


def open_file(path: str | Path, key: str, *, glue_header: tuple[str, ...] = (), benchmark: bool = False) -> Source:
    """Open a data file by its extension.

    Args:
        path: CSV, TSV, JSON Lines or Parquet.
        key: the config key that names the file, for messages.
        glue_header: columns of a TSV file that has no header.
        benchmark: whether it is GLUE's own TSV file; rows with too few or too many columns are then left out.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, or its columns cannot be read.
    """
    file = _existing_file(Path(path), key)
    name, extension = str(file), file.suffix.lower()
    if extension in (".csv", ".tsv"):
        dialect = choose_dialect(file, header=glue_header)
        return _delimited_source(file, dialect, benchmark=benchmark)
    if extension == ".parquet":
        return _parquet_source(file)
    if extension in (".jsonl", ".json"):
        columns = json_columns(file)
        return Source(name, columns, lambda wanted: RawTable(name, spool(json_batches(file, wanted), name)))
    known = ", ".join(EXTENSIONS)
    raise DataError(
        f"{name} ({key}): unknown kind of file {extension!r}; expected one of {known}."
        + did_you_mean(extension, EXTENSIONS)
    )


def dataset_source(dataset: Dataset, name: str) -> Source:
    """Open a split that `datasets` has loaded; its rows stay where they are mapped."""

    def read(wanted: Sequence[str]) -> RawTable:
        table = dataset.select_columns(list(wanted)).with_format("arrow")[:]
        if not table.num_rows:
            raise DataError(f"{name} has no rows; expected examples")
        return RawTable(name, table, class_names(dataset.features, wanted))

    return Source(name, tuple(dataset.column_names), read)


def class_names(features: Mapping[str, object], columns: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Collect the label names of columns that hold a `ClassLabel`, or lists of one."""
    found = {}
    for column in columns:
        feature = features[column]
        feature = getattr(feature, "feature", feature)
        if isinstance(feature, ClassLabel):
            found[column] = tuple(feature.names)
    return found


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, in any of the ways in which Arrow stores it."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner))


def _existing_file(file: Path, key: str) -> Path:
    if file.is_dir():
        raise DataError(f"{file} ({key}) is a folder; expected a file ({', '.join(EXTENSIONS)})")
    if not file.exists():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{file} ({key}) does not exist; check the path.{did_you_mean(file.name, siblings)}")
    if not file.stat().st_size:
        raise DataError(f"{file} ({key}) is empty (0 bytes); expected a header and examples")
    return file


def _delimited_source(file: Path, dialect: Dialect, *, benchmark: bool) -> Source:
    name, columns = str(file), delimited_columns(file, dialect)

    def read(wanted: Sequence[str]) -> RawTable:
        ragged: list[int] = []
        batches = delimited_batches(file, dialect, columns, wanted, ragged if benchmark else None)
        table = spool(batches, name)
        if not ragged:
            return RawTable(name, table)
        rows = np.delete(np.arange(table.num_rows + len(ragged)), ragged)
        return RawTable(name, table, rows=pa.array(rows), ragged=len(ragged))

    return Source(name, columns, read, benchmark)


def _parquet_source(file: Path) -> Source:
    name = str(file)
    try:
        schema = pq.read_schema(file)
    except UNREADABLE as error:
        raise DataError(f"{name} is no readable Parquet file ({error}); {REMEDY}") from None
    refuse_duplicates(name, schema.names)

    def read(wanted: Sequence[str]) -> RawTable:
        columns = list(wanted)
        table = spool(_parquet_batches(file, columns), name)
        names = {}
        if b"huggingface" in (schema.metadata or {}):
            names = class_names(Features.from_arrow_schema(schema), columns)
        return RawTable(name, table, names)

    return Source(name, tuple(schema.names), read)


def _parquet_batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                batch.validate(full=True)  # pyarrow itself takes any bytes for text
                yield batch.select(columns)  # it gives the file's order
    except UNREADABLE as error:
        raise DataError(f"{file} is no readable Parquet file ({error}); {REMEDY}") from None
