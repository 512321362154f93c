"""Long texts in overlapping windows of tokens: where in them a word is read, how their logits become one row.

Light: NumPy alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from kdlora.errors import ConfigError

OVERLAP = 4
"""Neighbouring windows share at least one of so many of their tokens."""
MOST_WINDOWS = 64
"""Of a text that has one label: all of them are in memory at once when it teaches. What comes after them is cut."""

Ints = npt.NDArray[np.int64]
Pool = Literal["mean", "max"]


@dataclass(frozen=True)
class WindowSettings:
    """How a text with one label is read that is longer than a model takes: in windows, whose logits are pooled."""

    stride: int | None = None  # tokens that neighbours share; None: a quarter of a window's
    pool: Pool = "mean"

    def cut(self, special: npt.ArrayLike, max_length: int) -> tuple[list[Ints], bool]:
        """Give the tokens of each window of an encoded text, and say whether more are left; see `read_windows`."""
        frame = _Frame(special, max_length)
        if (stride := frame.room // OVERLAP if self.stride is None else self.stride) >= frame.room:
            raise ConfigError(
                f"data.window_stride is {stride}, but a window of max_length {max_length} holds {frame.room} tokens of "
                f"a text: set it to {frame.room - 1} at most, or a greater max_length"
            )
        begins = frame.begins(stride)
        return frame.windows(begins[:MOST_WINDOWS]), len(begins) > MOST_WINDOWS

    def count_tokens(self, lengths: npt.ArrayLike, max_length: int) -> npt.NDArray[np.float64]:
        """Estimate how many tokens a model reads of texts of these lengths, special tokens aside."""
        stride = max_length // OVERLAP if self.stride is None else self.stride
        more = np.ceil(np.maximum(0, np.asarray(lengths) - max_length) / max(1, max_length - stride))
        return np.where(more == 0, lengths, max_length * np.minimum(1 + more, MOST_WINDOWS))

    def pool_logits(self, logits: npt.NDArray[np.float32], counts: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Make one row of the rows of each text's windows, of which there are so many."""
        numbers = np.asarray(counts, np.int64)
        starts = np.cumsum(numbers) - numbers
        if not len(starts):
            return logits
        if self.pool == "max":
            return np.maximum.reduceat(logits, starts, axis=0)
        return np.asarray(np.add.reduceat(logits, starts, axis=0) / numbers[:, None], np.float32)


def tokens_read(lengths: npt.NDArray[Any], max_length: int, windows: WindowSettings | None) -> npt.NDArray[Any]:
    return np.minimum(lengths, max_length) if windows is None else windows.count_tokens(lengths, max_length)


def is_window_settings(values: Any) -> bool:
    """Say whether a file has settings of windows where it should, or none."""
    if values is None:
        return True
    if not isinstance(values, Mapping) or values.keys() != {"stride", "pool"} or values["pool"] not in get_args(Pool):
        return False
    stride = values["stride"]
    return stride is None or (isinstance(stride, int) and not isinstance(stride, bool) and stride >= 0)


class Windows(NamedTuple):
    """The inputs that a model reads in place of one text, and the place of each word in them."""

    tokens: list[Ints]  # of each window: numbers of tokens of the encoded text, special tokens at both ends
    window: Ints  # of each word, never falling; a word that cannot be seen is in that of the word before it
    place: Ints  # of each word's first sub-token in that window; -1: none


def read_windows(offsets: npt.ArrayLike, special: npt.ArrayLike, starts: Any, ends: Any, max_length: int) -> Windows:
    """Cut an encoded text into windows, and read each word where its first sub-token is farthest from an edge.

    Begin and end of the text are no edges. `offsets` (tokens, 2) and `special` are what a tokenizer says of the text.
    """
    frame = _Frame(special, max_length)
    first = _first_tokens(np.asarray(offsets, np.int64).reshape(-1, 2)[frame.lead : frame.end], starts, ends)
    begins = frame.begins(frame.room // OVERLAP)
    middles = (begins[1:] + begins[:-1] + frame.room - 1) / 2  # from there on the next window's edge is farther
    window = np.maximum.accumulate(np.where(first < 0, 0, np.searchsorted(middles, first)))
    return Windows(frame.windows(begins), window, np.where(first < 0, -1, first - begins[window] + frame.lead))


def hide_symbols(text: str, starts: Sequence[int], read: Windows, tokens: Sequence[int], tokenizer: Any) -> None:
    """Let symbols that share the unknown token with a word go unseen (-1): BERT reads `Anna♥` as one `[UNK]`."""
    names = ("[UNK]", "<unk>")
    unknown = [place for name in names if (place := tokenizer.token_to_id(name)) is not None]
    same = (np.diff(read.place) == 0) & (np.diff(read.window) == 0)
    shared = (np.append(same, False) | np.append(False, same)) & (read.place >= 0)
    signs = {"Sk", "Sm", "So"}
    for word in np.flatnonzero(shared).tolist():
        is_symbol = not (sign := text[starts[word]]).isascii() and unicodedata.category(sign) in signs
        if is_symbol and tokens[read.tokens[read.window[word]][read.place[word]]] in unknown:
            read.place[word] = -1


class _Frame:
    """The tokens of an encoded text: special ones, `count` of its own, special ones; a window holds `room` of these."""

    def __init__(self, special: npt.ArrayLike, max_length: int) -> None:
        self.size, own = np.size(special), np.flatnonzero(~np.asarray(special, np.bool_))
        self.lead, self.end = (int(own[0]), int(own[-1]) + 1) if len(own) else (self.size, self.size)
        self.count = self.end - self.lead
        self.room = max(1, max_length - self.size + self.count)

    def begins(self, stride: int) -> Ints:
        """Give the first token of each window, of which neighbours share so many; the last one ends with the text."""
        step = self.room - stride
        starts = np.arange(0, max(1, self.count - stride), step)
        starts[-1] = max(0, min(starts[-1], self.count - self.room))
        return starts

    def windows(self, begins: Ints) -> list[Ints]:
        """Give the tokens of windows by the first one of each, with the special ones at both ends."""
        lead, own, trail = np.split(np.arange(self.size), [self.lead, self.end])
        return [np.concatenate((lead, own[begin : begin + self.room], trail)) for begin in begins]


def _first_tokens(offsets: Ints, starts: Any, ends: Any) -> Ints:
    """Give each word's first sub-token, or -1: a tokenizer may drop characters."""
    some = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    found = np.searchsorted(np.maximum.accumulate(offsets[some, 1]), np.asarray(starts, np.int64), side="right")
    tokens, begins = np.append(some, -1), np.append(offsets[some, 0], 0)  # behind the last one there is none
    return np.where(begins[found] < np.asarray(ends), tokens[found], -1)
