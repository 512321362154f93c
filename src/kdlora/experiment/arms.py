"""Train one arm: build its model, take the rows in, train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kdlora.config import LoraSettings, StudentTrainConfig, TeacherTrainConfig, TrainConfig
from kdlora.data.batches import Tokenised, tokenise
from kdlora.data.load import Splits
from kdlora.data.word_tokens import words_seen
from kdlora.distil.logits import join_unlabelled
from kdlora.distil.train import TrainOutcome, train_model
from kdlora.distil.trainer import ProgressEvent, TrainingOptions
from kdlora.errors import ModelError
from kdlora.experiment.settle import rows_per_epoch, settled
from kdlora.models.adapters import ParameterCounts, add_adapter, count_parameters
from kdlora.models.encoders import Encoder, load_encoder

Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class Trained:
    """A trained model, before its adapter is merged.

    Attributes:
        encoder: the base model with its tokenizer.
        model: what was trained: a `PeftModel`, or the encoder's own model after full fine-tuning.
        outcome: history, seconds and speed.
        parameters: how many parameters the adapter, the head and the whole model have.
        truncated: texts that were cut, per split.
        unseen: words that the model cannot see, per split, in a task of tokens.

    Examples:
        >>> trained.parameters.trainable < trained.parameters.total
        True
    """

    encoder: Encoder
    model: Any = field(repr=False)
    outcome: TrainOutcome
    parameters: ParameterCounts
    truncated: dict[str, int]
    unseen: dict[str, int] = field(default_factory=dict)


def train_teacher(
    source: str,
    splits: Splits,
    settings: TrainConfig = TeacherTrainConfig(),
    *,
    folder: str | Path,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Fine-tune all weights of a pretrained encoder on a task (KD-LoRA, eq. 1).

    Args:
        source: Hub id or folder of a pretrained encoder.
        splits: the task with its examples.
        settings: epochs, learning rate and the like.
        folder: where checkpoints go; an interrupted training continues from there.
        seed: seeds the new head, dropout and the order of the rows.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu` or `cuda`.
        revision: commit, tag or branch of a Hub id.
        progress: called with each training event.
        callbacks: transformers' own kind, such as a tracker's.

    Examples:
        >>> settings = TeacherTrainConfig(epochs=1)
        >>> teacher = train_teacher("bert-base-uncased", splits, settings, folder="work/teacher")
    """
    encoder = load_encoder(source, splits.task, seed=seed, revision=revision)
    options = TrainingOptions(
        Path(folder), seed=seed, precision=precision, device=device, progress=progress, callbacks=callbacks
    )
    return train_arm(encoder, replace(splits, distil=None), settings, options)


def train_student(
    source: str | Encoder,
    splits: Splits,
    settings: TrainConfig = StudentTrainConfig(),
    *,
    folder: str | Path,
    lora: LoraSettings | None = LoraSettings(),
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train a student, with or without adapters; with a teacher where `attach_teacher` gave the splits one.

    Where the splits have unlabelled rows, a student with a teacher learns from them too, and one without draws as many
    rows an epoch, its labelled rows again and again, so that both take the same optimiser steps.

    Args:
        source: Hub id or folder of a pretrained encoder, or one that is already loaded.
        splits: the task with its examples, from `attach_teacher`; as loaded they train on the labels alone (the
            control).
        settings: epochs, learning rate and the like.
        folder: where checkpoints go; an interrupted training continues from there.
        lora: the adapters; None tunes every weight.
        seed: seeds the adapters, the new head, dropout and the order of the rows.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu` or `cuda`.
        progress: called with each training event.
        callbacks: transformers' own kind, such as a tracker's.

    Examples:
        >>> settings = StudentTrainConfig(epochs=1, learning_rate=5e-4)
        >>> trained = train_student("distilbert-base-uncased", taught, settings, folder="work/student")
    """
    encoder = load_encoder(source, splits.task, seed=seed) if isinstance(source, str) else source
    options = TrainingOptions(
        Path(folder),
        lora=lora,
        seed=seed,
        precision=precision,
        device=device,
        rows_per_epoch=rows_per_epoch(splits),
        progress=progress,
        callbacks=callbacks,
    )
    return train_arm(encoder, splits, settings, options)


def train_arm(encoder: Encoder, splits: Splits, settings: TrainConfig, options: TrainingOptions) -> Trained:
    """Train any arm on a loaded encoder; `train_teacher` and `train_student` name the usual choices."""
    final = settled(settings, encoder, splits, adapters=options.lora is not None)
    model = encoder.model if options.lora is None else add_adapter(encoder, options.lora, seed=options.seed)
    parameters = count_parameters(model)
    parts = {"train": splits.train, "validation": splits.validation}
    if splits.distil is not None and splits.unlabelled is not None:
        parts["unlabelled"] = splits.unlabelled
    windows = splits.task.windows
    tokens = {
        name: tokenise(rows, encoder.tokenizer, final.max_length, windows=windows) for name, rows in parts.items()
    }
    unseen = _unseen_words(tokens, encoder) if splits.task.kind == "tokens" else {}
    train = tokens["train"]
    if "unlabelled" in tokens:
        train = join_unlabelled(train, tokens["unlabelled"], splits.task)
    options = replace(
        options,
        distil=splits.distil,
        fresh=encoder.fresh,
        copies=0 if splits.distil is None else splits.copies,
    )
    outcome = train_model(model, encoder.tokenizer, train, tokens["validation"], splits.task, final, options)
    truncated = {name: part.truncated for name, part in tokens.items()}
    return Trained(encoder, model, outcome, parameters, truncated, unseen)


def _unseen_words(tokens: Mapping[str, Tokenised], encoder: Encoder) -> dict[str, int]:
    """Count the words of each split that have no token, and refuse a tokenizer that leaves none."""
    found = {}
    for name, part in tokens.items():
        seen = words_seen(part.dataset)
        if not seen.any():
            raise ModelError(
                f"the tokenizer of {encoder.source} drops all characters of the {name} words; choose another model"
            )
        found[name] = int((~seen).sum())
    return found
