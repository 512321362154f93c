"""Read texts to classify from files and standard input, row by row; a bad row is an entry, not the end."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from kdlora.data.lines import MOST_CHARACTERS, Lines, LongLineError, choose_delimiter, read_object
from kdlora.deploy.encode import Text, check_text
from kdlora.errors import DataError, did_you_mean

InputFormat = Literal["csv", "tsv", "jsonl", "parquet", "text"]

SUFFIXES: dict[str, InputFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
_Numbered = tuple[int, Mapping[str, Any] | str]
"""A row's number and its values, or what is wrong with it."""
_WINDOW_ROWS = 4096
_WINDOW_CHARACTERS = 8_000_000
_SHOWN = 1000
"""Characters of the columns' names that a message shows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input: a text or a pair, or what is wrong with it."""

    id: str
    text: Text | None
    error: str = ""
    numbered: bool = False  # the id is the row's number from 0, since the input names none


@dataclass(frozen=True)
class Columns:
    """Where a row's text is: in columns that are given, or that the model was trained on, or found by name."""

    text: tuple[str, ...] | None
    recorded: tuple[str, ...] | None
    id: str
    cut: int  # characters of a text to keep; what lies beyond would be truncated anyway


class RowReader:
    """Rows of a file or stream, in order; iterate once, and close the iterator if you stop early."""

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
        self.format = _choose_format(None if str(source) == "-" else Path(source), format)
        self._path = Path(source) if str(source) != "-" else None
        self._columns = columns
        self._start = start
        self._position: Callable[[], float | None] = lambda: None
        self._texts: tuple[str, ...] = ()
        self._id: str | None = columns.id

    def __iter__(self) -> Generator[Row]:
        """Give the rows."""
        with contextlib.closing(self._parquet() if self.format == "parquet" else self._text()) as found:
            for number, values in found:
                if isinstance(values, str):
                    yield Row(str(number), None, f"row {number}: {values}")
                else:
                    yield self._row(number, values)

    def fraction(self) -> float | None:
        """Give the share of the input that has been read, 0..1; None for a stream."""
        return self._position()

    def _text(self) -> Generator[_Numbered]:
        with contextlib.ExitStack() as stack:
            stream: BinaryIO = sys.stdin.buffer
            if self._path is not None:
                stream = stack.enter_context(self._path.open("rb"))
                size = max(1, self._path.stat().st_size)
                self._position = lambda: min(1.0, stream.tell() / size)
            # Broken UTF-8 must spoil its own row only: it is smuggled in here and refused by `check_text`.
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            read = self._delimited if self.format in ("csv", "tsv") else self._lines
            try:
                yield from islice(read(Lines(text)), self._start, None)
            finally:
                text.detach()
                self._position = lambda: None if self._path is None else 1.0

    def _delimited(self, lines: Lines) -> Iterator[_Numbered]:
        """Read CSV or TSV with a header line."""
        csv.field_size_limit(MOST_CHARACTERS)  # an open quote swallows the rows after it up to this size
        try:
            first = next(lines, "")
        except LongLineError as error:
            raise DataError(f"{self.name}: {error}; expected a header line.") from None
        lines.put_back(first)
        if self.format == "csv":
            reader = csv.reader(lines, delimiter=choose_delimiter(first))
        else:
            reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(reader, None)
        if not header:
            raise DataError(f"{self.name}: expected a header line with the column names, got an empty file.")
        self._texts = self._find_columns(header)
        number = 0
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except (csv.Error, LongLineError) as error:
                yield number, f"not readable as {self.format.upper()}: {error}"
            else:
                if not values:
                    continue
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                else:
                    yield number, f"expected {len(header)} values, got {len(values)}"
            number += 1

    def _lines(self, lines: Lines) -> Iterator[_Numbered]:
        """Read one text or one JSON object a line; the first object settles the text columns."""
        if self.format == "text":
            self._texts, self._id = ("text",), None
        for number in count():
            try:
                line = next(lines)
                if self.format == "text":
                    found: Mapping[str, Any] | str = {"text": line.rstrip("\r\n")}
                elif line.strip():
                    found = read_object(line)
                else:
                    continue
            except StopIteration:
                return
            except ValueError as error:  # a line that is too long is one, too
                found = str(error)
            yield number, found

    def _parquet(self) -> Generator[_Numbered]:
        """Read a Parquet file, some rows at a time."""
        import pyarrow.parquet as pq

        from kdlora.data.faults import parquet_faults

        with parquet_faults(self.name), pq.ParquetFile(self._path) as file:
            names = file.schema_arrow.names
            self._texts = self._find_columns(names)
            total = max(1, file.metadata.num_rows)
            number, groups = _groups_from(file.metadata, self._start)
            self._position = lambda: number / total
            wanted = [name for name in dict.fromkeys((*self._texts, self._columns.id)) if name in names]
            for batch in file.iter_batches(batch_size=256, columns=wanted, row_groups=groups):
                for place in range(batch.num_rows):
                    if number >= self._start:
                        yield number, _parquet_values(batch, place)
                    number += 1

    def _row(self, number: int, values: Mapping[str, Any]) -> Row:
        """Make a row, or say what is wrong with it."""
        self._texts = self._texts or self._find_columns(list(values))
        given = values.get(self._id) if self._id is not None else None
        name = str(number) if given is None else str(given)
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            return Row(str(number), None, f"row {number}: the id is not valid UTF-8")
        missing = [column for column in self._texts if values.get(column) is None]
        if missing:
            return Row(name, None, f"row {number}: column {missing[0]!r} is empty or missing")
        parts = [values[column] for column in self._texts]
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
        wanted, recorded = self._columns.text, self._columns.recorded
        listed = f"{', '.join(available):.{_SHOWN}}"
        if wanted is not None:
            for column in wanted:
                if column not in available:
                    raise DataError(
                        f"{self.name}: no column {column!r}; there are {listed}.{did_you_mean(column, available)}"
                    )
            return wanted
        if recorded and all(column in available for column in recorded):
            return recorded
        if "text" in available:
            return ("text", "text_pair") if "text_pair" in available else ("text",)
        others = [column for column in available if column not in (self._columns.id, "label")]
        if len(others) == 1:
            return (others[0],)
        raise DataError(
            f"{self.name}: expected a column 'text' (and 'text_pair' for pairs)"
            f"{' or ' + ', '.join(map(repr, recorded)) if recorded else ''}; there are {listed}. Name the text column "
            "or columns."
        )


def cut_windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group rows by count and by characters, so that long texts do not fill the memory."""
    window: list[Row] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += sum(map(len, row.text)) if isinstance(row.text, tuple) else len(row.text or "")
        if len(window) >= _WINDOW_ROWS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


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
    found = wanted or SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"{path}: cannot tell the format from {path.suffix or 'a name without extension'!r}; expected "
            f"{', '.join(SUFFIXES)}, or name the format."
        )
    return found


def _groups_from(metadata: Any, start: int) -> tuple[int, list[int]]:
    """Find the row groups of a Parquet file that hold a row and those after it, and the number of their first row."""
    ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    group = int(np.searchsorted(ends, start, side="right"))
    return int(ends[group - 1]) if group else 0, list(range(group, len(ends)))


def _parquet_values(batch: Any, place: int) -> Mapping[str, Any] | str:
    try:
        return {name: batch.column(name)[place].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return "not valid UTF-8"
    except (ValueError, OverflowError) as error:  # a time that Python cannot express
        return f"not readable: {error}"
