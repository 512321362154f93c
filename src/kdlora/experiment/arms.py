"""One run, an arm with a seed: build its model, train it, measure what would be shipped, keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from kdlora.config import DistilConfig, LoraConfig, StudentTrainConfig, TeacherTrainConfig, TrainConfig
from kdlora.data.batches import Tokenised, tokenise
from kdlora.data.load import Splits
from kdlora.data.tasks import Task
from kdlora.distil.inference import predict_logits
from kdlora.distil.logits import TeacherLogits, join_unlabelled
from kdlora.distil.session import ProgressEvent
from kdlora.distil.trainer import TrainOutcome, train_model
from kdlora.errors import ConfigError, DataError
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.experiment.settle import settled
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
    """

    encoder: Encoder
    model: Any = field(repr=False)
    outcome: TrainOutcome
    parameters: ParameterCounts
    truncated: dict[str, int]


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on one split.

    Attributes:
        score: the task's main figure, 0 to 100.
        metrics: every metric, as fractions.
        logits: float32 `(examples, labels)`, in row order, on the original scale for regression.
        truncated: texts that were cut.
    """

    score: float
    metrics: dict[str, float]
    logits: np.ndarray = field(repr=False)
    truncated: int


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
    """
    encoder = load_encoder(source, splits.task, seed=seed, revision=revision)
    return train_arm(
        encoder,
        splits,
        settings,
        folder=folder,
        seed=seed,
        precision=precision,
        device=device,
        progress=progress,
        callbacks=callbacks,
    )


def train_student(
    source: str | Encoder,
    splits: Splits,
    settings: TrainConfig = StudentTrainConfig(),
    *,
    folder: str | Path,
    lora: LoraConfig | None = LoraConfig(),
    teacher: TeacherLogits | None = None,
    unlabelled: TeacherLogits | None = None,
    distil: DistilConfig = DistilConfig(),
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train a student, with or without adapters, with or without a teacher.

    Where the splits have unlabelled rows, a student with a teacher learns from them too, and one without draws as many
    rows an epoch, its labelled rows again and again, so that both take the same optimiser steps.

    Args:
        source: Hub id or folder of a pretrained encoder, or one that is already loaded.
        splits: the task with its examples.
        settings: epochs, learning rate and the like.
        folder: where checkpoints go; an interrupted training continues from there.
        lora: the adapters; None tunes every weight.
        teacher: stored teacher logits; None trains on the labels alone (the control).
        unlabelled: the teacher's logits of the unlabelled rows; needed with a teacher where the splits have such rows.
        distil: the distillation loss; only used with a teacher.
        seed: seeds the adapters, the new head, dropout and the order of the rows.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu` or `cuda`.
        progress: called with each training event.
        callbacks: transformers' own kind, such as a tracker's.
    """
    encoder = load_encoder(source, splits.task, seed=seed) if isinstance(source, str) else source
    return train_arm(
        encoder,
        splits,
        settings,
        folder=folder,
        lora=lora,
        teacher=teacher,
        unlabelled=unlabelled,
        distil=distil,
        seed=seed,
        precision=precision,
        device=device,
        rows_per_epoch=rows_per_epoch(splits),
        progress=progress,
        callbacks=callbacks,
    )


def rows_per_epoch(splits: Splits) -> int:
    """Count the rows that an epoch of every student arm draws: the training rows and the unlabelled ones.

    Perturbed copies do not make an epoch longer: a distilled arm has one beside every other row of a step. Rows that a
    search holds out do not make it shorter: its trainings take as many steps as those that they stand for.
    """
    more = 0 if splits.unlabelled is None else len(splits.unlabelled)
    return len(splits.train) + splits.held_out + more - splits.copies


def train_arm(
    encoder: Encoder,
    splits: Splits,
    settings: TrainConfig,
    *,
    folder: str | Path,
    lora: LoraConfig | None = None,
    teacher: TeacherLogits | None = None,
    unlabelled: TeacherLogits | None = None,
    distil: DistilConfig | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    checkpoint_seconds: float = 60.0,
    keep_checkpoints: int = 1,
    rows_per_epoch: int | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train any arm on a loaded encoder; `train_teacher` and `train_student` name the usual choices."""
    settings = settled(settings, encoder, splits.train, adapters=lora is not None)
    model = encoder.model if lora is None else add_adapter(encoder, lora, seed=seed)
    parameters = count_parameters(model)
    train, truncated = _training_rows(splits, encoder, settings.max_length, teacher, unlabelled)
    validation = tokenise(splits.validation, encoder.tokenizer, settings.max_length)
    outcome = train_model(
        model,
        encoder.tokenizer,
        train,
        validation,
        splits.task,
        settings,
        seed=seed,
        precision=precision,
        device=device,
        distil=None if teacher is None else _fitting(distil or DistilConfig(), teacher),
        lora=lora,
        fresh=encoder.fresh,
        folder=Path(folder),
        checkpoint_seconds=checkpoint_seconds,
        keep_checkpoints=keep_checkpoints,
        rows_per_epoch=rows_per_epoch,
        copies=0 if teacher is None else splits.copies,
        callbacks=callbacks,
        progress=progress,
    )
    return Trained(encoder, model, outcome, parameters, truncated | {"validation": validation.truncated})


def _fitting(distil: DistilConfig, teacher: TeacherLogits) -> DistilConfig:
    """Refuse a loss that compares logits where the teacher has none."""
    if distil.loss == "mse" and teacher.from_probabilities:
        raise ConfigError("distil.loss: mse compares logits, and this teacher gives probabilities; use kl")
    return distil


def _training_rows(
    splits: Splits, encoder: Encoder, max_length: int, teacher: TeacherLogits | None, unlabelled: TeacherLogits | None
) -> tuple[Tokenised, dict[str, int]]:
    """Tokenise what an arm learns from, and count the texts that were cut."""
    rows = splits.train if teacher is None else teacher.attach(splits.train)
    train = tokenise(rows, encoder.tokenizer, max_length)
    if teacher is None or splits.unlabelled is None:
        return train, {"train": train.truncated}
    if unlabelled is None:
        raise DataError("the splits have unlabelled rows, but no teacher logits of them were given; pass unlabelled=")
    more = tokenise(unlabelled.attach(splits.unlabelled), encoder.tokenizer, max_length)
    return join_unlabelled(train, more, splits.task), {"train": train.truncated, "unlabelled": more.truncated}


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Dataset,
    task: Task,
    *,
    max_length: int | None = None,
    columns: Sequence[int] | None = None,
) -> Evaluation:
    """Score a model on labelled examples, in fp32, as it would be shipped.

    Args:
        model: a plain model, its adapter merged.
        tokenizer: the model's own.
        examples: rows with `text`, `label` and for MNLI `group`.
        task: kind, labels and metrics.
        max_length: longest input in tokens; default: the model's own limit.
        columns: column of the model's output for each label of the task; default: the same order.
    """
    if "label" not in examples.column_names:
        raise DataError("these examples have no labels, so there is nothing to score; use predict")
    data = tokenise(examples, tokenizer, max_length or tokenizer.model_max_length)
    logits = predict_logits(model, tokenizer, data)
    if columns is not None:
        logits = logits[:, list(columns)]
    groups = list(examples["group"]) if "group" in examples.column_names else None
    metrics = compute_metrics(task, logits, label_array(examples), groups)
    return Evaluation(score(task, metrics), metrics, logits, data.truncated)


def label_array(examples: Dataset) -> np.ndarray:
    """Return the labels of a data set."""
    return np.asarray(examples.with_format("numpy")["label"][:])
