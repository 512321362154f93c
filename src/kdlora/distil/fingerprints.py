"""Hashes of what makes a result: weights and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlora.system.integrity import hash_json

_ARCHITECTURE = ("model_type", "num_attention_heads", "n_heads", "hidden_act", "activation", "layer_norm_eps")


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
    """Give the SHA-256 of how a tokenizer turns text into ids.

    Truncation and padding are left out: every call sets them anew, so they would change the hash of a tokenizer
    that has merely been used.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        return hash_json({**vocabulary, "special": tokenizer.special_tokens_map})
    content = json.loads(backend.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    return hash_json(content)
