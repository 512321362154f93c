"""Lines of a stream, none longer than a limit: a stream without a line break must not fill the memory."""

from __future__ import annotations

from typing import TextIO

MOST_CHARACTERS = 64 << 20
_CHUNK = 1 << 20


class LongLineError(ValueError):
    """A line beyond the limit; the lines after it can still be read."""


class Lines:
    """Iterates over the lines of a stream; in place of one beyond the limit it raises `LongLineError`, and goes on."""

    def __init__(self, stream: TextIO) -> None:
        """Take an open stream."""
        self._stream = stream
        self._number = 0

    def __iter__(self) -> Lines:
        """Give itself: an iterator that goes on after an error, which a generator cannot."""
        return self

    def __next__(self) -> str:
        """Read a line."""
        line = self._stream.readline(MOST_CHARACTERS + 1)
        if not line:
            raise StopIteration
        self._number += 1
        if len(line) <= MOST_CHARACTERS or line.endswith(("\n", "\r")):
            return line
        while (rest := self._stream.readline(_CHUNK)) and not rest.endswith(("\n", "\r")):
            pass
        raise LongLineError(f"line {self._number} is longer than {MOST_CHARACTERS:,} characters")
