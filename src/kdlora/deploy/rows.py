"""Read texts to classify from files and standard input, row by row; a bad row is an entry, not the end."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from kdlora.data.lines import MOST_CHARACTERS, Lines, LongLineError
from kdlora.deploy.encode import Text, check_text
from kdlora.errors import DataError, did_you_mean

InputFormat = Literal["csv", "tsv", "jsonl", "parquet", "text"]

_SUFFIXES: dict[str, InputFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
_SHOWN = 1000
"""Characters of the columns' names that a message shows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input.

    Attributes:
        id: of the id column, or the row's number from 0.
        text: a text or a pair; None where the row is bad.
        error: what is wrong with it, or an empty string.
        numbered: whether the id is the row's number, since the input names none.
    """

    id: str
    text: Text | None
    error: str = ""
    numbered: bool = False


@dataclass(frozen=True)
class Columns:
    """Where a row's text is.

    Attributes:
        text: one or two columns, or None to find them by name.
        recorded: the columns that the model was trained on, or None; used where the input has them.
        id: the id column; rows are numbered where the input has none.
        cut: characters of a text to keep; what lies beyond would be truncated anyway.
    """

    text: tuple[str, ...] | None
    recorded: tuple[str, ...] | None
    id: str
    cut: int


class RowReader:
    """Rows of a file or stream, in order; iterate once, and close the iterator if you stop early.

    Attributes:
        name: of the input, for messages.
        format: how it is read.
    """

    def __init__(
        self,
        source: str | Path,
        columns: Columns,
        *,
        format: InputFormat | None = None,  # noqa: A002
        start: int = 0,
    ) -> None:
        """Check that the input can be read; nothing is read yet."""
        self.name = "standard input" if str(source) == "-" else str(source)
        self._path = None if str(source) == "-" else Path(source)
        self._columns = columns
        self._start = start
        self.format = _choose_format(self._path, format)
        self._position: Callable[[], float | None] = lambda: None
        self._texts: tuple[str, ...] | None = None

    def __iter__(self) -> Generator[Row]:
        """Give the rows."""
        if self.format == "parquet":
            yield from self._parquet()
            return
        with contextlib.ExitStack() as stack:
            stream: BinaryIO = sys.stdin.buffer
            if self._path is not None:
                stream = stack.enter_context(self._path.open("rb"))
                size = max(1, self._path.stat().st_size)
                self._position = lambda: min(1.0, stream.tell() / size)
            # Broken UTF-8 must spoil its own row only: it is smuggled in here and refused by `check_text`.
            lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            try:
                yield from islice(self._text_rows(lines), self._start, None)
            finally:
                lines.detach()
                self._position = lambda: None if self._path is None else 1.0

    def fraction(self) -> float | None:
        """Give the share of the input that has been read, 0..1; None for a stream."""
        return self._position()

    def _text_rows(self, stream: io.TextIOWrapper) -> Iterator[Row]:
        """Read one of the text formats."""
        if self.format in ("csv", "tsv"):
            yield from self._delimited(Lines(stream))
            return
        for number, line in enumerate(_lines_or_errors(stream)):
            if isinstance(line, LongLineError):
                yield Row(str(number), None, f"row {number}: {line}")
            elif self.format == "text":
                yield self._row(number, {"text": line.rstrip("\r\n")}, ("text",), has_id=False)
            elif line.strip():
                yield self._json(number, line)

    def _delimited(self, lines: Lines) -> Iterator[Row]:
        """Read CSV or TSV with a header line."""
        csv.field_size_limit(MOST_CHARACTERS)  # an open quote swallows the rows after it up to this size
        try:
            first = next(lines, "")
        except LongLineError as error:
            raise DataError(f"{self.name}: {error}; expected a header line.") from None
        delimiter = "\t"
        if self.format == "csv":
            delimiter = next((mark for mark in ",\t;" if mark in first), ",")
        quoting: Literal[0, 3] = csv.QUOTE_NONE if self.format == "tsv" else csv.QUOTE_MINIMAL
        reader = csv.reader(_Chain(first, lines), delimiter=delimiter, quoting=quoting)
        header = next(reader, None)
        if not header:
            raise DataError(f"{self.name}: expected a header line with the column names, got an empty file.")
        texts = self._find_columns(header)
        has_id = self._columns.id in header
        number = 0
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except (csv.Error, LongLineError) as error:
                yield Row(str(number), None, f"row {number}: not readable as {self.format.upper()}: {error}")
            else:
                if not values:
                    continue
                if len(values) != len(header):
                    problem = f"row {number}: expected {len(header)} values, got {len(values)}"
                    yield Row(str(number), None, problem)
                else:
                    yield self._row(number, dict(zip(header, values, strict=True)), texts, has_id=has_id)
            number += 1

    def _json(self, number: int, line: str) -> Row:
        """Read one JSON object; the first one settles the text columns."""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            return Row(str(number), None, f"row {number}: not JSON: {reason}")
        if not isinstance(values, dict):
            return Row(str(number), None, f"row {number}: expected a JSON object, got {type(values).__name__}")
        self._texts = self._texts or self._find_columns(list(values))
        return self._row(number, values, self._texts, has_id=self._columns.id in values)

    def _parquet(self) -> Iterator[Row]:
        """Read a Parquet file, some rows at a time."""
        import pyarrow.parquet as pq

        from kdlora.data.faults import parquet_faults

        with parquet_faults(self.name), pq.ParquetFile(self._path) as file:
            names = file.schema_arrow.names
            texts = self._find_columns(names)
            has_id = self._columns.id in names
            total = max(1, file.metadata.num_rows)
            number, groups = _groups_from(file.metadata, self._start)
            self._position = lambda: number / total
            wanted = [*texts, *([self._columns.id] if has_id and self._columns.id not in texts else [])]
            for batch in file.iter_batches(batch_size=256, columns=wanted, row_groups=groups):
                for place in range(batch.num_rows):
                    if number >= self._start:
                        yield self._parquet_row(batch, place, number, texts, has_id=has_id)
                    number += 1

    def _parquet_row(self, batch: Any, place: int, number: int, texts: Sequence[str], *, has_id: bool) -> Row:
        try:
            values = {name: batch.column(name)[place].as_py() for name in batch.schema.names}
        except UnicodeDecodeError:
            return Row(str(number), None, f"row {number}: not valid UTF-8")
        except (ValueError, OverflowError) as error:  # a time that Python cannot express
            return Row(str(number), None, f"row {number}: not readable: {error}")
        return self._row(number, values, texts, has_id=has_id)

    def _row(self, number: int, values: Mapping[str, Any], texts: Sequence[str], *, has_id: bool) -> Row:
        """Make a row, or say what is wrong with it."""
        given = values.get(self._columns.id) if has_id else None
        name = str(number) if given is None else str(given)
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            return Row(str(number), None, f"row {number}: the id is not valid UTF-8")
        missing = [column for column in texts if values.get(column) is None]
        if missing:
            return Row(name, None, f"row {number}: column {missing[0]!r} is empty or missing")
        parts = [values[column] for column in texts]
        cut = [part[: self._columns.cut] if isinstance(part, str) else part for part in parts]
        try:
            text = check_text(cut[0] if len(cut) == 1 else tuple(cut), f"row {number}")
            return Row(name, text, numbered=given is None)
        except DataError as error:
            return Row(name, None, str(error))

    def _find_columns(self, available: Sequence[str]) -> tuple[str, ...]:
        """Settle the text columns."""
        found = self._choose_columns(available)
        for column in (*found, self._columns.id):
            if list(available).count(column) > 1:
                raise DataError(f"{self.name}: there are two columns {column!r}; rename one.")
        return found

    def _choose_columns(self, available: Sequence[str]) -> tuple[str, ...]:
        wanted = self._columns.text
        if wanted is not None:
            for column in wanted:
                if column not in available:
                    raise DataError(
                        f"{self.name}: no column {column!r}; there are {', '.join(available):.{_SHOWN}}."
                        f"{did_you_mean(column, available)}"
                    )
            return wanted
        recorded = self._columns.recorded
        if recorded and all(column in available for column in recorded):
            return recorded
        if "text" in available:
            return ("text", "text_pair") if "text_pair" in available else ("text",)
        others = [column for column in available if column not in (self._columns.id, "label")]
        if len(others) == 1:
            return (others[0],)
        raise DataError(
            f"{self.name}: expected a column 'text' (and 'text_pair' for pairs)"
            f"{' or ' + ', '.join(map(repr, recorded)) if recorded else ''}; there are "
            f"{', '.join(available):.{_SHOWN}}. Name the text column or columns."
        )


def _choose_format(path: Path | None, wanted: InputFormat | None) -> InputFormat:
    """Settle how the input is read."""
    known = get_args(InputFormat)
    if wanted is not None and wanted not in known:
        raise DataError(
            f"unknown input format {wanted!r}; expected one of {', '.join(known)}.{did_you_mean(wanted, known)}"
        )
    if path is None:
        if wanted == "parquet":
            raise DataError("standard input cannot be read as Parquet; give the file's name.")
        return wanted or "text"
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give a file to classify, or - for standard input.")
    found = wanted or _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"{path}: cannot tell the format from {path.suffix or 'a name without extension'!r}; expected "
            f"{', '.join(_SUFFIXES)}, or name the format."
        )
    return found


def _groups_from(metadata: Any, start: int) -> tuple[int, list[int]]:
    """Find the row groups of a Parquet file that hold a row and those after it, and the number of their first row."""
    first, ends = 0, 0
    for group in range(metadata.num_row_groups):
        ends = first + metadata.row_group(group).num_rows
        if ends > start:
            return first, list(range(group, metadata.num_row_groups))
        first = ends
    return ends, []


def _lines_or_errors(stream: io.TextIOWrapper) -> Iterator[str | LongLineError]:
    """Give the lines, and in place of one that is too long the error."""
    lines = Lines(stream)
    while True:
        try:
            line: str | LongLineError = next(lines)
        except StopIteration:
            return
        except LongLineError as error:
            line = error
        yield line


class _Chain:
    """Gives a line that was read already, then the others; it goes on after an error, as `Lines` does."""

    def __init__(self, first: str, rest: Lines) -> None:
        self._first: str | None = first
        self._rest = rest

    def __iter__(self) -> _Chain:
        return self

    def __next__(self) -> str:
        line, self._first = self._first, None
        return next(self._rest) if line is None else line
