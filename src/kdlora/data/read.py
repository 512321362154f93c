"""The reader of every format: named columns in, a memory-mapped Arrow table out; a bad row is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset
from pydantic import TypeAdapter

from kdlora.data.delimited import Delimited
from kdlora.data.faults import parquet_faults, refuse_duplicates, text_faults
from kdlora.data.lines import Lines, as_object, json_fault, read_object
from kdlora.data.spool import spool
from kdlora.errors import DataError, did_you_mean, first_line

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_CHUNK_ROWS = 10_000
_PARQUET_ROWS = 65536
_NOT_BLANK = r"[^\s\p{Z}\x{FEFF}\x{200B}\x{0085}]"


@dataclass(frozen=True)
class RawTable:
    """The columns that were asked for, as they were found; `source` is how messages call the file or split."""

    source: str
    table: pa.Table
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of the columns that hold codes
    rows: pa.Array | None = None  # row numbers in the source, from 0, where rows were dropped
    dropped: int = 0

    def where(self, position: int) -> str:
        """Name a row for a message; rows are counted from 1 and a header does not count."""
        row = position if self.rows is None else self.rows[position].as_py()
        return f"{self.source}, row {row + 1}"

    def drop(self, mask: pa.ChunkedArray) -> RawTable:
        """Drop the rows where `mask` is true; the others keep their row number."""
        count = pc.sum(mask).as_py()
        if not count:
            return self
        kept = pc.invert(mask)
        rows = pa.array(np.arange(self.table.num_rows)) if self.rows is None else self.rows
        return replace(
            self, table=self.table.filter(kept), rows=rows.filter(kept.combine_chunks()), dropped=self.dropped + count
        )


@dataclass(frozen=True)
class Source:
    """A file or split that has been opened: its columns are known, its rows are not read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], RawTable]
    benchmark: bool = False  # made by GLUE's publishers: its corrupt rows are dropped, a user's are an error
    plain: bool = False  # one text a line

    def require(self, column: str, key: str) -> str:
        """Return `column` if the source has it."""
        if column not in self.columns:
            raise DataError(
                f"{self.name} has no column {column!r} ({key}); it has {', '.join(map(repr, self.columns))}."
                + did_you_mean(column, self.columns)
            )
        return column


def open_file(
    path: str | Path,
    key: str,
    *,
    header: tuple[str, ...] = (),
    benchmark: bool = False,
    plain: bool = False,
    every_key: bool = False,
) -> Source:
    """Open a data file by its extension.

    `header` names the columns of one that has no header line; with `every_key` the columns of JSON Lines are the keys
    of all rows, not of the first ones.
    """
    file = Path(path)
    _check_file(file, key)
    extension = file.suffix.lower()
    if extension in (".csv", ".tsv"):
        return _open_delimited(Delimited(file, header, drop_ragged=benchmark))
    if extension in (".parquet", ".pq"):
        return _open_parquet(file)
    if extension in (".jsonl", ".ndjson", ".json"):
        return _open_json(file, None if every_key else _CHUNK_ROWS)
    if extension == ".txt" and plain:
        return Source(str(file), ("text",), lambda _: _read_lines(file, key), plain=True)
    raise DataError(
        f"{file} ({key}): unknown kind of file {extension!r}; expected one of {', '.join(EXTENSIONS)}."
        + did_you_mean(extension, EXTENSIONS)
    )


def open_dataset(dataset: Dataset, name: str) -> Source:
    """Open a split that `datasets` has loaded; its rows stay where they are mapped."""

    def read(wanted: Sequence[str]) -> RawTable:
        table = dataset.select_columns(list(wanted)).with_format("arrow")[:]
        if not table.num_rows:
            raise DataError(f"{name} has no rows; expected examples")
        features = {column: dataset.features[column] for column in wanted}
        inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
        names = {column: tuple(kind.names) for column, kind in inner.items() if isinstance(kind, ClassLabel)}
        return RawTable(name, table, names)

    return Source(name, tuple(dataset.column_names), read)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, in any of the ways in which Arrow stores it."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner))


def is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether texts have nothing to read; null has not."""
    return pc.invert(pc.fill_null(pc.match_substring_regex(texts, _NOT_BLANK), False))


def _check_file(file: Path, key: str) -> None:
    if file.is_dir():
        raise DataError(f"{file} ({key}) is a folder; expected a file ({', '.join(EXTENSIONS)})")
    if not file.exists():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{file} ({key}) does not exist; check the path.{did_you_mean(file.name, siblings)}")
    if not file.stat().st_size:
        raise DataError(f"{file} ({key}) is empty (0 bytes); expected a header and examples")


def _open_delimited(file: Delimited) -> Source:
    name, columns = str(file.path), file.columns()

    def read(wanted: Sequence[str]) -> RawTable:
        ragged: list[int] = []
        table = spool(file.batches(columns, list(wanted), ragged), name)
        if not ragged:
            return RawTable(name, table)
        rows = np.delete(np.arange(table.num_rows + len(ragged)), ragged)
        return RawTable(name, table, rows=pa.array(rows), dropped=len(ragged))

    return Source(name, columns, read, file.drop_ragged)


def _open_json(file: Path, looked_at: int | None) -> Source:
    """Open JSON Lines, or a JSON array of objects; the columns are the keys of the first rows, or of all."""
    columns: dict[str, None] = {}
    for row in islice(_json_rows(file), looked_at):
        columns.update(dict.fromkeys(row))
    if not columns:
        raise DataError(f"{file} holds no JSON objects; expected one example per line")

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        rows, first = _json_rows(file), 0
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            arrays = [_to_array([row.get(key) for row in chunk], key, file, first) for key in wanted]
            yield pa.RecordBatch.from_arrays(arrays, names=list(wanted))
            first += len(chunk)

    return Source(str(file), tuple(columns), lambda wanted: RawTable(str(file), spool(batches(wanted), str(file))))


def _json_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    with text_faults(file, "one object per line"), file.open(encoding="utf-8-sig", newline="\n") as stream:
        start = stream.read(1)
        while start.isspace():
            start = stream.read(1)
        stream.seek(0)
        if start == "[":
            yield from _array_rows(file, stream.read())
            return
        for number, line in enumerate(Lines(stream), 1):
            try:
                if line.strip():
                    yield read_object(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: {error}; expected one object per line") from None


def _array_rows(file: Path, text: str) -> Iterator[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise DataError(f"{file}, line {getattr(error, 'lineno', 1)}: {json_fault(error)}") from None
    for number, row in enumerate(rows, 1):
        try:
            yield as_object(row)
        except ValueError as error:
            raise DataError(f"{file}, row {number}: {error}") from None


def _to_array(values: list[Any], key: str, file: Path, first_row: int) -> pa.Array:
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        row = next(row for row, value in enumerate(values) if _is_broken(value))
        raise DataError(
            f"{file}, row {first_row + row + 1}: {key!r} holds half a character (a lone surrogate, such as \\ud800); "
            "write the text again"
        ) from None
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        expected = type(known[0][1])
        for row, value in known:
            if type(value) is not expected and {type(value), expected} != {int, float}:
                raise DataError(
                    f"{file}, row {first_row + row + 1}: {key!r} is {type(value).__name__} ({str(value)[:40]!r}), but "
                    f"{expected.__name__} in the rows before; make it one type"
                ) from None
        raise DataError(f"{file}: {key!r} cannot be read ({error}); make it one type") from None


def _is_broken(value: Any) -> bool:
    """Say whether text, however deep, cannot be written as UTF-8."""
    return any(0xD800 <= ord(character) <= 0xDFFF for character in json.dumps(value, ensure_ascii=False))


def _read_lines(file: Path, key: str) -> RawTable:
    """Read one text a line; empty lines are left out, and count."""

    def batches() -> Iterator[pa.RecordBatch]:
        with text_faults(file, "one text a line"), file.open(encoding="utf-8-sig") as stream:
            lines = Lines(stream)
            while chunk := [line.rstrip("\n") for line in islice(lines, _CHUNK_ROWS)]:
                yield pa.RecordBatch.from_arrays([pa.array(chunk)], names=["text"])

    raw = RawTable(str(file), spool(batches(), str(file)))
    filled = raw.drop(is_blank(raw.table["text"]))
    if not filled.table.num_rows:
        raise DataError(f"{file} ({key}) has no line with text; expected one text a line")
    return filled


def _open_parquet(file: Path) -> Source:
    name = str(file)
    with parquet_faults(name):
        schema = pq.read_schema(file)
    refuse_duplicates(name, schema.names)

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        with parquet_faults(name), pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                batch.validate(full=True)  # pyarrow itself takes any bytes for text
                yield batch.select(columns)  # it gives the file's order

    def read(wanted: Sequence[str]) -> RawTable:
        return RawTable(name, spool(batches(list(wanted)), name), _stored_class_names(name, schema, wanted))

    return Source(name, tuple(schema.names), read)


def _stored_class_names(name: str, schema: pa.Schema, columns: Iterable[str]) -> dict[str, tuple[str, ...]]:
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
