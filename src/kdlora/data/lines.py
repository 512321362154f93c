"""Lines of a stream, none longer than a limit, and the JSON in them; light, since a served model reads with it, too."""

from __future__ import annotations

import json
from typing import Any, TextIO

MOST_CHARACTERS = 64 << 20
_CHUNK = 1 << 20


class LongLineError(ValueError):
    """A line beyond the limit: a stream without a line break must not fill the memory. Those after it can be read."""


class Lines:
    """Iterates over the lines of a stream; in place of one beyond the limit it raises `LongLineError`, and goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._number = 0
        self._ahead: str | None = None

    def __iter__(self) -> Lines:
        """Give itself: an iterator that goes on after an error, which a generator cannot."""
        return self

    def __next__(self) -> str:
        line, self._ahead = self._ahead, None
        if line is not None:
            return line
        line = self._stream.readline(MOST_CHARACTERS + 1)
        if not line:
            raise StopIteration
        self._number += 1
        if len(line) <= MOST_CHARACTERS or line.endswith(("\n", "\r")):
            return line
        while (rest := self._stream.readline(_CHUNK)) and not rest.endswith(("\n", "\r")):
            pass
        raise LongLineError(f"line {self._number} is longer than {MOST_CHARACTERS:,} characters")

    def put_back(self, line: str) -> None:
        """Give this line once more."""
        self._ahead = line


def choose_delimiter(header: str) -> str:
    """Choose what separates the columns of a CSV file by its header line."""
    return next((mark for mark in ",\t;" if mark in header), ",")


def read_object(line: str) -> dict[str, Any]:
    """Read one JSON object; what is wrong with it is a ValueError."""
    try:
        value = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(json_fault(error)) from None
    return as_object(value)


def as_object(value: object) -> dict[str, Any]:
    """Refuse what is no JSON object."""
    if not isinstance(value, dict):
        found = type(value).__name__
        raise ValueError(f'expected a JSON object such as {{"text": ..., "label": ...}}, found {found}')  # noqa: TRY004
    return value


def json_fault(error: Exception) -> str:
    """Say why Python's reader gives up on what may well be JSON."""
    if isinstance(error, RecursionError):
        return 'nested too deep; expected an object such as {"text": ..., "label": ...}'
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    return f"not JSON ({error})"
