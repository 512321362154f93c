"""The one reader of CSV, TSV, JSON Lines, CoNLL and plain text, row by row; light: what is served reads with it."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import chain, compress, count, islice
from typing import Any, Literal, TextIO

from kdlora.data.tags import parse_tags
from kdlora.errors import DataError

MOST_CHARACTERS = 64 << 20
"""Of a line, and of a value, so that neither a stream without a line break nor an open quote fills the memory."""
_CHUNK = 1 << 20
_SHOWN = 60
_SWALLOWED = 10
"""A value of so many lines that each have the columns of a row was hardly meant as one."""
NO_QUOTING = (
    "A .tsv file is read without quoting: a quote is a character, and a text holds no tab or line break. "
    "Write the file without quotes, or give it the extension .csv, which is read with quoting"
)

OBJECT_A_LINE = "write an object a line: df.to_json(FILE, orient='records', lines=True)"

LINES = "conll:line"
"""The column of a CoNLL file that says in which line each word stands."""
_LOOKED_AT = 10
"""Sentences whose first column says whether it counts."""
_SEP = re.compile(r"(?i)sep=([^\w\"])[\r\n]*$")
_MARKS = ("-DOCSTART-", "#begin document", "#end document")
_NO_WORD = re.compile(r"\d+[-.]\d+")
_GZIP = "\x1f\udc8b"
_UTF_16 = ("\udcff\udcfe", "\udcfe\udcff")
"""How its files begin where bytes that are no UTF-8 are kept."""
_KEY = re.compile(r"# [\w.:-]+ ?=")
Format = Literal["csv", "tsv", "jsonl", "parquet", "text", "conll"]
FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
}
logger = logging.getLogger(__name__)
Numbered = tuple[int, Mapping[str, Any] | str]
"""A row's number from 0 (of JSON Lines and CoNLL, its line's), and its values or what is wrong with it."""


def is_quoted(value: str) -> bool:
    """Whether a value is enclosed, with a doubled quote inside: only CSV quoting writes this."""
    inner = value[1:-1]
    return value[:1] == value[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', "")


class RowError(ValueError):
    """A line beyond the limit, or one that holds something else; those after it can be read."""


class _Lines(Iterator[str]):
    """Iterates over the lines of a stream, and goes on after an error, which a generator cannot."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self.name, self.number = stream, name, 0
        self.ended = False
        self.first = ""
        """The first line of a row of CSV that is not blank; its values may hold line breaks."""

    def __next__(self) -> str:
        line = self._stream.readline(MOST_CHARACTERS + 1)
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        if self.number == 1 and line.startswith(_UTF_16):  # else whole lines of it would pass for texts
            raise DataError(
                f"{self.name}: it is UTF-16; save it as UTF-8 (Excel: CSV UTF-8; elsewhere: iconv -f utf-16 -t utf-8)"
            )
        if self.number == 1 and line.startswith(_GZIP):
            raise DataError(f"{self.name}: it is compressed (gzip); unpack it first (gunzip FILE)")
        self.first = self.first if self.first.strip() else line
        if len(line) <= MOST_CHARACTERS or line.endswith(("\n", "\r")):
            return line
        while (rest := self._stream.readline(_CHUNK)) and not rest.endswith(("\n", "\r")):
            pass
        raise RowError(f"line {self.number} is longer than {MOST_CHARACTERS:,} characters")


def read_rows(
    stream: TextIO, form: Format, name: str, header: Sequence[str] = (), number: Callable[[str], Any] = float
) -> tuple[Sequence[str], Iterator[Numbered]]:
    """Give the columns of a stream, those of JSON Lines as none, and its rows.

    `header` is that of a file without one; `number` reads JSON's numbers that are no integers.
    """
    lines = _Lines(stream, name)
    if form in ("csv", "tsv"):
        return _read_delimited(lines, form, header)
    if form == "conll":
        return _read_conll(lines)
    return (("text",) if form == "text" else ()), _read_lines(lines, form, number)


def _read_delimited(lines: _Lines, form: Format, header: Sequence[str]) -> tuple[Sequence[str], Iterator[Numbered]]:
    """Read CSV, quoted, with the delimiter of its header, or TSV, never quoted."""
    csv.field_size_limit(MOST_CHARACTERS)
    try:
        filled = (line for line in lines if line.strip("\r\n"))
        first, delimiter = next(filled, ""), "\t"
        if form == "csv":
            if named := _SEP.match(first):  # Excel's
                first = next(filled, "")
            bare = re.sub('"[^"]*"', "", first)
            delimiter = named[1] if named else max(",\t;|", key=bare.count)
        reader = csv.reader(
            chain([first], lines),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if form == "csv" else csv.QUOTE_NONE,
            strict=True,
        )
        columns = header or next(reader)
    except (csv.Error, RowError) as error:
        raise DataError(f"{lines.name}: {error}; expected a header line.") from None
    if not columns:
        told = "expected a header line with the column names, got an empty file or blank lines."
        raise DataError(f"{lines.name}: {told}")
    return columns, _delimited_rows(filter(None, reader), lines, columns, form, delimiter)


def _delimited_rows(
    rows: Iterator[list[str]], lines: _Lines, columns: Sequence[str], form: Format, delimiter: str
) -> Iterator[Numbered]:
    width = len(columns)
    advice = "Put quotes around a text that holds the delimiter" if form == "csv" else NO_QUOTING
    for number in count():
        lines.first, begun = "", lines.number
        try:
            values = next(rows)
        except StopIteration:
            return
        except RowError as error:
            yield number, f"not readable as {form.upper()}: {error}"
            continue
        except csv.Error as error:
            found = (
                f"not readable as CSV: {error}, in line {lines.number}; the row is {lines.first[:_SHOWN]!r}. Close "
                "each quote, and double one inside a text"
            )
            if lines.ended and lines.number > begun + 1:  # whatever rows followed are in that value
                raise DataError(f"{lines.name}, line {begun + 1}: {found}") from None
            yield number, found
            continue
        if width > 1 and values[1:] == columns[1:] and values[0].lstrip("\ufeff") == columns[0].lstrip("\ufeff"):
            yield number, "it repeats the header, as where two files were joined; remove the line"
        elif len(values) == width:
            inner = delimiter.join(values).split("\n")[1:-1] if lines.number - begun > _SWALLOWED else []
            if width > 1 and len(inner) >= _SWALLOWED and all(one.count(delimiter) == width - 1 for one in inner):
                told = "%s: lines %d to %d are one row by their quotes, though each looks like a row; double each quote"
                logger.warning(f"{told} inside a text", lines.name, begun + 1, lines.number)
            yield number, dict(zip(columns, values, strict=True))
        else:
            shown = f"{delimiter.join(values):.{_SHOWN}}"
            found = f"{len(values)} columns where {width} are expected (delimiter {delimiter!r}): {shown!r}"
            yield number, f"{found}. {advice}"


def _read_conll(lines: _Lines) -> tuple[Sequence[str], Iterator[Numbered]]:
    """Read a word and its columns a line, an empty line after each sentence; the first word shows what divides them."""
    try:
        head = next((line for line in lines if not _ends_sentence(line) and not _is_comment(line)), "")
    except RowError as error:
        raise DataError(f"{lines.name}: {error}; expected a word and its tag.") from None
    if not head:
        raise DataError(
            f"{lines.name} holds no words; expected a word and its tag a line, and an empty line after a sentence"
        )
    divider = re.compile("\t" if "\t" in head.rstrip() else "[ \t]+")
    width = len(divider.split(head.rstrip()))
    columns = ("words", *map(str, range(2, width)), "tags")[:width]
    rows = _sentences(head, lines, columns, divider)
    first = list(islice(rows, _LOOKED_AT))
    rows, words = chain(first, rows), [row["words"] for _, row in first if not isinstance(row, str)]
    if width > 1 and max(map(len, words), default=1) > 1 and all(map(_count, words)):
        return columns, _without_numbers(rows, columns[1])
    return columns, rows


def _count(numbers: Sequence[str]) -> bool:
    """Whether a column counts the words; `3-4` and `8.1` of CoNLL-U are none."""
    words = [number for number in numbers if not _NO_WORD.fullmatch(number)]
    return words == [str(number) for number in range(1, len(words) + 1)]


def _without_numbers(rows: Iterator[Numbered], second: str) -> Iterator[Numbered]:
    """Take the second column as the words, where the first one counts them."""
    for place, row in rows:
        if isinstance(row, str):
            yield place, row
            continue
        words = [number.isdigit() for number in row["words"]]
        if any(words) and all(is_word or _NO_WORD.fullmatch(n) for is_word, n in zip(words, row["words"], strict=True)):
            kept = {name: list(compress(values, words)) for name, values in row.items()}
            yield place, kept | {"words": kept[second]}
        else:
            yield place, "the first column counts words elsewhere, but not in this sentence; make all sentences alike"


def _ends_sentence(line: str) -> bool:
    return not line.strip() or line.startswith(_MARKS)


def _is_comment(line: str, fields: Sequence[str] = (), width: int = 0, tags: Container[str] = ()) -> bool:
    """Whether a line before a sentence is a comment, not `#` with a tag, as of others; the first's width is unknown."""
    if not line.startswith(("# ", "#\t")):
        return False
    if _KEY.match(line) or len(fields) != width:
        return True
    last = line.split()[-1]
    if (width and line[1] == "\t") or last in tags:
        return False
    return last not in parse_tags([last]) and (width <= 2 or "=" in last or last.isdigit())


def _sentences(line: str, lines: _Lines, columns: Sequence[str], divider: re.Pattern[str]) -> Iterator[Numbered]:
    """Collect the columns of each sentence, and the numbers of its lines; one with a bad line is bad."""
    words: list[list[Any]] = []
    fault: Numbered | None = None
    tags = set[str]()
    while True:
        fields = divider.split(line.rstrip())
        if _ends_sentence(line) or (not words and _is_comment(line, fields, len(columns), tags)):
            if fault or any(word[0].strip() for word in words):
                columned = zip((*columns, LINES), map(list, zip(*words, strict=True)), strict=False)
                yield fault or (words[0][-1] - 1, dict(columned))
            words, fault = [], None
            if lines.ended:
                return
        elif len(fields) == len(columns):
            words.append([*fields, lines.number])
            tags.update(fields[1:] if len(fields) == 2 else ())
        elif fault is None:
            shown = f"{line.rstrip():.{_SHOWN}}"
            found = f"{len(fields)} columns where {len(columns)} are expected (as in the first line): {shown!r}"
            fault = lines.number - 1, f"{found}. Give every word the same columns; an empty line ends a sentence"
        try:
            line = next(lines, "")
        except RowError as error:
            fault, line = (lines.number - 1, str(error)), "-"


def _read_lines(lines: _Lines, form: Format, parse: Callable[[str], Any]) -> Iterator[Numbered]:
    for number in count():
        try:
            line = next(lines)
            if form == "text":
                yield number, {"text": line.rstrip("\r\n")}
            elif number == 0 and line.lstrip().startswith("["):
                raise DataError(
                    f"{lines.name}: it holds an array of JSON, which is not read row by row; {OBJECT_A_LINE}"
                )
            elif line.strip():
                yield number, as_object(json.loads(line, parse_float=parse))
        except StopIteration:
            return
        except (UnicodeDecodeError, DataError):
            raise
        except (ValueError, RecursionError) as error:
            yield number, json_fault(error)


def json_fault(error: Exception) -> str:
    """Say why Python's reader gives up on what may well be JSON."""
    if isinstance(error, RecursionError):
        return 'nested too deep; expected an object such as {"text": ..., "label": ...}'
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    return str(error) if isinstance(error, RowError) else f"not JSON ({error})"  # a number of too many digits


def as_object(value: Any) -> Mapping[str, Any] | str:
    if isinstance(value, dict):
        return value
    return f'expected a JSON object such as {{"text": ..., "label": ...}}, found {type(value).__name__}'
