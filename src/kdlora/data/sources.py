"""Where examples come from, whatever the format: named columns in, a memory-mapped Arrow table out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset
from pydantic import TypeAdapter

from kdlora.data.delimited import Dialect, choose_dialect, delimited_batches, delimited_columns
from kdlora.data.faults import parquet_faults, refuse_duplicates
from kdlora.data.jsonlines import json_batches, json_columns
from kdlora.data.spool import spool
from kdlora.errors import DataError, did_you_mean, first_line

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
        """Return `column` if the source has it."""
        if column not in self.columns:
            raise DataError(
                f"{self.name} has no column {column!r} ({key}); it has {', '.join(map(repr, self.columns))}."
                + did_you_mean(column, self.columns)
            )
        return column


def open_file(path: str | Path, key: str, *, glue_header: tuple[str, ...] = (), benchmark: bool = False) -> Source:
    """Open a data file by its extension."""
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
    with parquet_faults(name):
        schema = pq.read_schema(file)
    refuse_duplicates(name, schema.names)

    def read(wanted: Sequence[str]) -> RawTable:
        columns = list(wanted)
        table = spool(_parquet_batches(file, columns), name)
        return RawTable(name, table, _stored_class_names(name, schema, columns))

    return Source(name, tuple(schema.names), read)


def _stored_class_names(name: str, schema: pa.Schema, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read the label names that `datasets` puts into a Parquet file beside codes."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return {}
    found = {}
    try:
        features = json.loads(metadata)["info"]["features"]
        for column in (column for column in columns if column in features):
            feature = features[column]
            feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                found[column] = TypeAdapter(tuple[str, ...]).validate_python(feature["names"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{name}: its metadata 'huggingface', where label names stand, cannot be read ({first_line(error)}); write "
            "the file again without it, with labels by name"
        ) from None
    return found


def _parquet_batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with parquet_faults(str(file)), pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            batch.validate(full=True)  # pyarrow itself takes any bytes for text
            yield batch.select(columns)  # it gives the file's order
