"""Logits of a model for many texts, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlora.data.batches import Collator, Tokenised, length_sorted_batches
from kdlora.distil.allocator import freed_memory_kept
from kdlora.distil.precision import autocast
from kdlora.distil.processes import ALONE, Processes
from kdlora.distil.sharding import is_sharded

INPUTS = ("input_ids", "token_type_ids")

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

    Several processes with the same model and data take turns at the batches, which are those of a single process, so
    that the figures are the same to the bit. Where they share the model out, all run equally many passes.

    Args:
        model: a transformers classifier, with or without an adapter; it runs where it lies.
        tokenizer: the model's own; gives the padding.
        data: the model's own token ids.
        precision: `fp32`, `bf16` or `fp16` matrix products.
        batch_tokens: most tokens in one pass, padding included.
        progress: called with the number of rows done.
        processes: those that share the work; all of them must call.

    Returns:
        float32 (rows, labels), in row order whatever the order of the batches; in every process.

    Raises:
        ModelError: the tokenizer has no padding token.
    """
    collator = Collator.of(tokenizer, "single-label", data.max_length)
    inputs = data.dataset.select_columns([name for name in INPUTS if name in data.dataset.column_names])
    device = next(model.parameters()).device
    order: list[int] = []
    outputs: list[torch.Tensor] = []
    lengths = column_values(data.dataset, "length")

    def read(rows: list[int]) -> torch.Tensor:
        columns = inputs[rows]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in collator(examples).items()}
        logits: torch.Tensor = model(**batch).logits.float()
        return logits

    shared = is_sharded(model)
    # Shards that were gathered in inference mode could not be trained on afterwards.
    ungraded = torch.no_grad() if shared else torch.inference_mode()
    with freed_memory_kept(device), _evaluating(model), ungraded, autocast(precision, device):
        batches = length_sorted_batches(lengths, batch_tokens)
        for rows in batches[processes.rank :: processes.count]:
            outputs.append(read(rows))
            order.extend(rows)
            if progress is not None:
                progress(min(len(order) * processes.count, len(lengths)))
        if shared and 0 < len(batches) % processes.count <= processes.rank:
            read(batches[-1])  # the others have one more, for which they need this process's shards
    return _in_row_order(order, outputs, processes)


def column_values(dataset: Dataset, column: str) -> np.ndarray:
    """Read a whole column at once; `dataset[column]` would go row by row.

    Args:
        dataset: any.
        column: its name.
    """
    return np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])


def _in_row_order(order: list[int], outputs: list[torch.Tensor], processes: Processes) -> np.ndarray:
    """Undo the sorting by length; one copy from the device at the end, so that no batch waits for it."""
    own = (order, torch.cat(outputs).cpu().numpy()) if outputs else None
    parts = [part for part in processes.gather(own) if part is not None]
    if not parts:
        return np.zeros((0, 0), dtype=np.float32)
    logits = np.empty((sum(len(rows) for rows, _ in parts), parts[0][1].shape[1]), dtype=np.float32)
    for rows, found in parts:
        logits[rows] = found
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
