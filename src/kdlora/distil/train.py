"""Training of one model on one task, with or without a teacher."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from kdlora.config import DistilConfig, SettledTraining
from kdlora.data.batches import INPUTS, Collator, LengthBucketSampler, MicroBatchCollator, Tokenised
from kdlora.data.spool import hash_columns, label_array, read_column
from kdlora.data.tasks import Task, named_weights
from kdlora.data.word_tokens import READ, word_offsets
from kdlora.distil.cpu_kernels import fast_on_cpu
from kdlora.distil.inference import CPU_TOKENS, faulty_rows, hash_model, predict_logits
from kdlora.distil.logits import COLUMN, LABELLED, labelled_values
from kdlora.distil.losses import DivergedError, TargetScale, diverged, fold_into_head, start_at_shares
from kdlora.distil.precision import (
    activations_recomputed,
    dropout_set,
    freed_memory_kept,
    frozen_in_half,
    left_as_found,
    resolve_device,
    settle_precision,
)
from kdlora.distil.processes import TIMEOUT_SECONDS, current_processes
from kdlora.distil.resume import CheckpointFolder
from kdlora.distil.trainer import ArmTrainer, TrainingOptions, TrainOutcome
from kdlora.errors import KdLoraError
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.models.adapters import ParameterCounts
from kdlora.models.encoders import Encoder
from kdlora.section import OpenClassWeights, without_later_keys

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_LOGS_PER_TRAINING = 100


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


def train_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Tokenised,
    validation: Tokenised,
    task: Task,
    settings: SettledTraining,
    options: TrainingOptions,
) -> TrainOutcome:
    """Train a model in place, from fp32, in all processes at once; the same call continues from the last checkpoint."""
    processes, device = current_processes(), resolve_device(options.device)
    precision, _ = settle_precision(options.precision, options.device, options.folder / "precision.json")
    options = dataclasses.replace(options, precision=processes.first_says(precision))  # `auto` is timed: one answer
    labels, rows = labelled_values(train.dataset), validation.dataset
    weights = class_weights(task, settings.class_weights, labels)
    if task.kind in ("tokens", "multi-label"):
        start_at_shares(model, task, labels, weights)
    scale = TargetScale.of(labels) if task.kind == "regression" else None

    def validate() -> dict[str, float]:
        logits = predict_logits(model, tokenizer, validation, precision=options.precision, processes=processes)
        if len(faulty_rows(logits, validation)):
            raise KdLoraError(diverged("the validation logits are not finite numbers", settings.learning_rate))
        groups = read_column(rows, "group").to_pylist() if "group" in rows.column_names else None
        outputs = logits if scale is None else scale.restore(logits)
        metrics = compute_metrics(task, outputs, label_array(rows), groups, offsets=word_offsets(rows))
        return metrics | {"score": score(task, metrics)}

    sampler = LengthBucketSampler(
        read_column(train.dataset, "length").to_numpy(),
        settings.batch_size * processes.count,
        seed=options.seed,
        rows_per_epoch=options.rows_per_epoch,
        beside=options.copies,
    )
    ingredients = _ingredients(model, train, validation, task, settings, options)
    most = min(settings.micro_batch_tokens or sys.maxsize, 2 * CPU_TOKENS if device.type == "cpu" else sys.maxsize)
    collator = MicroBatchCollator(Collator.of(tokenizer, task.kind, train.max_length, device), most)
    with _at_work(model, settings, options.precision, device):
        trainer = ArmTrainer(
            model,
            _arguments(settings, options, device, len(sampler)),
            settings,
            options,
            sampler=sampler,
            checkpoints=CheckpointFolder(options.folder, ingredients, options.keep_checkpoints),
            validate=validate,
            kind=task.kind,
            target_scale=scale,
            class_weights=weights,
            pool=train.pool,
            train_dataset=_columns_read(train.dataset, options.distil),
            data_collator=collator,
        )
        try:
            outcome = trainer.run()
        except DivergedError as fault:
            raise _explain(fault, trainer, train.dataset) from None
    if scale is not None:
        fold_into_head(model, scale)
    return outcome


@contextmanager
def _at_work(model: nn.Module, settings: SettledTraining, precision: str, device: torch.device) -> Iterator[None]:
    with (
        freed_memory_kept(device),
        frozen_in_half(model, precision),
        dropout_set(model, settings.dropout),
        fast_on_cpu(model, device),
        activations_recomputed(model, settings.gradient_checkpointing),
        left_as_found(model),
    ):
        yield


def class_weights(task: Task, given: OpenClassWeights | None, labels: np.ndarray) -> torch.Tensor | None:
    """Give the factors of the hard loss; `balanced` ones have mean 1 over the rows, so the teacher's share stays."""
    given = task.auto_weights() if given == "auto" else given
    if given is None:
        return None
    named, weights = named_weights(task, given), np.ones(task.num_labels)
    weights[list(named)] = list(named.values())
    if given == "balanced" and task.kind == "multi-label":
        rows = labels.sum(axis=0)
        np.divide(len(labels) - rows, rows, out=weights, where=(rows > 0) & (rows < len(labels)))
    elif given == "balanced":
        rows = np.bincount(labels, minlength=task.num_labels)
        np.divide(len(labels) / np.count_nonzero(rows), rows, out=weights, where=rows > 0)
    return torch.tensor(weights, dtype=torch.float32)


def _explain(fault: DivergedError, trainer: ArmTrainer, data: Dataset) -> KdLoraError:
    """Add the rows of the step to a divergence, and what is left from before it."""
    text = str(fault)
    if "id" in data.column_names:
        ids = data.select(trainer.rows_of_step(fault.step))["id"][:]
        shown = ", ".join(repr(name) for name in ids[:8]) + (", …" if len(ids) > 8 else "")
        text += f". The step's {len(ids)} rows: {shown}"
    kept = trainer.checkpoints.latest()
    last = "none was written yet" if kept is None else f"{kept.folder}, from before that"
    return KdLoraError(f"{text}. Last good checkpoint: {last}")


def _columns_read(rows: Dataset, distil: DistilConfig | None) -> Dataset:
    """Leave what training reads: without `distil` the teacher's columns stay unread, so that a control is one."""
    names = [*INPUTS, "label", *([COLUMN, LABELLED] if distil is not None else []), *READ]
    return rows.select_columns([name for name in names if name in rows.column_names])


def _ingredients(
    model: nn.Module,
    train: Tokenised,
    validation: Tokenised,
    task: Task,
    settings: SettledTraining,
    options: TrainingOptions,
) -> dict[str, Any]:
    """Name what a checkpoint must not outlive."""
    read = _columns_read(train.dataset, options.distil).column_names
    recipes = {"settings": settings, "distil": options.distil, "lora": options.lora}
    return {
        "model": hash_model(model),
        "train": hash_columns(train.dataset, ["id", *read]),
        "validation": hash_columns(validation.dataset, ["id", *INPUTS, "label", "group", *READ]),
        "task": task.to_dict(),
        "device": resolve_device(options.device).type,
        "processes": current_processes().count,
        **{name: recipe and without_later_keys(recipe.model_dump(mode="json")) for name, recipe in recipes.items()},
        **{name: getattr(options, name) for name in ("seed", "precision", "rows_per_epoch", "copies")},
    }


def _arguments(
    settings: SettledTraining, options: TrainingOptions, device: torch.device, steps_per_epoch: int
) -> TrainingArguments:
    precision = options.precision
    steps = math.ceil(settings.epochs * steps_per_epoch)
    arguments = TrainingArguments(
        output_dir=str(options.folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_fraction,
        optim="adamw_torch_fused",
        seed=options.seed,
        data_seed=options.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=max(1, steps // _LOGS_PER_TRAINING),
        logging_nan_inf_filter=False,  # it would hide a diverged loss, and reads it in every step
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        ddp_broadcast_buffers=False,  # none of them changes, and processes run different numbers of micro-batches
        ddp_timeout=TIMEOUT_SECONDS,
    )
    if arguments.n_gpu > 1:  # Trainer would split every batch over all devices that it sees
        arguments._n_gpu = 1
    return arguments
