"""The six models of the paper at their published sizes, with random weights, and token ids to feed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from kdlora.config import LoraConfig
from kdlora.data.batches import PAD_MULTIPLE, LengthBucketSampler, Tokenised
from kdlora.data.tasks import GLUE
from kdlora.models.adapters import ParameterCounts, add_adapter, count_parameters
from kdlora.models.encoders import Encoder, fresh_modules
from kdlora.models.loading import Loaded

TASK = GLUE["cola"].task
BATCH = 32
MAX_LENGTH = 128


@dataclass(frozen=True)
class Size:
    """The shape of a model.

    Attributes:
        title: its name in the tables.
        model_type: transformers' name of the architecture.
        settings: what its published config.json says where that decides size, cost or memory.
    """

    title: str
    model_type: str
    settings: dict[str, Any]


_WIDTH = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu"}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_BERT = {**_WIDTH, **_DROPOUT, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
_ROBERTA = {
    **_WIDTH,
    **_DROPOUT,
    "vocab_size": 50265,
    "max_position_embeddings": 514,  # positions are counted from 2
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_DEBERTA = {
    **_WIDTH,
    **_DROPOUT,
    "vocab_size": 128100,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "max_relative_positions": -1,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "pooler_hidden_size": 768,
    "pooler_hidden_act": "gelu",
    "pooler_dropout": 0,
    "pad_token_id": 0,
}
_DISTILBERT = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "dim": 768,
    "n_layers": 6,
    "n_heads": 12,
    "hidden_dim": 3072,
    "activation": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "pad_token_id": 0,
}

SIZES: dict[str, tuple[Size, Size]] = {
    "bert": (
        Size("BERT-base", "bert", {**_BERT, "num_hidden_layers": 12, "pad_token_id": 0}),
        Size("DistilBERT", "distilbert", _DISTILBERT),
    ),
    "roberta": (
        Size("RoBERTa-base", "roberta", {**_ROBERTA, "num_hidden_layers": 12}),
        Size("DistilRoBERTa", "roberta", {**_ROBERTA, "num_hidden_layers": 6}),
    ),
    "deberta-v3": (
        Size("DeBERTaV3-base", "deberta-v2", {**_DEBERTA, "num_hidden_layers": 12}),
        Size("DeBERTaV3-small", "deberta-v2", {**_DEBERTA, "num_hidden_layers": 6}),
    ),
}
"""Teacher and student of each of the paper's families."""


def build_encoder(size: Size, *, seed: int = 0, device: str = "cpu") -> Encoder:
    """Build a classifier of CoLA with random weights, as it is at the start of a training.

    Args:
        size: its shape.
        seed: of the weights.
        device: `meta` builds shapes without memory.

    Returns:
        The encoder in fp32; its tokenizer knows padding and nothing else.
    """
    config = AutoConfig.for_model(size.model_type, **size.settings)
    config.id2label, config.label2id = TASK.id2label, TASK.label2id
    config.problem_type = TASK.problem_type
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    # The published checkpoints hold the whole encoder, so only what stands beside it is fresh.
    fresh = fresh_modules(Loaded(model, frozenset(), frozenset()))
    return Encoder(model.eval(), _padding_tokenizer(config.pad_token_id), fresh, size.title)


def build_adapted(size: Size, rank: int, *, seed: int = 0, device: str = "cpu") -> tuple[PeftModel, Encoder]:
    """Build the same with LoRA on query and value.

    Args:
        size: the base's shape.
        rank: of the adapters.
        seed: of the weights.
        device: `meta` builds shapes without memory.

    Returns:
        The PEFT model, and the encoder inside it.
    """
    encoder = build_encoder(size, seed=seed, device=device)
    with torch.device(device):
        return add_adapter(encoder, LoraConfig(rank=rank), seed=seed), encoder


def count_adapted(size: Size, rank: int) -> ParameterCounts:
    """Count the parameters of a model with LoRA, without making it.

    Args:
        size: the base's shape.
        rank: of the adapters.
    """
    return count_parameters(build_adapted(size, rank, device="meta")[0])


def count_plain(size: Size) -> ParameterCounts:
    """Count the parameters of a model that is fine-tuned in full, without making it.

    Args:
        size: its shape.
    """
    return count_parameters(build_encoder(size, device="meta").model)


def _padding_tokenizer(pad: int) -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": pad, "[UNK]": 1 - pad}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def synthetic_rows(size: Size, lengths: Sequence[int], *, seed: int = 0, taught: bool = False) -> Tokenised:
    """Draw examples of given lengths: random ids, labels and, for distillation, teacher logits.

    Args:
        size: gives the vocabulary, and whether the model takes token types.
        lengths: tokens of each example.
        seed: of the draw.
        taught: add `teacher_logits`.
    """
    draw = np.random.default_rng(seed)
    count = len(lengths)
    columns: dict[str, Any] = {
        "id": [str(row) for row in range(count)],
        # Neither padding nor unknown: both are 0 or 1.
        "input_ids": [draw.integers(2, size.settings["vocab_size"], length).tolist() for length in lengths],
        "length": [int(length) for length in lengths],
        "label": draw.integers(0, TASK.num_labels, count).tolist(),
    }
    if size.settings.get("type_vocab_size") == 2:
        columns["token_type_ids"] = [[0] * length for length in lengths]
    if taught:
        columns["teacher_logits"] = draw.normal(size=(count, TASK.num_labels)).tolist()
    return Tokenised(Dataset.from_dict(columns), truncated=0, max_length=MAX_LENGTH)


def widest_batch(lengths: Sequence[int], *, batch: int = BATCH) -> list[int]:
    """Find the batch of an epoch that takes the most memory.

    Args:
        lengths: tokens of every training row.
        batch: rows of an optimiser step.

    Returns:
        The lengths of its rows.
    """
    batches = ([lengths[row] for row in rows] for rows in LengthBucketSampler(lengths, batch, seed=0))
    return max(batches, key=padded_tokens)


def padded_tokens(lengths: Sequence[int]) -> int:
    """Count the tokens of a batch, padding included.

    Args:
        lengths: of its rows.
    """
    return len(lengths) * (-(-max(lengths) // PAD_MULTIPLE) * PAD_MULTIPLE)
