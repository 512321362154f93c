"""Words as a model reads them: the sub-tokens of a text in windows, and what of a row falls into each."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from kdlora.data.logit_table import as_lists, as_offsets
from kdlora.data.spool import make_dataset, read_column, slice_rows, spool
from kdlora.data.tags import NO_TAG, Integers, split_words
from kdlora.data.windows import WindowSettings, hide_symbols, read_windows
from kdlora.errors import ModelError

WORDS = ("starts", "ends")
"""The columns of the words of each text, as places of characters."""
GIVEN = "given"
READ = {"windows": pa.list_(pa.int32()), "places": pa.list_(pa.int32())}
"""Of a tokenised row: the tokens of each window, and the place of each word among the tokens of all; -1: not seen."""


def word_columns(dataset: Dataset) -> list[str]:
    """Name the columns that say where the words of a text are; none where examples are texts as a whole."""
    return [name for name in WORDS if name in dataset.column_names]


def word_offsets(dataset: Dataset) -> Integers | None:
    """Say where each row's words begin in a flat list of all words; None where examples are texts as a whole."""
    name = next((name for name in ("starts", "places") if name in dataset.column_names), None)
    if name is None:
        return None
    return as_offsets(pc.list_value_length(read_column(dataset, name)).to_numpy())


def window_counts(dataset: Dataset) -> Integers | None:
    """Count the windows of each tokenised text; None where texts are cut, or words have labels."""
    if "windows" not in dataset.column_names or "places" in dataset.column_names:
        return None
    return pc.list_value_length(read_column(dataset, "windows")).to_numpy().astype(np.int64)


def cut_words(rows: Dataset) -> Dataset:
    """Cut the words of a file where `split_words` does, as where it is served; `given` marks where they begin."""
    batches = (_cut_slice(part) for part in slice_rows(rows, rows.column_names, rows=1000))
    table = spool(batches, "the words of the training rows")
    if pc.all(pc.list_flatten(table[GIVEN])).as_py():
        return rows
    return make_dataset(table, Features(Features.from_arrow_schema(table.schema) | rows.features))


def _cut_slice(rows: pa.Table) -> pa.RecordBatch:
    starts, ends, parts, sizes = list[int](), list[int](), list[int](), [0]
    for text, *words in zip(*(rows[name].to_pylist() for name in ("text", *WORDS)), strict=True):
        first, after = split_words(text)
        for start, end in zip(*words, strict=True):
            low = bisect_right(after, start)
            high = max(low + 1, bisect_left(first, end))
            starts += [start, *first[low + 1 : high]]
            ends += [*after[low : high - 1], end]
            parts.append(high - low)
        sizes.append(len(starts))
    given = np.zeros(len(starts), bool)
    given[np.cumsum(parts) - parts] = True
    flat = {"starts": pa.array(starts, pa.int32()), "ends": pa.array(ends, pa.int32()), GIVEN: pa.array(given)}
    if "label" in rows.column_names:
        tags = np.repeat(pc.list_flatten(rows["label"]).to_numpy(), parts)
        flat["label"] = pa.array(tags + (~given & (tags > 0) & (tags % 2 == 1)))  # after B- comes I-
    columns = {name: rows[name].combine_chunks() for name in rows.column_names}
    return pa.RecordBatch.from_pydict(columns | {name: as_lists(part, np.array(sizes)) for name, part in flat.items()})


def words_seen(dataset: Dataset) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.list_flatten(read_column(dataset, "places")).to_numpy() >= 0)


def words_joined(dataset: Dataset) -> Integers:
    """Number the words of tokenised rows whose first sub-token is that of the word before, as often in Chinese."""
    column = read_column(dataset, "places")
    places, rows = pc.list_flatten(column).to_numpy(), pc.list_parent_indices(column).to_numpy()
    seen = np.flatnonzero(places >= 0)
    return seen[1:][(np.diff(places[seen]) == 0) & (np.diff(rows[seen]) == 0) & (np.diff(seen) == 1)]


def encode_windows(
    rows: Mapping[str, list[Any]], tokenizer: Any, limit: int, settings: WindowSettings | None = None
) -> dict[str, list[Any]]:
    """Turn texts into token ids, window after window; where they have words, find these in them."""
    has_words = "starts" in rows
    if has_words and not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} does not say which characters a token stands for, so words "
            "cannot be found in it; choose a model with a tokenizer.json"
        )
    more = {"return_offsets_mapping": has_words, "return_special_tokens_mask": True}
    encoded = tokenizer(rows["text"], truncation=False, verbose=False, return_attention_mask=False, **more)
    names = [name for name in tokenizer.model_input_names if name in encoded and name != "attention_mask"]
    of_words = ["places"] if has_words else []
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "windows", *of_words, "length", "truncated")}
    for row, mask in enumerate(encoded["special_tokens_mask"]):
        if has_words:
            found = read_windows(encoded["offset_mapping"][row], mask, rows["starts"][row], rows["ends"][row], limit)
            tokens = encoded["input_ids"][row]
            hide_symbols(rows["text"][row], rows["starts"][row], found, tokens, tokenizer.backend_tokenizer)
            windows, is_cut = found.tokens, False
            begins = np.cumsum([0, *map(len, windows)])
            columns["places"].append(np.where(found.place < 0, -1, found.place + begins[found.window]))
        else:
            windows, is_cut = (settings or WindowSettings()).cut(mask, limit)
        chosen = np.concatenate(windows)
        for name in names:
            columns[name].append(np.asarray(encoded[name][row])[chosen])
        for name, value in (("windows", list(map(len, windows))), ("length", len(chosen)), ("truncated", is_cut)):
            columns[name].append(value)
    return columns


def split_windows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the windows of a tokenised row: what a model reads."""
    stops = np.cumsum(row["windows"])
    names = [name for name in ("input_ids", "token_type_ids") if name in row]
    return [
        {name: row[name][stop - size : stop] for name in names}
        for stop, size in zip(stops.tolist(), row["windows"], strict=True)
    ]


def split_row(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the windows of a tokenised row, each with the words that are read in it, their labels and logits."""
    places, stops = np.asarray(row["places"], np.int64), np.cumsum(row["windows"])
    windows = np.searchsorted(stops, places, side="right")
    of_words: dict[str, npt.NDArray[Any]] = {"places": places}
    if "label" in row:
        of_words["label"] = np.asarray(row["label"], np.int64)
    if "teacher_logits" in row:
        of_words["teacher_logits"] = np.asarray(row["teacher_logits"], np.float32).reshape(len(places), -1)
    begins = (stops - row["windows"]).tolist()
    for number, (begin, part) in enumerate(zip(begins, split_windows(row), strict=True)):
        read = (windows == number) & (places >= 0)
        part |= {name: values[read] for name, values in of_words.items()}
        yield part | {"places": part["places"] - begin}


def join_words(rows: Sequence[Mapping[str, Any]], width: int) -> dict[str, npt.NDArray[Any]]:
    """Give the words of a batch of windows that count: their places among all its tokens, labels and logits.

    With a teacher these are the words that it saw, and whether they have a label of their own; else those that have.
    Of words that share their first sub-token only the first one counts.
    """
    found = {"words": np.concatenate([number * width + row["places"] for number, row in enumerate(rows)])}
    if "label" not in rows[0]:
        return found
    found["labels"] = np.concatenate([row["label"] for row in rows])
    counts = found["labels"] != NO_TAG
    if "teacher_logits" in rows[0]:
        found["labelled"] = counts
        found["teacher_logits"] = np.concatenate([row["teacher_logits"] for row in rows])
        counts = np.isfinite(found["teacher_logits"]).all(axis=1)
    counts &= np.diff(found["words"], prepend=-1) != 0
    return {name: values[counts] for name, values in found.items()}
