"""Windows over long texts, and where a word is read in them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kdlora.data.windows import MOST_WINDOWS, Windows, WindowSettings, is_window_settings, read_windows
from kdlora.errors import ConfigError


def _read(tokens: int, max_length: int, *, width: int = 1) -> Windows:
    """Read a text of words of one character, each `width` sub-tokens, with a special token at both ends."""
    words = np.arange(tokens // width)
    starts = np.repeat(words, width)
    offsets = [(0, 0), *zip(starts.tolist(), (starts + 1).tolist(), strict=True), (0, 0)]
    special = [1, *[0] * len(starts), 1]
    return read_windows(offsets, special, words, words + 1, max_length)


@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 8, 9, 13, 14, 15, 40, 101])
@pytest.mark.parametrize("max_length", [3, 8, 9, 16])
def test_each_word_is_read_where_its_token_is_farthest_from_an_edge(tokens: int, max_length: int) -> None:
    """Silent failure: a word at the edge of a window is read there, without the words that follow it."""
    found = _read(tokens, max_length)
    room = max_length - 2
    assert all(len(window) <= max_length and window[0] == 0 and window[-1] == tokens + 1 for window in found.tokens)
    assert (np.diff(found.window) >= 0).all()
    for word, (window, place) in enumerate(zip(found.window, found.place, strict=True)):
        assert found.tokens[window][place] == word + 1

        def distance(part: np.ndarray, word: int = word) -> float:
            inner = part[1:-1] - 1
            if word not in inner:
                return -1
            left = np.inf if inner[0] == 0 else word - inner[0]
            right = np.inf if inner[-1] == tokens - 1 else inner[-1] - word
            return float(min(left, right))

        assert distance(found.tokens[window]) == max(map(distance, found.tokens))
    for before, after in zip(found.tokens, found.tokens[1:], strict=False):
        assert len(np.intersect1d(before[1:-1], after[1:-1])) >= room // 4
    assert len(found.tokens) == 1 or all(len(window) == max_length for window in found.tokens)


def test_a_word_is_read_by_its_first_sub_token_and_one_without_any_is_not_read() -> None:
    """Silent failure: a word whose characters the tokenizer drops gets the logits of its neighbour."""
    assert _read(12, 100, width=3).place.tolist() == [1, 4, 7, 10]
    offsets = [(0, 0), (0, 2), (2, 3), (5, 5), (6, 9), (0, 0)]  # "abc \x00 def", and a token of no character
    found = read_windows(offsets, [1, 0, 0, 0, 0, 1], [0, 4, 6], [3, 5, 9], 100)
    assert found.place.tolist() == [1, -1, 4]
    assert found.window.tolist() == [0, 0, 0]


def test_tokens_with_the_space_before_them_and_several_of_one_character_find_their_words() -> None:
    """Silent failure: tokenizers of bytes, whose offsets take in the space before a word, shift every word by one."""
    offsets = [(0, 1), (1, 4), (4, 6), (4, 6), (6, 8)]  # "a bcd 👍 e", untrimmed, the emoji in two tokens
    assert read_windows(offsets, [0] * 5, [0, 2, 5, 7], [1, 4, 6, 8], 4).place.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("stride", [None, 0, 3, 5])
@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 8, 9, 40])
def test_every_token_of_a_text_is_in_a_window_and_neighbours_share_the_stride(tokens: int, stride: int | None) -> None:
    """Silent failure: the end of a text, or what lies between two windows, is never read."""
    special = [1, *[0] * tokens, 1]
    found, is_cut = WindowSettings(stride).cut(special, 8)
    assert not is_cut
    assert set(np.concatenate(found).tolist()) == set(range(tokens + 2))
    assert all(part[0] == 0 and part[-1] == tokens + 1 for part in found)
    shared = [len(np.intersect1d(before[1:-1], after[1:-1])) for before, after in pairwise(found)]
    wanted = 1 if stride is None else stride
    assert shared[:-1] == [wanted] * (len(found) - 2)
    assert shared[-1:] >= [wanted] * (len(found) > 1)
    if len(found) > 1:
        assert all(len(part) == 8 for part in found)


def test_what_lies_beyond_the_most_windows_is_cut_and_told() -> None:
    """Silent failure: a book among the training texts fills the memory, or its end is dropped without a word."""
    windows = WindowSettings(0)
    for tokens, expected in ((6 * MOST_WINDOWS, False), (6 * MOST_WINDOWS + 1, True)):
        found, is_cut = windows.cut([1, *[0] * tokens, 1], 8)
        assert (len(found), is_cut) == (MOST_WINDOWS, expected)
        assert windows.count_tokens([tokens], 6).tolist() == [6 * MOST_WINDOWS]  # an estimate leaves special ones out


def test_logits_of_windows_are_pooled_text_by_text() -> None:
    """Silent failure: a text of one window gets other logits than without windows, or those of its neighbour."""
    logits = np.array([[1, 5], [2, 0], [4, 1], [0, 2]], np.float32)
    counts = [1, 2, 1]
    assert WindowSettings(pool="mean").pool_logits(logits, counts).tolist() == [[1, 5], [3, 0.5], [0, 2]]
    assert WindowSettings(pool="max").pool_logits(logits, counts).tolist() == [[1, 5], [4, 1], [0, 2]]
    assert WindowSettings().pool_logits(logits[:0], []).shape == (0, 2)


def test_settings_that_no_windows_can_have_are_refused() -> None:
    """Silent failure: windows that never move on, and a file's nonsense that is read as a mean."""
    with pytest.raises(ConfigError, match=r"data.window_stride is 6, .* holds 6 tokens .* set it to 5 at most"):
        WindowSettings(6).cut([1, 0, 1], 8)
    right = {"stride": None, "pool": "max"}
    assert is_window_settings(None)
    assert is_window_settings(right)
    wrong = [{"stride": -1}, {"stride": True}, {"stride": 1.5}, {"pool": "min"}, {"pool": ["max"]}, {"more": 1}]
    assert not any(is_window_settings(right | change) for change in wrong)
    assert not is_window_settings(["max"])
