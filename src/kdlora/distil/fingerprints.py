"""Hashes of what makes a result: weights, tokenizer, columns of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlora.evidence.integrity import hash_file, hash_json

__all__ = ["compare", "hash_columns", "hash_file", "hash_json", "hash_model", "hash_tokenizer"]

_ARCHITECTURE = ("model_type", "num_attention_heads", "n_heads", "hidden_act", "activation", "layer_norm_eps")
_ROWS = 100_000


def hash_model(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Give the SHA-256 of all parameters and buffers, by name, and of the traits that no weight shows.

    Args:
        model: any model; where it came from does not count.
        without: names of modules that do not count, such as a head that is fresh.
    """
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
    """Give the SHA-256 of how a tokenizer turns text into ids.

    Truncation and padding are left out: every call sets them anew, so they would change the hash of a tokenizer
    that has merely been used.

    Args:
        tokenizer: fast or slow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        return hash_json({**vocabulary, "special": tokenizer.special_tokens_map})
    content = json.loads(backend.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    return hash_json(content)


def hash_columns(dataset: Dataset, columns: Sequence[str]) -> str:
    """Give the SHA-256 of some columns, row by row; how the rows are stored in chunks does not count.

    Args:
        dataset: any data set; columns that it lacks are skipped, and their absence counts.
        columns: text, numbers, or lists of numbers.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    for column in columns:
        digest.update(f"\n{column} {column in dataset.column_names}\n".encode())
        if column in dataset.column_names:
            for array in _column_arrays(dataset, column):
                _update(digest, array)
    return digest.hexdigest()


def compare(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name the ingredients that differ.

    Args:
        stored: ingredient to hash or value, as recorded.
        current: the same, as of now.
    """
    return [name for name in current if stored.get(name) != current[name]]


def _column_arrays(dataset: Dataset, column: str) -> Iterator[pa.Array]:
    """Yield a column in equal pieces, so that the same rows give the same pieces."""
    table = dataset.select_columns([column]).with_format("arrow")
    for batch in table.iter(batch_size=_ROWS):
        yield from _joined(batch.column(0).chunks)


def _joined(chunks: Sequence[pa.Array]) -> Iterable[pa.Array]:
    return [pa.concat_arrays(chunks)] if chunks else []


def _update(digest: Any, array: pa.Array) -> None:
    """Feed lengths and values of an array to the hash; nulls count as such."""
    digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(pc.fill_null(pc.list_value_length(array), -1).cast(pa.int64()).to_numpy().tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_fixed_size_list(array.type):
        digest.update(str(array.type.list_size).encode())
        _update(digest, array.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        text = pc.fill_null(array, "").cast(pa.large_binary())
        digest.update(pc.binary_length(text).to_numpy().tobytes())
        offsets = np.frombuffer(text.buffers()[1], dtype=np.int64)[text.offset : text.offset + len(text) + 1]
        if len(text):
            digest.update(memoryview(text.buffers()[2])[offsets[0] : offsets[-1]])
    elif not pa.types.is_null(array.type):
        nothing = False if pa.types.is_boolean(array.type) else 0
        digest.update(pc.fill_null(array, nothing).to_numpy(zero_copy_only=False).tobytes())
