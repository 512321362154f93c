"""The six models of the paper at their published sizes, with random weights, and token ids to feed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from kdlora.config import LoraSettings
from kdlora.data.batches import PAD_MULTIPLE, LengthBucketSampler, Tokenised
from kdlora.data.tasks import GLUE, PROBLEM_TYPES
from kdlora.models.adapters import ParameterCounts, add_adapter, count_parameters
from kdlora.models.encoders import Encoder, fresh_modules

TASK = GLUE["cola"].task
BATCH = 32
MAX_LENGTH = 128

# How long CoLA's sentences are for bert-base-uncased's tokenizer, with [CLS] and [SEP]: entry n is the number of
# sentences of n tokens. One table for all families keeps the work the same, so that only the models differ.
TRAIN_COUNTS = (
    *(0, 0, 0, 0, 7, 129, 310, 649, 979, 1154, 1129, 916, 797, 574, 452, 334, 235, 182, 145, 125, 96, 66, 67, 66),
    *(41, 26, 21, 17, 6, 8, 6, 1, 8, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1),
)
VALIDATION_COUNTS = (
    *(0, 0, 0, 0, 0, 19, 55, 78, 108, 136, 133, 99, 84, 65, 47, 42, 34, 27, 17, 25, 19, 8, 11, 9),
    *(4, 2, 0, 4, 3, 6, 1, 1, 1, 3, 0, 2),
)


@dataclass(frozen=True)
class Size:
    """The shape of a model: its name in the tables, transformers' name of the architecture, its config's settings."""

    title: str
    model_type: str
    settings: dict[str, Any]


_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_WIDTH = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", **_DROPOUT}
_BERT = {**_WIDTH, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}
_ROBERTA = {**_WIDTH, "vocab_size": 50265, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0}
_ROBERTA |= {"eos_token_id": 2, "max_position_embeddings": 514}  # positions are counted from 2
_DEBERTA = {**_WIDTH, "vocab_size": 128100, "max_position_embeddings": 512, "type_vocab_size": 0, "pad_token_id": 0}
_DEBERTA |= {"relative_attention": True, "position_buckets": 256, "max_relative_positions": -1, "share_att_key": True}
_DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "position_biased_input": False}
_DEBERTA |= {"pooler_hidden_size": 768, "pooler_hidden_act": "gelu", "pooler_dropout": 0}
_DISTILBERT = {"vocab_size": 30522, "max_position_embeddings": 512, "dim": 768, "n_layers": 6, "n_heads": 12}
_DISTILBERT |= {"hidden_dim": 3072, "activation": "gelu", "dropout": 0.1, "attention_dropout": 0.1}
_DISTILBERT |= {"seq_classif_dropout": 0.2, "pad_token_id": 0}


def _of_layers(title: str, model_type: str, settings: dict[str, Any], layers: int) -> Size:
    return Size(title, model_type, {**settings, "num_hidden_layers": layers})


SIZES: dict[str, tuple[Size, Size]] = {
    "bert": (_of_layers("BERT-base", "bert", _BERT, 12), Size("DistilBERT", "distilbert", _DISTILBERT)),
    "roberta": (
        _of_layers("RoBERTa-base", "roberta", _ROBERTA, 12),
        _of_layers("DistilRoBERTa", "roberta", _ROBERTA, 6),
    ),
    "deberta-v3": (
        _of_layers("DeBERTaV3-base", "deberta-v2", _DEBERTA, 12),
        _of_layers("DeBERTaV3-small", "deberta-v2", _DEBERTA, 6),
    ),
}
"""Teacher and student of each of the paper's families."""


def build_model(size: Size, rank: int | None, *, device: str = "cpu") -> tuple[nn.Module, Encoder]:
    """Build a classifier of CoLA as it is at the start of a training, with LoRA if there is a rank, and its encoder.

    Its weights are random and its tokenizer knows padding and nothing else; on `meta` it takes no memory.
    """
    config = AutoConfig.for_model(size.model_type, **size.settings)
    config.id2label, config.label2id = TASK.id2label, TASK.label2id
    config.problem_type = PROBLEM_TYPES[TASK.kind]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    # The published checkpoints hold the whole encoder, so only what stands beside it is fresh.
    fresh = fresh_modules(model, ())
    vocabulary = WordLevel({"[PAD]": config.pad_token_id, "[UNK]": 1 - config.pad_token_id}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), pad_token="[PAD]", unk_token="[UNK]")
    encoder = Encoder(model.eval(), tokenizer, fresh, size.title)
    with torch.device(device):
        return model if rank is None else add_adapter(encoder, LoraSettings(rank=rank), seed=0), encoder


def count(size: Size, rank: int | None = None) -> ParameterCounts:
    """Count the parameters of a model without making it."""
    return count_parameters(build_model(size, rank, device="meta")[0])


def lengths_of(counts: Sequence[int]) -> list[int]:
    """Spell a table of lengths out: one length a sentence, in tokens, the shortest first."""
    return [length for length, sentences in enumerate(counts) for _ in range(sentences)]


def synthetic_rows(size: Size, lengths: Sequence[int], *, taught: bool = False) -> Tokenised:
    """Draw examples of given lengths: random ids, labels and, for distillation, teacher logits."""
    draw = np.random.default_rng(0)
    rows = len(lengths)
    columns: dict[str, Any] = {
        "id": [str(row) for row in range(rows)],
        # Neither padding nor unknown: both are 0 or 1.
        "input_ids": [draw.integers(2, size.settings["vocab_size"], length).tolist() for length in lengths],
        "length": list(lengths),
        "label": draw.integers(0, TASK.num_labels, rows).tolist(),
    }
    if size.settings.get("type_vocab_size") == 2:
        columns["token_type_ids"] = [[0] * length for length in lengths]
    if taught:
        columns["teacher_logits"] = draw.normal(size=(rows, TASK.num_labels)).tolist()
    return Tokenised(Dataset.from_dict(columns), truncated=0, max_length=MAX_LENGTH)


def padded_tokens(lengths: Sequence[int]) -> int:
    """Count the tokens of a batch, padding included."""
    return len(lengths) * (-(-max(lengths) // PAD_MULTIPLE) * PAD_MULTIPLE)


def widest_batch(lengths: Sequence[int], *, batch: int = BATCH) -> list[int]:
    """Find the batch of an epoch that takes the most memory: the lengths of its rows."""
    batches = ([lengths[row] for row in rows] for rows in LengthBucketSampler(lengths, batch, seed=0))
    return max(batches, key=padded_tokens)


def batches_to_run(lengths: Sequence[int], every: int) -> tuple[list[list[int]], float]:
    """Cut a set into batches of like length, and take one of so many: their lengths, and their share of all tokens."""
    ordered = sorted(lengths, reverse=True)
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    taken = batches[min(every // 2, len(batches) - 1) :: every]
    return taken, sum(map(padded_tokens, taken)) / sum(map(padded_tokens, batches))
