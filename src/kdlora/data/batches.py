"""Tokens and batches: texts of like length go together, so that little is padded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from kdlora.config import Kind
from kdlora.data.spool import make_dataset, slice_rows, spool, text_columns
from kdlora.data.windows import Pool, WindowSettings
from kdlora.data.word_tokens import READ, WORDS, encode_windows, join_words, split_row, split_windows, word_columns
from kdlora.errors import ConfigError, ModelError

PAD_MULTIPLE, PAD_ON_CPU = 8, 2
"""Widths that matrix units take well. A CPU gains more by less padding."""
MICRO_BATCHES = "micro_batches"
_TOKENISE_ROWS = 1000
_COUNT_ROWS = 50  # whole texts of any length
_CHUNK_BATCHES = 50
_CARRIED = ("id", "label", "group", "teacher_logits")
INPUTS = {"input_ids": pa.list_(pa.int32()), "token_type_ids": pa.list_(pa.int8())}
"""What a model reads, as `datasets` stores it: fingerprints of token ids depend on it."""


@dataclass(frozen=True)
class Tokenised:
    """Examples as token ids without padding, those of windows one after the other, with the columns that they had."""

    # id, input_ids, token_type_ids (some tokenizers), length in tokens, label, group, teacher_logits, windows, places
    dataset: Dataset
    truncated: int  # examples that were cut
    max_length: int  # in tokens, special ones included
    pool: Pool = "mean"  # how the logits of a text's windows become one row


def tokenise(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    windows: WindowSettings | None = None,
    quiet: bool = False,
) -> Tokenised:
    """Turn texts into token ids, row by row in the same order; the result lies in a mapped temporary file."""
    limit = min(max_length, tokenizer.model_max_length)
    if windows is not None and limit < max_length:
        raise ConfigError(
            f"max_length is {max_length}, but {tokenizer.name_or_path} reads {limit} tokens at most, and "
            f"data.long_texts: windows has windows of max_length: set it to {limit} or less for this model"
        )
    carried = [name for name in dataset.column_names if name in _CARRIED]
    texts, words = text_columns(dataset), word_columns(dataset)

    def encode(part: pa.Table) -> pa.RecordBatch:
        rows = {name: part[name].to_pylist() for name in (*texts, *words)}
        if words or windows is not None:
            encoded = encode_windows(rows, tokenizer, limit, windows)
        else:
            encoded = encode_texts(rows, tokenizer, limit)
        columns = {name: part[name].combine_chunks() for name in carried}
        columns |= {name: pa.array(values, (INPUTS | READ).get(name)) for name, values in encoded.items()}
        bar.update(part.num_rows)
        return pa.RecordBatch.from_pydict(columns)

    # A bar that is neither on nor off is off in log files.
    with datasets.utils.tqdm(total=len(dataset), unit=" examples", desc="Tokenising", disable=quiet or None) as bar:
        parts = slice_rows(dataset, [*texts, *words, *carried], _TOKENISE_ROWS)
        table = spool(map(encode, parts), "the data set to tokenise")
    truncated = pc.sum(table["truncated"]).as_py()
    table = table.drop_columns("truncated")
    features = Features.from_arrow_schema(table.schema) | {name: dataset.features[name] for name in carried}
    pool = (windows or WindowSettings()).pool
    return Tokenised(make_dataset(table, Features(features)), truncated, limit, pool)


def encode_texts(rows: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
    kept = [name for name in tokenizer.model_input_names if name in INPUTS]
    # verbose=False: over-long inputs are expected here, counted, and cut below.
    encoded = tokenizer(*rows.values(), truncation=False, verbose=False, return_attention_mask=False)
    columns: dict[str, list[Any]] = {name: encoded[name] for name in kept}
    truncated = [len(tokens) > limit for tokens in columns["input_ids"]]
    if long := [row for row, is_long in enumerate(truncated) if is_long]:
        some = [[column[row] for row in long] for column in rows.values()]
        cut = tokenizer(*some, truncation="longest_first", max_length=limit, return_attention_mask=False)
        for name in kept:
            for row, tokens in zip(long, cut[name], strict=True):
                columns[name][row] = tokens
    return columns | {"length": [len(tokens) for tokens in columns["input_ids"]], "truncated": truncated}


def count_tokens(
    texts: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[npt.NDArray[np.int64], float]:
    """Count the tokens of whole texts, a few at a time, and give the share of unknown ones among those not special."""
    unknown, special = tokenizer.unk_token_id, tokenizer.all_special_ids
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None  # what stands for it in some models says something else, too
    lengths, read, missed = list[int](), 0, 0
    for start in range(0, len(next(iter(texts.values()))), _COUNT_ROWS):
        part = {name: column[start : start + _COUNT_ROWS] for name, column in texts.items()}
        encoded = encode_texts(part, tokenizer, sys.maxsize)
        tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in encoded["input_ids"]])
        lengths += encoded["length"]
        read += int((~np.isin(tokens, special)).sum())
        missed += 0 if unknown is None else int((tokens == unknown).sum())
    return np.asarray(lengths), missed / max(1, read + missed)


class LengthBucketSampler(Sampler[list[int]]):
    """Draw batches of like length in random order, which depends on lengths, seed and epoch alone.

    Rows are shuffled, cut into chunks, sorted by length within a chunk, and the batches shuffled; the short one comes
    last. An epoch of more rows than there are takes all of them again and again.
    """

    def __init__(
        self,
        lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
        batch_size: int,
        *,
        seed: int,
        rows_per_epoch: int | None = None,
        beside: int = 0,
    ) -> None:
        """Prepare epoch 0; the last `beside` rows are drawn beside the others, which doubles epoch and batch."""
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size * (2 if beside else 1)
        self.drop_last = False  # accelerate asks
        self.seed, self.epoch, self.beside = seed, 0, beside
        self.drawn = len(self.lengths) - beside if rows_per_epoch is None else rows_per_epoch
        self.rows_per_epoch = self.drawn * (2 if beside else 1)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return (self.rows_per_epoch + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng([self.seed, self.epoch])
        first = len(self.lengths) - self.beside
        passes = -(-self.drawn // max(1, first))  # each row once before any comes again
        order = np.concatenate([draw.permutation(first) for _ in range(passes)])[: self.drawn]
        if self.beside:
            order = np.concatenate([order, first + self._draw_beside()])
            draw.shuffle(order)
        full = len(order) // self.batch_size * self.batch_size
        chunk = _CHUNK_BATCHES * self.batch_size
        for start in range(0, full, chunk):
            part = order[start : min(start + chunk, full)]
            order[start : start + len(part)] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = order[:full].reshape(-1, self.batch_size)
        for batch in draw.permutation(len(batches)):
            yield batches[batch].tolist()
        if full < len(order):
            yield order[full:].tolist()

    def _draw_beside(self) -> npt.NDArray[np.int64]:
        """Go on where the epoch before stopped, so that none comes again before all have come."""
        begin = self.epoch * self.drawn
        passes = range(begin // self.beside, -(-(begin + self.drawn) // self.beside))
        orders = [np.random.default_rng([self.seed, one, 1]).permutation(self.beside) for one in passes]
        return np.concatenate(orders)[begin - passes[0] * self.beside :][: self.drawn]

    def rows_of(self, place: int) -> int:
        return min(self.batch_size, self.rows_per_epoch - place * self.batch_size)


class SharedSampler(Sampler[list[int]]):
    """The part of every batch that falls to one of several processes: rows of like lengths fall to all of them."""

    def __init__(self, whole: LengthBucketSampler, rank: int, count: int) -> None:
        self.whole, self.rank, self.count = whole, rank, count
        self.drop_last = False  # accelerate asks

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole:
            # With fewer rows than processes, some get a row that another one has, and that must not count.
            yield batch[self.rank :: self.count] or batch[:1]


def length_sorted_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]], batch_tokens: int, multiple: int = PAD_MULTIPLE
) -> list[list[int]]:
    """Form batches for inference: longest first, so that a machine too small fails at once."""
    widths = -(-np.maximum(np.asarray(lengths, dtype=np.int64), 1) // multiple) * multiple
    order = np.argsort(-widths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, batch_tokens // int(widths[order[start]]))
        batches.append(order[start : start + rows].tolist())
        start += rows
    return batches


@dataclass
class Collator:
    """Pad rows to one width, on the right, and make tensors of them; rows of tokens are windows from `split_row`.

    A text of several windows has as many rows among the inputs; `texts` then says which text each of them is of.
    """

    pad_token_id: int
    max_length: int  # the width never exceeds it, unless a row does; positions end there in many models
    kind: Kind = "single-label"
    pad_token_type_id: int = 0
    multiple: int = PAD_MULTIPLE  # of the width

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, kind: Kind, max_length: int, device: torch.device | None = None
    ) -> Collator:
        if tokenizer.pad_token_id is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no padding token; choose another encoder"
            )
        multiple = PAD_ON_CPU if device is not None and device.type == "cpu" else PAD_MULTIPLE
        return cls(tokenizer.pad_token_id, max_length, kind, tokenizer.pad_token_type_id, multiple)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        texts = rows
        if "windows" in rows[0]:
            rows = [window for row in rows for window in split_windows(row)]
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)
        width = max(longest, min(-(-longest // self.multiple) * self.multiple, self.max_length))
        mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
        batch = {"input_ids": _pad(rows, "input_ids", mask, self.pad_token_id), "attention_mask": mask.long()}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = _pad(rows, "token_type_ids", mask, self.pad_token_type_id)
        if self.kind == "tokens":
            return batch | {name: torch.from_numpy(values) for name, values in join_words(rows, width).items()}
        if len(rows) > len(texts):
            counts = torch.tensor([len(row["windows"]) for row in texts])
            batch["texts"] = torch.arange(len(texts)).repeat_interleave(counts)
        if "label" in texts[0]:
            dtype = torch.int64 if self.kind == "single-label" else torch.float32
            batch["labels"] = torch.as_tensor(np.asarray([row["label"] for row in texts]), dtype=dtype)
        if "teacher_logits" in texts[0]:
            logits = np.asarray([row["teacher_logits"] for row in texts], dtype=np.float32)
            batch["teacher_logits"] = torch.from_numpy(logits)
        if "labelled" in texts[0]:
            batch["labelled"] = torch.tensor([bool(row["labelled"]) for row in texts])
        return batch


@dataclass
class MicroBatchCollator:
    """Cut the rows of one optimiser step into micro-batches of like length, of at most `tokens` tokens with padding."""

    collator: Collator
    tokens: int | None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, torch.Tensor]]]:
        if self.collator.kind == "tokens":
            rows = [window for row in rows for window in split_row(row)]
        batches: list[list[Mapping[str, Any]]] = [[]]
        count = 0  # inputs of the last batch; a text in windows has several, which stay together
        for row in sorted(rows, key=lambda row: len(row["input_ids"])):
            sizes = row.get("windows") or [len(row["input_ids"])]
            width = -(-max(sizes) // self.collator.multiple) * self.collator.multiple
            count += len(sizes)
            if self.tokens is not None and batches[-1] and count * width > self.tokens:
                batches.append([])
                count = len(sizes)
            batches[-1].append(row)
        return {MICRO_BATCHES: [self.collator(batch) for batch in batches]}


@dataclass
class WordCollator:
    """Make batches for `DistillationTrainer(kind="tokens")` of rows as `load_splits` gives them.

    Attributes:
        tokenizer: of the model that is trained; one with a `tokenizer.json`.
        max_length: longest input in tokens; a longer text becomes several, with overlap, and each word counts once.

    Examples:
        >>> collate = WordCollator(encoder.tokenizer, max_length=64)
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 128

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tokenise rows with `text`, `starts`, `ends`, `label` and, where a teacher answers, `teacher_logits`.

        Returns:
            What the model reads, and of the words that count `words`, their places among all tokens of the batch,
            `labels` (-100: none) and `teacher_logits`.
        """
        limit = min(self.max_length, self.tokenizer.model_max_length)
        encoded = encode_windows(
            {name: [row[name] for row in rows] for name in ("text", *WORDS)}, self.tokenizer, limit
        )
        whole = [{**row, **{name: values[place] for name, values in encoded.items()}} for place, row in enumerate(rows)]
        return Collator.of(self.tokenizer, "tokens", limit)([part for row in whole for part in split_row(row)])


def _pad(rows: Sequence[Mapping[str, Any]], column: str, mask: torch.Tensor, fill: int) -> torch.Tensor:
    padded = torch.full(mask.shape, fill, dtype=torch.int64)
    padded[mask] = torch.from_numpy(np.concatenate([np.asarray(row[column], dtype=np.int64) for row in rows]))
    return padded
