"""A candidate: a student made from the teacher's layers first learns to end where the whole teacher ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdlora.data.batches import Collator, LengthBucketSampler, Tokenised
from kdlora.distil.inference import INPUTS, column_values
from kdlora.evidence.storage import atomic_file
from kdlora.models.encoders import Encoder

RATE = 3e-4
"""Peak learning rate; it falls linearly to 0."""
BATCH = 32


def last_layer_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Give the mean squared difference of the last layers' vectors over all tokens and directions.

    Args:
        student: (rows, tokens, width).
        teacher: of the same shape; no gradient flows into it.
        mask: (rows, tokens), true where there is a token.
    """
    return (student - teacher.detach())[mask].square().mean()


def match_last_layer(
    student: nn.Module, teacher: nn.Module, batches: Iterator[Mapping[str, Tensor]], steps: int
) -> dict[str, Tensor]:
    """Train all weights of an encoder to give the vectors of another one.

    Args:
        student: changed in place; without a head.
        teacher: of the same width.
        batches: what both take, with `attention_mask`; as many as there are steps.
        steps: optimiser steps (AdamW).

    Returns:
        The weights that were trained, by name; a pooler, which the vectors do not pass, is not among them.

    *Source*: the idea is TinyBERT's intermediate distillation (arXiv 1909.10351), of the last layer alone.
    """
    student.train()
    teacher.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _, batch in zip(range(steps), batches, strict=False):
        with torch.no_grad():
            wanted = teacher(**batch).last_hidden_state
        found = student(**batch).last_hidden_state
        loss = last_layer_loss(found, wanted, batch["attention_mask"].bool())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([one for one in student.parameters() if one.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
    trained = {name: one for name, one in student.named_parameters() if one.grad is not None}
    optimizer.zero_grad()
    student.eval()
    return {name: one.detach() for name, one in trained.items()}


def warmed_up(student: Encoder, teacher: Encoder, texts: Tokenised, steps: int, file: Path) -> Encoder:
    """Warm a student up on texts without their labels, or read what that gave before.

    The seed of the student's head has no part in it, so that all seeds share one file, and controls too.

    Args:
        student: of the teacher's width and tokenizer; changed in place.
        teacher: pretrained, not fine-tuned.
        texts: of the task's training rows.
        steps: optimiser steps.
        file: keeps the weights.
    """
    base: Any = student.model.base_model
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            trained = match_last_layer(base, teacher.model.base_model, _batches(student, texts), steps)
            with atomic_file(file) as temporary:
                save_file({name: value.contiguous() for name, value in trained.items()}, temporary)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for name, value in load_file(file).items():
            own[name].copy_(value)
    return student


def _batches(student: Encoder, texts: Tokenised) -> Iterator[Mapping[str, Tensor]]:
    collator = Collator.of(student.tokenizer, "single-label", texts.max_length)
    inputs = texts.dataset.select_columns([name for name in INPUTS if name in texts.dataset.column_names])
    sampler = LengthBucketSampler(column_values(texts.dataset, "length"), BATCH, seed=0)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for rows in sampler:
            yield collator(_rows(inputs, rows))
        epoch += 1


def _rows(inputs: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    columns = inputs[list(rows)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
