"""The faults that a user can mend; every message says what was expected, what came, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KdLoraError(Exception):
    """Base of every error that kdlora raises on purpose; the command line prints it without a traceback."""


class ConfigError(KdLoraError):
    """A configuration that cannot be carried out as it is written."""


class DataError(KdLoraError):
    """A data file, column, row or label that does not fit the task."""


class ModelError(KdLoraError):
    """A model folder, label space or adapter target that does not fit the task."""


class ArtifactError(KdLoraError):
    """A stored result (logits, record, checkpoint, export) that is stale, foreign or damaged."""


def first_line(fault: BaseException) -> str:
    """Give the first line of what a library says, to be quoted in a message of ours.

    Args:
        fault: the library's own.

    Returns:
        The line; the name of the exception where it says nothing.
    """
    return next(iter(str(fault).strip().splitlines()), type(fault).__name__)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Suggest the nearest known name.

    Args:
        name: what the user wrote.
        candidates: the names that exist.

    Returns:
        `" Did you mean 'x'?"` with the closest candidate, or an empty string where none is close.
    """
    folded = {candidate.casefold(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f" Did you mean {folded[matches[0]]!r}?" if matches else ""
