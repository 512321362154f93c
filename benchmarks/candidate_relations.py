"""A candidate: the student's last layer relates a text's tokens to one another as the teacher's does (MiniLMv2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from candidate_terms import with_loss
from filelock import FileLock
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdlora.data.batches import Collator, Tokenised, length_sorted_batches
from kdlora.distil.inference import INPUTS, column_values
from kdlora.evidence.storage import atomic_folder
from kdlora.models.encoders import Encoder
from kdlora.models.layers import find_layers

PROJECTIONS = ("query", "key", "value")
HEADS = 8
"""Relation heads, each 16 wide in a student of width 128; the paper has 48, also 16 wide in its base models."""
_BATCH_TOKENS = 4096


def relation_loss(student: Tensor, teacher: Tensor, mask: Tensor, heads: int = HEADS) -> Tensor:
    """Compare how the tokens of each text relate to one another, by KL(teacher || student).

    A relation is the softmax over a text's tokens of scaled dot products of their vectors, in each of several parts
    of the vector ("relation heads"), so that the widths may differ.

    Args:
        student: (rows, tokens, width).
        teacher: (rows, tokens, another width).
        mask: (rows, tokens), true where there is a token.
        heads: divides both widths.

    Returns:
        (rows,) nats, the mean over heads and tokens.

    *Source*: MiniLMv2 (Wang et al., arXiv 2012.15828), eqs. 5 to 8.
    """
    ours, theirs = _log_relations(student, mask, heads), _log_relations(teacher.detach(), mask, heads)
    divergence = (theirs.exp() * (theirs - ours)).sum(3)  # a token relates to no padding: its share of it is 0
    return (divergence * mask[:, None]).sum((1, 2)) / (heads * mask.sum(1))


def _log_relations(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    rows, tokens, width = vectors.shape
    parts = vectors.float().view(rows, tokens, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(2, 3) / math.sqrt(width // heads)
    # Not -inf: 0 * -inf is no number, in the backward pass too.
    return torch.log_softmax(scores.masked_fill(~mask[:, None, None, :], -1e4), dim=-1)


@dataclass
class Features:
    """A teacher's last queries, keys and values for every token of the training texts, on disk.

    Attributes:
        places: first row in `vectors` and number of tokens, by a text's token ids.
        vectors: float16 (tokens, 3 * width), memory-mapped.
    """

    places: dict[bytes, tuple[int, int]] = field(repr=False)
    vectors: np.ndarray = field(repr=False)

    def batch(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Give the vectors of a padded batch.

        Args:
            ids: (rows, tokens).
            mask: (rows, tokens), true where there is a token.

        Returns:
            float32 (3, rows, tokens, width), zeros in the padding.
        """
        found = np.zeros((*ids.shape, self.vectors.shape[1]), np.float16)
        for row, length in enumerate(mask.sum(1).tolist()):
            first, count = self.places[_key(ids[row, :length].tolist())]
            found[row, :count] = self.vectors[first : first + count]
        return torch.from_numpy(found).float().unflatten(2, (len(PROJECTIONS), -1)).permute(2, 0, 1, 3)


def _key(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def open_features(teacher: Encoder, parts: Sequence[Tokenised], folder: Path) -> Features:
    """Let a teacher read every text once, and keep what its last layer makes of each token; or read what was kept.

    Args:
        teacher: shares its tokenizer with the student.
        parts: token ids; the same as when the folder was written.
        folder: for the vectors.
    """
    texts = [ids for part in parts for ids in part.dataset["input_ids"][:]]
    ends = np.cumsum([len(ids) for ids in texts])
    places = {_key(ids): (int(end) - len(ids), len(ids)) for ids, end in zip(texts, ends, strict=True)}
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                _write_vectors(teacher, parts, int(ends[-1]), temporary / "vectors.npy")
    return Features(places, np.load(folder / "vectors.npy", mmap_mode="r"))


def _write_vectors(teacher: Encoder, parts: Sequence[Tokenised], tokens: int, file: Path) -> None:
    width = teacher.model.config.hidden_size
    vectors = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(tokens, len(PROJECTIONS) * width))
    start = 0
    for part in parts:
        lengths = column_values(part.dataset, "length")
        starts = start + np.cumsum(lengths) - lengths
        start += int(lengths.sum())
        for rows, found in _read(teacher, part, lengths):
            for row, values in zip(rows, found, strict=True):
                vectors[starts[row] : starts[row] + lengths[row]] = values[: lengths[row]]
    vectors.flush()


def _read(teacher: Encoder, part: Tokenised, lengths: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Give the vectors of batch after batch: row numbers, and (rows, tokens, 3 * width)."""
    collator = Collator.of(teacher.tokenizer, "single-label", part.max_length)
    inputs = part.dataset.select_columns([name for name in INPUTS if name in part.dataset.column_names])
    model = teacher.model.eval()
    with _kept(model) as kept, torch.inference_mode():
        for rows in length_sorted_batches(lengths, _BATCH_TOKENS):
            model(**collator([inputs[row] for row in rows]))
            yield rows, torch.cat([kept[name] for name in PROJECTIONS], dim=2).numpy()


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep what the last layer's projections give, in every pass."""
    kept: dict[str, Tensor] = {}
    handles = keep_projections(model, kept)
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def keep_projections(model: nn.Module, kept: dict[str, Tensor]) -> list[RemovableHandle]:
    """Put the outputs of the last layer's query, key and value where they can be read after every pass.

    Args:
        model: of BERT's kind, with or without an adapter.
        kept: by name, of the last pass.
    """
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    attention: Any = find_layers(plain)[1][-1].attention.self

    def keep(name: str) -> RemovableHandle:
        layer: nn.Module = getattr(attention, name)
        return layer.register_forward_hook(lambda _module, _inputs, output: kept.update({name: output}))

    return [keep(name) for name in PROJECTIONS]


class RelationTransfer(TrainerCallback):
    """Adds the relations of queries, keys and values of the last layer to a training's loss."""

    def __init__(self, features: Features, weight: float, heads: int = HEADS) -> None:
        """Prepare.

        Args:
            features: the teacher's.
            weight: of the three relations together.
            heads: divides the widths of teacher and student.
        """
        self.features = features
        self.weight = weight
        self.heads = heads
        self.kept: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Take hold of the model."""
        self.handles = keep_projections(model, self.kept)
        self.handles.append(model.register_forward_hook(self._add, with_kwargs=True))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of it."""
        for handle in self.handles:
            handle.remove()
        self.kept.clear()

    def _add(self, model: nn.Module, _inputs: Any, batch: dict[str, Tensor], output: Any) -> Any:
        if not model.training:
            return output
        mask = batch["attention_mask"].bool()
        teacher = self.features.batch(batch["input_ids"], mask)
        terms = [
            relation_loss(self.kept[name], theirs, mask, self.heads)
            for name, theirs in zip(PROJECTIONS, teacher, strict=True)
        ]
        output.logits = with_loss(output.logits, self.weight * torch.stack(terms).sum(0).mean())
        return output
