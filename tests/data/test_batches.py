"""Tokens in batches, windows over long texts, and where a word is read in them."""

import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from kdlora.data import batches
from kdlora.data.batches import (
    Collator,
    LengthBucketSampler,
    SharedSampler,
    count_tokens,
    encode_texts,
    length_sorted_batches,
    tokenise,
)
from kdlora.data.windows import MOST_WINDOWS, Windows, WindowSettings, hide_symbols, read_windows

TEXTS = ["a good film", "bad", "a long and rather dull film that nobody should have to see twice " * 3, "fine"]

lengths_of = st.lists(st.integers(1, 512), min_size=1, max_size=400)


def dataset(**columns) -> Dataset:
    ids = [str(row) for row in range(len(TEXTS))]
    return Dataset.from_dict({"id": ids, "text": TEXTS, **columns})


def test_tokens_are_the_tokenizers_own_and_what_is_cut_is_counted(tiny_tokenizer):
    """Other token ids make a student that is served something else; without its logits, distillation is training."""
    carried = {"label": [0, 1, 0, 1], "group": ["matched"] * 4, "teacher_logits": [[0.5, -0.5]] * 4}
    data = tokenise(dataset(**carried), tiny_tokenizer, 16)
    expected = tiny_tokenizer(TEXTS, truncation=True, max_length=16)
    assert data.dataset["input_ids"][:] == expected["input_ids"]
    assert data.dataset["token_type_ids"][:] == expected["token_type_ids"]
    assert data.dataset["length"][:] == [len(ids) for ids in expected["input_ids"]]
    assert data.dataset.select_columns(list(carried))[:] == carried
    assert (data.truncated, data.max_length) == (1, 16)
    assert tokenise(dataset().select([3, 1]), tiny_tokenizer, 16).dataset["id"][:] == ["3", "1"]

    # A count that is wrong at the limit hides a loss; a limit above the model's positions fails in mid-training.
    rows = dataset().select([0, 1])
    longest = len(tiny_tokenizer(TEXTS[0])["input_ids"])
    assert [tokenise(rows, tiny_tokenizer, limit).truncated for limit in (longest, longest - 1)] == [0, 1]
    data = tokenise(dataset(), tiny_tokenizer, 10_000)
    assert data.max_length == tiny_tokenizer.model_max_length == max(data.dataset["length"])
    assert data.truncated == 1

    # Cutting only the second text can remove a whole hypothesis.
    pairs = list(reversed(TEXTS))
    data = tokenise(dataset(text_pair=pairs), tiny_tokenizer, 20)
    expected = tiny_tokenizer(TEXTS, pairs, truncation="longest_first", max_length=20)
    assert data.dataset["input_ids"][:] == expected["input_ids"]
    assert data.dataset["token_type_ids"][:] == expected["token_type_ids"]
    assert max(data.dataset["length"]) == 20
    untouched = tiny_tokenizer(TEXTS, pairs)["input_ids"]
    assert data.truncated == sum(len(ids) > 20 for ids in untouched) == 2


def test_whole_texts_are_counted_a_few_at_a_time(tiny_tokenizer, monkeypatch):
    """All texts at once took 12 GB for 5,000 long documents, before anything was trained."""
    sizes = []

    def encode(rows, *others):
        sizes.append(len(rows["text"]))
        return encode_texts(rows, *others)

    monkeypatch.setattr(batches, "encode_texts", encode)
    texts = [*TEXTS, "a film 雪"] * 21
    lengths, unknown = count_tokens({"text": texts}, tiny_tokenizer)
    whole = tiny_tokenizer(texts)["input_ids"]
    assert lengths.tolist() == list(map(len, whole))
    assert unknown == 21 / sum(len(ids) - 2 for ids in whole)  # each has two special tokens
    assert sum(sizes) == 105
    assert max(sizes) <= 50


@given(lengths=lengths_of, batch_size=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
def test_every_row_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    """A row that is left out is never learnt; one drawn twice weighs double. Both leave the loss curve looking fine."""
    sampler = LengthBucketSampler(lengths, batch_size, seed=seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler) == -(-len(lengths) // batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    twin = LengthBucketSampler(np.array(lengths), batch_size, seed=seed)
    twin.set_epoch(epoch)
    assert list(twin) == batches


@pytest.mark.parametrize("rows", [7, 10, 40])
def test_what_is_drawn_beside_comes_again_when_all_have_come(rows: int) -> None:
    """Of 15 copies of each text a student saw 64% in 15 epochs, and some of them five times.

    Copies that take the place of labelled rows taught a student less than its control knew.
    """
    lengths = np.random.default_rng(0).integers(4, 30, 10 + rows)
    sampler, seen = LengthBucketSampler(lengths, 4, seed=1, rows_per_epoch=10, beside=rows), []
    for epoch in (3, 0, 1, 2):  # a resumed epoch draws what it would have drawn
        sampler.set_epoch(epoch)
        drawn = [row for batch in sampler for row in batch]
        assert [len(batch) for batch in sampler] == list(map(sampler.rows_of, range(3))) == [8, 8, 4]
        assert sorted(row for row in drawn if row < 10) == list(range(10))
        seen += [row for row in drawn if row >= 10]
    counts = np.bincount(seen, minlength=10 + rows)[10:]
    assert (counts.sum(), np.ptp(counts) <= 1) == (40, True)


@given(lengths_of, st.integers(1, 33), st.integers(2, 5))
def test_processes_deal_a_batch_out(lengths: list[int], batch_size: int, count: int) -> None:
    """A row that two processes train on counts twice; one that none has is never learnt."""
    whole = LengthBucketSampler(lengths, batch_size, seed=1)
    parts = [list(SharedSampler(whole, rank, count)) for rank in range(count)]
    for place, batch in enumerate(whole):
        assert whole.rows_of(place) == len(batch)
        dealt = [part[place] for part in parts]
        assert sorted(row for rows in dealt[: len(batch)] for row in rows) == sorted(batch)
        assert all(rows == batch[:1] for rows in dealt[len(batch) :])  # spare, and told by their place


def test_buckets_save_padding_and_mix() -> None:
    """Buckets that do not bucket cost half the speed; batches in order of length bias every epoch."""
    lengths = np.random.default_rng(0).integers(4, 128, 5000)
    batches = list(LengthBucketSampler(lengths, 32, seed=0))
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded / lengths.sum() < 1.1
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


@given(lengths=lengths_of | st.just([]), batch_tokens=st.integers(1, 5000), multiple=st.sampled_from([2, 8]))
def test_sorted_batches(lengths: list[int], batch_tokens: int, multiple: int) -> None:
    """A batch above its budget runs out of memory on the longest texts, hours into labelling."""
    batches = length_sorted_batches(lengths, batch_tokens, multiple)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    widths = [max(-(-lengths[row] // multiple) * multiple for row in batch) for batch in batches]
    assert all(
        width * len(batch) <= batch_tokens or len(batch) == 1 for width, batch in zip(widths, batches, strict=True)
    )
    assert widths == sorted(widths, reverse=True)


def test_no_row_is_padded_beyond_the_positions_of_a_model():
    """Rounding 509 up to 512 indexes past the position table of a model with 510 positions."""
    collator = Collator(pad_token_id=0, max_length=510)
    for length, width in ((509, 510), (500, 504), (515, 515)):
        assert collator([{"input_ids": [5] * length}])["input_ids"].shape == (1, width)


@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 8, 9, 13, 14, 15, 40, 101])
@pytest.mark.parametrize("max_length", [3, 8, 9, 16])
def test_each_word_is_read_where_its_token_is_farthest_from_an_edge(tokens: int, max_length: int) -> None:
    """Silent failure: a word at the edge of a window is read there, without the words that follow it."""
    words, room = np.arange(tokens), max_length - 2
    offsets = [(0, 0), *((word, word + 1) for word in range(tokens)), (0, 0)]  # words of one character and one token
    found = read_windows(offsets, [1, *[0] * tokens, 1], words, words + 1, max_length)
    assert all(len(window) <= max_length and window[0] == 0 and window[-1] == tokens + 1 for window in found.tokens)
    assert (np.diff(found.window) >= 0).all()
    for word, (window, place) in enumerate(zip(found.window, found.place, strict=True)):
        assert found.tokens[window][place] == word + 1

    def distances(part: np.ndarray) -> np.ndarray:
        inner = part[1:-1] - 1
        left = words - inner[0] if inner[0] > 0 else np.inf
        right = inner[-1] - words if inner[-1] < tokens - 1 else np.inf
        return np.where(np.isin(words, inner), np.minimum(left, right), -1)

    if tokens:
        every = np.stack([distances(part) for part in found.tokens])
        assert (every[found.window, words] == every.max(axis=0)).all()
    for before, after in pairwise(found.tokens):
        assert len(np.intersect1d(before[1:-1], after[1:-1])) >= room // 4
    assert len(found.tokens) == 1 or all(len(window) == max_length for window in found.tokens)


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


def test_a_symbol_is_hidden_in_an_unknown_token_alone():
    """BERT knows `°c`: hidden there, the degree sign cut each "30 °C" in two."""
    tokenizer = SimpleNamespace(token_to_id={"[UNK]": 1}.get)
    for known, places in ((7, [1, 2, 2]), (1, [1, -1, 2])):
        read = Windows([np.arange(4)], np.zeros(3, np.int64), np.array([1, 2, 2]))
        hide_symbols("30 °C", [0, 3, 4], read, [0, 5, known, 0], tokenizer)
        assert read.place.tolist() == places
    # In Chinese nearly every word shares its token: with a look at all tokens for each, a long text took hours.
    count = 100_000
    read = Windows([np.arange(count // 2)], np.zeros(count, np.int64), np.repeat(np.arange(count // 2), 2))
    began = time.process_time()
    hide_symbols("♥北" * (count // 2), range(count), read, [1] * (count // 2), tokenizer)
    assert time.process_time() - began < 10
    assert (read.place < 0).sum() == count // 2
