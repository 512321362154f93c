"""Logits of a model for many texts, in batches of like length; the hashes of a model and of a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlora.data.batches import INPUTS, Collator, Tokenised, length_sorted_batches
from kdlora.data.logit_table import as_offsets
from kdlora.data.spool import read_column
from kdlora.data.windows import WindowSettings
from kdlora.data.word_tokens import READ, split_row, split_windows, window_counts, word_offsets, words_seen
from kdlora.distil.precision import autocast
from kdlora.distil.processes import ALONE, Processes
from kdlora.distil.training_modes import freed_memory_kept
from kdlora.system.integrity import hash_json

_ARCHITECTURE = ("model_type", "num_attention_heads", "n_heads", "hidden_act", "activation", "layer_norm_eps")

BATCH_TOKENS = 4096
"""Tokens of one pass: a larger pass is no faster, and its activations would be the peak of a small student's memory."""


def predict_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Tokenised,
    *,
    precision: str = "fp32",
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> np.ndarray:
    """Run a model over token ids, without dropout and without gradients.

    Several processes take turns at the batches, which are those of a single process, so that the figures are the same
    to the bit. Where examples have words the result has a row a word; that of one which the model cannot see is NaN.
    """
    words, counts = word_offsets(data.dataset), window_counts(data.dataset)
    seen = None if words is None else words_seen(data.dataset)
    parts = words if counts is None else as_offsets(counts)  # what has an answer of its own: words, or windows
    collator = Collator.of(tokenizer, "single-label" if words is None else "tokens", data.max_length)
    inputs = data.dataset.select_columns([name for name in (*INPUTS, *READ) if name in data.dataset.column_names])
    device = next(model.parameters()).device
    order: list[int] = []
    outputs: list[torch.Tensor] = []
    lengths, done = read_column(data.dataset, "length").to_numpy(), 0

    def read(rows: list[int]) -> Iterator[torch.Tensor]:
        columns = inputs[rows]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if parts is not None:
            split = split_windows if words is None else split_row
            examples = [window for example in examples for window in split(example)]
        at_once = max(1, batch_tokens // max(len(one["input_ids"]) for one in examples))
        for start in range(0, len(examples), at_once):  # several for the windows of long texts alone
            made = collator(examples[start : start + at_once])
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in made.items()}
            places = batch.pop("words", None)
            logits: torch.Tensor = model(**batch).logits.float()
            yield logits if places is None else logits.flatten(0, 1)[places]

    with freed_memory_kept(device), _evaluating(model), torch.inference_mode(), autocast(precision, device):
        for rows in length_sorted_batches(lengths, batch_tokens)[processes.rank :: processes.count]:
            outputs.extend(read(rows))
            if parts is None:
                order.extend(rows)
            else:
                own = (part for row in rows for part in range(*parts[row : row + 2]))
                order.extend(part for part in own if seen is None or seen[part])
            done += len(rows)
            if progress is not None:
                progress(min(done * processes.count, len(lengths)))
    logits = _in_row_order(order, outputs, len(lengths) if parts is None else int(parts[-1]), processes)
    return logits if counts is None else WindowSettings(pool=data.pool).pool_logits(logits, counts)


def faulty_rows(logits: np.ndarray, data: Tokenised) -> np.ndarray:
    """Number the rows whose logits are not finite, other than those of words that the model cannot see."""
    bad = ~np.isfinite(logits).all(axis=1)
    return np.flatnonzero(bad if word_offsets(data.dataset) is None else bad & words_seen(data.dataset))


def _in_row_order(order: list[int], outputs: list[torch.Tensor], rows: int, processes: Processes) -> np.ndarray:
    """Undo the sorting by length; one copy from the device at the end, so that no batch waits for it."""
    own = (order, torch.cat(outputs).cpu().numpy()) if outputs else None
    parts = [part for part in processes.gather(own) if part is not None]
    if not parts:
        return np.zeros((0, 0), dtype=np.float32)
    logits = np.full((rows, parts[0][1].shape[1]), np.nan, dtype=np.float32)
    for numbers, found in parts:
        logits[numbers] = found
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and put every module back into the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def hash_model(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Give the SHA-256 of all parameters and buffers, by name, and of the traits that no weight shows."""
    left_out = tuple(f"{name}." for name in without)
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    traits = [type(model).__name__, *(str(getattr(config, name, None)) for name in _ARCHITECTURE)]
    digest.update(json.dumps(traits).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(left_out):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the SHA-256 of how a tokenizer turns text into ids; truncation and padding do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        return hash_json({**vocabulary, "special": tokenizer.special_tokens_map})
    content = json.loads(backend.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    return hash_json(content)
