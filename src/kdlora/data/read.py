"""The reader of every format: named columns in, a memory-mapped Arrow table out; a bad row is named."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset
from pydantic import TypeAdapter

from kdlora.data.lines import (
    FORMATS,
    LINES,
    NO_QUOTING,
    OBJECT_A_LINE,
    Format,
    Numbered,
    as_object,
    is_quoted,
    json_fault,
    read_rows,
)
from kdlora.data.parquet import parquet_faults, read_batches
from kdlora.data.spool import spool
from kdlora.errors import DataError, did_you_mean, first_line

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".conll")
_CHUNK_ROWS = 4096
_LOOKED_AT = 10_000  # rows of JSON Lines, for their keys
_ENCLOSED_FIELD = r'(?s)^".*"$'
_NOT_BLANK = r"[^\s\p{Z}\x{FEFF}\x{200B}\x{0085}]"


@dataclass(frozen=True)
class RawTable:
    """The columns that were asked for, as they were found; `source` is how messages call the file or split."""

    source: str
    table: pa.Table
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of the columns that hold codes
    rows: pa.Array | None = None  # row numbers in the source, from 0, where rows were dropped

    @property
    def numbers(self) -> pa.Array:
        return pa.array(np.arange(self.table.num_rows)) if self.rows is None else self.rows

    def where(self, position: int) -> str:
        """Name a row for a message; rows are counted from 1 and a header does not count. A sentence's is its line."""
        if LINES in self.table.column_names:
            return f"{self.source}, line {self.table[LINES][position][0].as_py()}"
        row = position if self.rows is None else self.rows[position].as_py()
        return f"{self.source}, row {row + 1}"

    def drop(self, mask: pa.ChunkedArray) -> RawTable:
        """Drop the rows where `mask` is true; the others keep their row number."""
        if first_true(mask) is None:
            return self
        kept = pc.invert(mask)
        return replace(self, table=self.table.filter(kept), rows=self.numbers.filter(kept.combine_chunks()))


@dataclass(frozen=True)
class Source:
    """A file or split that has been opened: its columns are known; `read` gives some, and keeps the last ones."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[tuple[str, ...]], RawTable]
    benchmark: bool = False  # made by GLUE's publishers: its corrupt rows are dropped, a user's are an error
    plain: bool = False  # one text a line

    def require(self, column: str, key: str, told: str = "") -> str:
        if column not in self.columns:
            raise DataError(
                f"{self.name} has no column {column!r} ({key}); it has {', '.join(map(repr, self.columns))}."
                f"{did_you_mean(column, self.columns)}{told}"
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
    """Open a data file by its extension; `header` names columns, `every_key` looks for them in all JSON rows."""
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{file} ({key}) is a folder; expected a file ({', '.join(EXTENSIONS)})")
    if not file.exists():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{file} ({key}) does not exist; check the path.{did_you_mean(file.name, siblings)}")
    if not file.is_file():
        raise DataError(f"{file} ({key}) is a pipe or a device, which cannot be read twice; write it to a file first")
    if not file.stat().st_size:
        raise DataError(f"{file} ({key}) is empty (0 bytes); expected a header and examples")
    extension = file.suffix.lower()
    form = FORMATS.get(extension)
    if form == "parquet":
        return _open_parquet(file)
    if form is not None and (form != "text" or plain):
        rows = _RowFile(file, form, header, benchmark)
        columns = rows.columns(None if every_key else _LOOKED_AT)
        return Source(str(file), columns, lru_cache(maxsize=1)(rows.read), benchmark, plain=form == "text")
    raise DataError(
        f"{file} ({key}): unknown kind of file {extension!r}; expected one of {', '.join(EXTENSIONS)} "
        "(a word and its tag on each line). Save the data as one of them, or rename a file that is one"
    )


def open_dataset(dataset: Dataset, name: str) -> Source:
    """Open a split that `datasets` has loaded; its rows stay where they are mapped."""

    def read(wanted: tuple[str, ...]) -> RawTable:
        table = dataset.select_columns(list(wanted)).with_format("arrow")[:]
        if not table.num_rows:
            raise DataError(f"{name} has no rows; expected examples")
        features = {column: dataset.features[column] for column in wanted}
        inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
        names = {column: tuple(kind.names) for column, kind in inner.items() if isinstance(kind, ClassLabel)}
        return RawTable(name, table, names)

    return Source(name, tuple(dataset.column_names), read)


def named_codes(codes: pa.ChunkedArray | pa.Array, names: Sequence[str]) -> pa.ChunkedArray | pa.Array:
    """Give the names of codes; a code without a name, such as the Hub's -1 for a hidden label, has none."""
    inside = pc.and_(pc.greater_equal(codes, 0), pc.less(codes, len(names)))
    return pc.take(pa.array(names, pa.string()), pc.if_else(inside, codes, None))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, in any of the ways in which Arrow stores it."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner))


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether texts have nothing to read; null has not."""
    return pc.invert(pc.fill_null(pc.match_substring_regex(texts, _NOT_BLANK), False))


def first_true(mask: pa.ChunkedArray | pa.Array) -> int | None:
    position: int = pc.index(mask, True).as_py()
    return None if position < 0 else position


@dataclass(frozen=True)
class _RowFile:
    """A file that is read row by row; `header` names the columns of one without a header line."""

    path: Path
    form: Format
    header: tuple[str, ...]
    benchmark: bool

    def columns(self, looked_at: int | None) -> tuple[str, ...]:
        """Read the header; the columns of JSON Lines are the keys of the first objects, or of all."""
        with self._opened() as (named, rows):
            last, number = dict[str, Any](), 0
            for row in () if named else islice(rows, looked_at):
                last |= row
                number += 1
        columns = tuple(named or last)
        if not columns:
            raise DataError(f"{self.path} holds no JSON objects; expected one example per line")
        whole = list if number == 1 and self.path.suffix.lower() == ".json" else ()
        if last and any(all(isinstance(value, form) for value in last.values()) for form in (dict, whole)):
            raise DataError(
                f"{self.path}: it is one object of columns, as pandas' to_json writes where it is not told otherwise; "
                f"{OBJECT_A_LINE}"
            )
        _refuse_duplicates(str(self.path), columns)
        for column in columns if self.form == "tsv" else ():
            if len(column) > 1 and column[0] == column[-1] == '"':
                raise DataError(f"{self.path}: the header has quotes around {column}. {NO_QUOTING}")
        return columns

    def read(self, wanted: tuple[str, ...]) -> RawTable:
        raw = RawTable(str(self.path), spool(self._batches(wanted), str(self.path)))
        if self.form == "tsv" and not self.benchmark:
            _refuse_quoting(raw)
        if self.form == "text":  # an empty line is left out, and counts
            raw = raw.drop(is_blank(raw.table["text"]))
        return raw

    def _batches(self, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        names, first = [*wanted, *([LINES] if self.form == "conll" else [])], 0
        with self._opened() as (_, rows):
            while chunk := list(islice(rows, _CHUNK_ROWS)):
                arrays = [_to_array([row.get(key) for row in chunk], key, self.path, first) for key in names]
                yield pa.RecordBatch.from_arrays(arrays, names=names)
                first += len(chunk)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Sequence[str], Iterator[Mapping[str, Any]]]]:
        """Give columns and rows. A bad row is an error; one of a benchmark is empty."""
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as stream:
                begin = stream.read(1000).lstrip() if self.form == "jsonl" else ""
                stream.seek(0)
                if begin.splitlines()[:1] == ["{"]:
                    raise DataError(f"{self.path}, line 1: an object over several lines; {OBJECT_A_LINE}")
                if begin.startswith("["):
                    yield (), self._sound(_array_rows(self.path, stream.read()), "row")
                else:
                    columns, found = read_rows(stream, self.form, str(self.path), self.header)
                    yield columns, self._sound(found, "line" if self.form in ("jsonl", "conll") else "row")
        except UnicodeDecodeError:
            raise _encoding_error(self.path) from None

    def _sound(self, rows: Iterable[Numbered], unit: str) -> Iterator[Mapping[str, Any]]:
        for number, values in rows:
            if isinstance(values, str) and not self.benchmark:
                raise DataError(f"{self.path}, {unit} {number + 1}: {values}")
            yield {} if isinstance(values, str) else values


def _array_rows(file: Path, text: str) -> Iterable[Numbered]:
    try:
        return enumerate(map(as_object, json.loads(text)))
    except (RecursionError, ValueError) as error:
        raise DataError(f"{file}, line {getattr(error, 'lineno', 1)}: {json_fault(error)}") from None


def _refuse_quoting(raw: RawTable) -> None:
    """CSV quoting in a TSV file shows in doubled quotes, or in quotes around every value."""
    for column in raw.table.columns:
        enclosed = len(column) > 1 and pc.all(pc.match_substring_regex(column, _ENCLOSED_FIELD)).as_py()
        begun = () if enclosed else np.flatnonzero(pc.starts_with(column, '"')).tolist()
        position = 0 if enclosed else next((row for row in begun if is_quoted(column[row].as_py())), None)
        if position is not None:
            value = column[position].as_py()
            raise DataError(f"{raw.source} has values in CSV quotes, such as {value[:60]}. {NO_QUOTING}")


def _encoding_error(file: Path) -> DataError:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return DataError(
                    f"{file}, line {number}: byte 0x{line[error.start]:02X} is not UTF-8; save the file as UTF-8 (in "
                    "Excel: CSV UTF-8; elsewhere: iconv -f ENCODING -t utf-8, with the file's own encoding, such as "
                    "windows-1252, gb18030 or utf-16)"
                )
    return DataError(f"{file} was not UTF-8 when it was read, and has changed since; try again")


def _refuse_duplicates(name: str, columns: Sequence[str]) -> None:
    """Refuse a name that two columns have; those without one, as spreadsheets leave them, nobody can ask for."""
    if twice := [column for position, column in enumerate(columns) if column and column in columns[:position]]:
        raise DataError(f"{name} has two columns named {twice[0]!r}; rename one")


def _to_array(values: list[Any], key: str, file: Path, first_row: int) -> pa.Array:
    try:
        array = pa.array(values)
    except (UnicodeEncodeError, pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        if (named := list(map(_name_parts, values))) != values:
            return _to_array(named, key, file, first_row)
        row = bisect_left(range(len(values)), True, key=lambda last: not _fits(values[: last + 1]))
        raise DataError(
            f"{file}, row {first_row + row + 1}: {key!r} is {type(values[row]).__name__} ({str(values[row])[:40]!r}), "
            f"which cannot be read ({error!s:.200}); correct it, or make the whole column one type"
        ) from None
    flags = [row for row, one in enumerate(values) if isinstance(one, bool)] if pa.types.is_floating(array.type) else []
    if flags:
        raise DataError(f"{file}, row {first_row + flags[0] + 1}: {key!r} is a truth value among numbers; correct it")
    return array


def _name_parts(value: Any) -> Any:
    """Write spans such as [0, 5, "PER"], of several types, as the other formats do."""
    if not isinstance(value, list):
        return value
    are_spans = all(isinstance(one, list) and [type(part) for part in one] == [int, int, str] for one in value)
    return [dict(zip(("start", "end", "label"), one, strict=True)) for one in value] if are_spans else value


def _fits(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return False
    return True


def _open_parquet(file: Path) -> Source:
    name = str(file)
    with parquet_faults(name):
        schema = pq.read_schema(file)
    _refuse_duplicates(name, schema.names)

    def read(wanted: tuple[str, ...]) -> RawTable:
        return RawTable(name, spool(read_batches(file, wanted), name), _stored_class_names(name, schema, wanted))

    return Source(name, tuple(schema.names), lru_cache(maxsize=1)(read))


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
            f"{name}: its metadata 'huggingface', which hold the label names, cannot be read ({first_line(error)}); "
            "write the file again without it, with labels by name"
        ) from None
    return found
