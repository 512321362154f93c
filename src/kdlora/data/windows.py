"""Long texts in overlapping windows of tokens, and where in them a model reads each word. Light: NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

OVERLAP = 4
"""Neighbouring windows share at least one of so many of their tokens."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """The inputs that a model reads in place of one text, and the place of each word in them.

    Attributes:
        tokens: for each window the numbers of its tokens in the encoded text, special tokens at both ends.
        window: for each word its window; these never fall, so that words in the order of the windows are in that of
            the text. A word that cannot be seen is in the window of the word before it.
        place: for each word the place of its first sub-token in that window; -1 where it has no sub-token.
    """

    tokens: list[Ints]
    window: Ints
    place: Ints


def read_windows(offsets: npt.ArrayLike, special: npt.ArrayLike, starts: Any, ends: Any, max_length: int) -> Windows:
    """Cut an encoded text into windows of at most `max_length` tokens, and find its words in them.

    A word is read in the window in which its first sub-token is farthest from an edge; begin and end of the text are
    no edges. `offsets` (tokens, 2) and `special` are what a tokenizer says of the whole text, which it encodes with its
    special tokens; `starts` and `ends` are the words' places in the text's characters.
    """
    is_special = np.asarray(special, np.bool_)
    own = np.flatnonzero(~is_special)
    lead, trail = (int(own[0]), len(is_special) - 1 - int(own[-1])) if len(own) else (len(is_special), 0)
    count, room = len(is_special) - lead - trail, max(1, max_length - lead - trail)
    first = _first_tokens(np.asarray(offsets, np.int64).reshape(-1, 2)[lead : lead + count], starts, ends)
    outer = np.arange(len(is_special))
    if count <= room:  # as nearly every text
        return Windows([outer], np.zeros(len(first), np.int64), np.where(first < 0, -1, first + lead))
    begins = _window_starts(count, room)
    tokens = [np.r_[outer[:lead], lead + np.arange(a, min(a + room, count)), outer[lead + count :]] for a in begins]
    middles = (begins[1:] + begins[:-1] + room - 1) / 2  # from there on the next window's edge is farther
    window = np.maximum.accumulate(np.where(first < 0, 0, np.searchsorted(middles, first)))
    return Windows(tokens, window, np.where(first < 0, -1, first - begins[window] + lead))


def _window_starts(tokens: int, room: int) -> Ints:
    """Give the first token of each window; the last one ends with the text."""
    step = room - room // OVERLAP
    starts = np.arange(0, max(1, tokens - room + step), step)
    starts[-1] = max(0, min(starts[-1], tokens - room))
    return starts


def _first_tokens(offsets: Ints, starts: Any, ends: Any) -> Ints:
    """Give each word's first sub-token, or -1: a tokenizer may drop characters."""
    some = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    begin, end = offsets[some, 0], np.maximum.accumulate(offsets[some, 1])
    found = np.searchsorted(end, np.asarray(starts, np.int64), side="right")
    inside = found < len(some)
    seen = inside & (begin[np.minimum(found, len(some) - 1)] < np.asarray(ends)) if len(some) else inside
    return np.where(seen, some[np.minimum(found, len(some) - 1)], -1) if len(some) else np.full(len(found), -1)
