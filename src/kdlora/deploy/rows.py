"""Read texts to classify from files and standard input, row by row; a bad row is an entry, not the end."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, get_args

from kdlora.data.lines import FORMATS, NO_QUOTING, OBJECT_A_LINE, Format, Numbered, is_quoted, read_rows
from kdlora.data.tags import WORD_COLUMNS, Words, join_words
from kdlora.deploy.predict import Text, check_one, check_text
from kdlora.errors import DataError, did_you_mean
from kdlora.extras import check_installed

logger = logging.getLogger(__name__)

SUFFIXES = {suffix: form for suffix, form in FORMATS.items() if suffix != ".json"}
"""An array of JSON is not read row by row."""
_WINDOW_ROWS = 4096
_WINDOW_CHARACTERS = 8_000_000
_LOOKED_AT = 100
"""Rows of JSON Lines whose keys are its columns: what is null is often left out."""
_SHOWN = 1000
"""Characters of the columns' names that a message shows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input: a text or a pair, or what is wrong with it; an error beside a text is a missing id."""

    id: str
    text: Text | Words | None
    error: str = ""
    numbered: bool = False  # the id is the row's number from 0, since the input names none
    values: Mapping[str, Any] | None = None  # as they came, where they are kept


@dataclass(frozen=True)
class Columns:
    """Where a row's text is: in columns that are given, or that the model was trained on, or found by name."""

    text: tuple[str, ...] | None
    recorded: tuple[str, ...] | None
    id: str
    cut: int | None  # characters of a text to keep, since the rest would be truncated; None: all, one text, maybe empty
    keep: bool = False  # all values of a row, and not its text alone
    words: bool = False  # a list of words is a text, too
    coded: bool = False  # a language may stand before every word
    texts: int | None = None  # that the model reads, 1 or 2; None where it does not say
    several: bool = False  # files; those of plain text, among others, have no columns


class RowReader:
    """Rows of a file or stream, in order; iterate once, and close the iterator if you stop early."""

    def __init__(self, source: str | Path, columns: Columns, *, form: Format | None = None, start: int = 0) -> None:
        """Check that the input can be read; nothing is read yet."""
        self._path = Path(source) if str(source) != "-" else None
        self.name = "standard input" if self._path is None else str(source)
        self.form = _choose_format(self._path, form)
        self._columns, self.start = columns, start
        if self._path is None and not hasattr(sys.stdin, "buffer"):
            raise DataError("standard input is closed, or a notebook's, and cannot be read; give a file.")
        if self.form == "text" and (columns.text is not None or columns.id != "id"):
            if not columns.several:
                raise DataError(
                    f"{self.name} is read as one text a line, which has no columns; name its format "
                    "by the extension (or, for kdlora predict: --input-format), or no column."
                )
            self._columns = replace(columns, text=None, id="id")
        self._has_ids = False
        self.text_columns: tuple[str, ...] = ()
        self.header: Sequence[str] = ()
        """Columns of the input, once its first row is read; none of JSON Lines, where each row has its own."""
        self.fraction: Callable[[], float | None] = lambda: None
        """Give the share of the input that has been read, 0..1; None for a stream."""

    def __iter__(self) -> Generator[Row]:
        with contextlib.closing(self._parquet() if self.form == "parquet" else self._text()) as found:
            for number, values in found:
                if number < self.start:
                    continue
                if isinstance(values, str):
                    yield Row(self._number(number), None, f"row {number + 1}: {values}")
                else:
                    yield self._row(number, values)

    def _text(self) -> Generator[Numbered]:
        with contextlib.ExitStack() as stack:
            if self._path is None:
                stream: BinaryIO = sys.stdin.buffer
            else:
                stream = stack.enter_context(self._path.open("rb"))
                size = max(1, self._path.stat().st_size)
                self.fraction = lambda: 1.0 if stream.closed else min(1.0, stream.tell() / size)
            # Broken UTF-8 must spoil its own row only: it is smuggled in here and refused by `check_text`.
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            stack.callback(text.detach)
            columns, rows = read_rows(text, self.form, self.name, number=Decimal if self._columns.keep else float)
            self.header, self.text_columns = columns, self._find_columns(columns) if columns else ()
            ahead, held = list[Numbered](), 0
            while not columns and len(ahead) < _LOOKED_AT and held < _WINDOW_CHARACTERS and (row := next(rows, None)):
                ahead.append(row)
                held += len(str(row[1]))
            shown = [values for _, values in ahead if not isinstance(values, str)]
            keys = dict.fromkeys(chain(*shown))
            self._has_ids = self._columns.id in columns or any(row.get(self._columns.id) is not None for row in shown)
            # As in training: by sentences, and without empty lines.
            for number, (_, values) in enumerate(chain(ahead, rows)):
                if not self.text_columns and not isinstance(values, str):  # of a run that goes on, as it began
                    self.text_columns = self._find_columns(list(keys or values))
                if self.form == "tsv" and not isinstance(values, str):
                    self._refuse_quoting(number, values)
                yield number, values

    def _refuse_quoting(self, number: int, values: Mapping[str, Any]) -> None:
        if any(is_quoted(values[column]) for column in self.text_columns):
            raise DataError(f"{self.name}, row {number + 1}: a text is in CSV quotes. {NO_QUOTING}.")

    def _parquet(self) -> Generator[Numbered]:
        check_installed("reading Parquet", "parquet")
        import pyarrow.parquet as pq

        from kdlora.data.parquet import parquet_faults

        # Not buffered ahead: the first rows would wait until all texts of the file are in memory.
        with parquet_faults(self.name), pq.ParquetFile(self._path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            self.text_columns, self._has_ids = self._find_columns(names), self._columns.id in names
            number = 0
            self.fraction = lambda: number / max(1, file.metadata.num_rows)
            wanted = [name for name in dict.fromkeys((*self.text_columns, self._columns.id)) if name in names]
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                first, number = number, number + batch.num_rows
                if number > self.start:
                    yield from enumerate(_parquet_rows(batch), first)

    def _number(self, number: int) -> str:
        """Name a row without an id; beside others' ids, its number might be one of them."""
        return "" if self._has_ids else str(number)

    def _row(self, number: int, values: Mapping[str, Any]) -> Row:
        given = values.get(self._columns.id)
        name, where = self._number(number) if given is None else str(given), f"row {number + 1}"
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            return Row(self._number(number), None, f"{where}: the id is not valid UTF-8")
        parts: list[Any] = []
        cut = self._columns.cut
        for column in self.text_columns:
            part = values.get(column)
            if part is None and not (cut is None and column in values):
                return Row(name, None, f"{where}: column {column!r} is empty or missing")
            parts.append("" if part is None else part)
        found = parts[0] if len(parts) == 1 else tuple(parts)
        text: Text | Words
        try:
            if self._columns.words and isinstance(found, list):
                text = join_words(found, where, self._columns.coded)
                check_one(text.text, where, whole=cut is None)
            elif cut is None:
                text = check_one(found, where, whole=True)
            else:
                text = check_text(found, where, self._columns.texts, cut)
            fault = "" if name else f"{where}: column {self._columns.id!r} is empty or missing"
            numbered = given is None and not self._has_ids
            return Row(name, text, fault, numbered=numbered, values=values if self._columns.keep else None)
        except DataError as error:
            return Row(name, None, str(error))

    def _find_columns(self, available: Sequence[str]) -> tuple[str, ...]:
        found = self._choose_columns(available)
        for column in available if self._columns.keep else (*found, self._columns.id):
            if list(available).count(column) > 1:
                raise DataError(f"{self.name}: there are two columns {column!r}; rename one.")
        if (expected := self._columns.texts) is not None and len(found) != expected:
            told = ("pairs of texts", "both columns") if expected == 2 else ("single texts", "one column")
            columns = " and ".join(map(repr, found))
            raise DataError(f"{self.name}: the model was trained on {told[0]}, got the text {columns}. Name {told[1]}.")
        return found

    def _choose_columns(self, available: Sequence[str]) -> tuple[str, ...]:
        if self.form == "text":
            return ("text",)
        wanted, recorded = self._columns.text, self._columns.recorded
        lists = self._columns.words and self.form not in ("csv", "tsv")  # of words: no CSV holds any, none is redacted
        if recorded and recorded[0] in WORD_COLUMNS and (self._columns.words or self._columns.keep) and not lists:
            recorded = None
        listed = f"{', '.join(available):.{_SHOWN}}"
        named = () if self._columns.id == "id" else (self._columns.id,)
        if missing := [column for column in (*(wanted or ()), *named) if column not in available]:
            hint = did_you_mean(missing[0], available)
            raise DataError(f"{self.name}: no column {missing[0]!r}; there are {listed}.{hint}")
        if wanted is not None:
            return wanted
        if recorded and all(column in available for column in recorded):
            return recorded
        if known := [name for name in WORD_COLUMNS if lists and name in available]:
            return (known[0],)
        if "text" in available:
            may_be_pair = self._columns.cut is not None and self._columns.texts != 1
            return ("text", "text_pair") if "text_pair" in available and may_be_pair else ("text",)
        refused = WORD_COLUMNS if self._columns.words else ()  # what looks like lists of words is no text
        others = [column for column in available if column not in (self._columns.id, "label", *refused)]
        if len(others) == 1 and not self._columns.keep:  # what is read as a header may be a text, and is passed on
            _tell_guess(self.name, others[0])
            return (others[0],)
        more = f" or {', '.join(map(repr, recorded))}" if recorded and recorded[0] != "text" else ""
        listing = any(column in refused for column in available) and not lists
        hint = " Lists of words are read from JSON Lines and Parquet alone." if listing else ""
        raise DataError(
            f"{self.name}: expected a column 'text' (and 'text_pair' for pairs){more}; there are {listed}. Name the "
            f"text column or columns.{hint}"
        )


@cache
def _tell_guess(name: str, column: str) -> None:
    """Warn once of a file, for which a labelling has many readers."""
    logger.warning("%s: the texts are those of the column %.60r, the only one left; --text names another", name, column)


def cut_windows(rows: Iterable[Row], most: int | None = None) -> Iterator[list[Row]]:
    """Group rows by count and by characters, so that long texts do not fill the memory."""
    window: list[Row] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += sum(map(len, row.text)) if isinstance(row.text, tuple) else len(row.text or "")
        characters += sum(len(str(value)) for value in (row.values or {}).values())
        if len(window) >= _WINDOW_ROWS or characters >= (most or _WINDOW_CHARACTERS):
            yield window
            window, characters = [], 0
    if window:
        yield window


def _choose_format(path: Path | None, wanted: Format | None) -> Format:
    known = get_args(Format)
    if wanted is not None and wanted not in known:
        raise DataError(
            f"unknown input format {wanted!r}; expected one of {', '.join(known)}.{did_you_mean(wanted, known)}"
        )
    if path is None:
        if wanted == "parquet":
            raise DataError("standard input cannot be read as Parquet; give the file's name.")
        return wanted or "text"
    if not path.is_file():
        told = "not a file, but a folder or a pipe" if path.exists() else "no such file"
        raise DataError(f"{path}: {told}. Give a file to classify, or - for standard input.")
    found = wanted or SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"{path}: cannot tell the format from {path.suffix or 'a name without extension'!r}; expected "
            f"{', '.join(SUFFIXES)}. An array of JSON is not read row by row: {OBJECT_A_LINE}. Rename a file that has "
            "another name (or, for kdlora predict: --input-format)."
        )
    return found


def _parquet_rows(batch: Any) -> list[Mapping[str, Any] | str]:
    """Give rows as Python values; where one cannot be had, the others are had one by one."""
    try:
        found: list[Mapping[str, Any] | str] = batch.to_pylist()
        return found
    except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, or a time that Python cannot express
        if batch.num_rows == 1:
            return [f"not readable: {error}"]
    return [row for place in range(batch.num_rows) for row in _parquet_rows(batch.slice(place, 1))]
