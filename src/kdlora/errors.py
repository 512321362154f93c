"""The faults that a user can mend; every message says what was expected, what came, where, and what to do."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Iterable
from typing import TextIO

MOST_LISTED = 10
"""Names that a message lists."""
_USER = re.compile(r"(\w://)(?:[^\s/@:]*:\S*|[^\s/@]+)@")
_KEY = re.compile(r"([?&;][\w.-]*(?:pass|secret|token|key|sig|credential)[\w.-]*=)[^\s&;'\"]+", re.IGNORECASE)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What moves the cursor, changes colours or titles, or turns the direction of the text that follows."""


def harmless(text: str) -> str:
    """Make a text fit for a terminal and a log: no passwords of URLs, no control characters but line ends and tabs."""
    masked = _KEY.sub(r"\1***", _USER.sub(r"\1***@", text))
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), masked)


def harmless_json(text: str) -> str:
    """Write the control characters that `json` leaves as they are by their numbers; the values stay the same."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the time: while bars are drawn, rich's, which prints above them."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr(level: int | str) -> None:
    logging.basicConfig(level=level, format="%(message)s", handlers=[ToStderr()])


class KdLoraError(Exception):
    """Base of every error that kdlora raises on purpose; the command line prints it without a traceback.

    Examples:
        >>> try:
        ...     load_config("configs/mrpc.yaml", ["lora.rank=0"])
        ... except KdLoraError as error:
        ...     print(type(error).__name__)
        ConfigError
    """

    def __str__(self) -> str:
        """Give the message, which may quote what strangers wrote."""
        return harmless(super().__str__())


class ConfigError(KdLoraError):
    """A configuration that cannot be carried out as it is written.

    Examples:
        >>> load_config("configs/mrpc.yaml", ["lora.rank=0"])
        Traceback (most recent call last):
            ...
        kdlora.errors.ConfigError: ...
    """


class DataError(KdLoraError):
    """A data file, column, row or label that does not fit the task.

    Examples:
        >>> Classifier.load("runs/reviews/student").predict([""])
        Traceback (most recent call last):
            ...
        kdlora.errors.DataError: text 0: the text is empty. Remove the row or give it a text.
    """


class ModelError(KdLoraError):
    """A model folder, label space or adapter target that does not fit the task.

    Examples:
        >>> Classifier.load("configs")
        Traceback (most recent call last):
            ...
        kdlora.errors.ModelError: ...
    """


class ArtifactError(KdLoraError):
    """A stored result (logits, record, checkpoint, export) that is stale, foreign or damaged.

    Examples:
        >>> make_report("configs")
        Traceback (most recent call last):
            ...
        kdlora.errors.ArtifactError: ...
    """


class StaleError(ArtifactError):
    """What an earlier call left is of another teacher, other data or other settings; it may be made anew."""


def first_line(fault: BaseException) -> str:
    """Give the first line of what a library says, to be quoted in a message of ours."""
    return next(iter(str(fault).strip().splitlines()), type(fault).__name__)


def listed(names: Iterable[str]) -> str:
    """Name the first ones, and count the others."""
    every = list(names)
    more = len(every) - MOST_LISTED
    return ", ".join(every[:MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def counted(count: int, name: str) -> str:
    """Write a number of things, one or several."""
    return f"{count:,} {name}{'s' * (count != 1)}"


def told_apart(value: float, *others: float) -> str:
    """Write a number with the digits, four at least, that tell it from 0, 1 and the others."""
    for digits in range(4, 17):
        text = f"{value:.{digits}g}"
        if float(text) not in {0.0, 1.0, *(float(f"{other:.{digits}g}") for other in others)}:
            return text
    return f"{value:.17g}"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    folded = {candidate.casefold(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f" Did you mean {folded[matches[0]]!r}?" if matches else ""
