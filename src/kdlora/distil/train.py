"""Training of one model on one task, with or without a teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from kdlora.config import DistilConfig, SettledTraining
from kdlora.data.batches import Collator, LengthBucketSampler, Tokenised
from kdlora.data.spool import hash_columns
from kdlora.data.tasks import Task
from kdlora.distil.cpu_kernels import fast_on_cpu
from kdlora.distil.fingerprints import hash_model
from kdlora.distil.inference import INPUTS, column_values, predict_logits
from kdlora.distil.logits import COLUMN, LABELLED, labelled_values
from kdlora.distil.losses import DivergedError, diverged
from kdlora.distil.precision import frozen_in_half, resolve_device, settle_precision
from kdlora.distil.processes import TIMEOUT_SECONDS, current_processes
from kdlora.distil.resume import CheckpointFolder, load_trained_tensors
from kdlora.distil.session import Session, TrainingOptions
from kdlora.distil.standardise import TargetScale, fold_into_head
from kdlora.distil.trainer import ArmTrainer
from kdlora.distil.training_modes import activations_recomputed, dropout_set, freed_memory_kept
from kdlora.errors import DataError, KdLoraError
from kdlora.evidence.metrics import compute_metrics, score

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_LOGS_PER_TRAINING = 100


@dataclass(frozen=True)
class TrainOutcome:
    """What a training left besides the weights.

    Attributes:
        history: per epoch: `epoch`, `step`, `loss`, `hard_loss`, `soft_loss` where a teacher taught (means over the
            epoch's rows, of a regression on the standardised scale), `learning_rate`, validation metrics, `score`.
        train_seconds: of the training loop, data included; evaluation and saving excluded.
        evaluation_seconds: of the validations.
        examples: rows trained on, repeats included.
        examples_per_second: `examples / train_seconds`.
        steps: optimiser steps.
        best_epoch: the epoch whose weights the model holds.
    """

    history: list[dict[str, Any]]
    train_seconds: float
    evaluation_seconds: float
    examples: int
    examples_per_second: float
    steps: int
    best_epoch: float


def train_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Tokenised,
    validation: Tokenised,
    task: Task,
    settings: SettledTraining,
    options: TrainingOptions,
) -> TrainOutcome:
    """Train a model in place, from fp32; it is left holding the selected weights, in evaluation mode.

    A call with the same arguments and folder continues from the last whole checkpoint, to the same bits. Ctrl-C and
    SIGTERM end the step, save and stop (`TrainingStoppedError`); a second one stops at once. The folder stays until
    the caller has kept the weights. A regression trains on standardised targets, which are folded into the head.

    Of several processes that torch.distributed has joined all must call, with the same arguments. An optimiser step
    then has `batch_size` rows of each, and the first process alone writes.
    """
    _check(train, validation, options.distil)
    processes, folder = current_processes(), Path(options.folder)
    precision, _ = settle_precision(options.precision, options.device, folder / "precision.json")
    options = dataclasses.replace(options, precision=processes.first_says(precision))  # `auto` is timed: one answer
    device = resolve_device(options.device)
    scale = TargetScale.of(labelled_values(train.dataset)) if task.kind == "regression" else None

    def validate() -> dict[str, float]:
        logits = predict_logits(model, tokenizer, validation, precision=options.precision, processes=processes)
        if not np.isfinite(logits).all():
            raise KdLoraError(diverged("the validation logits are not finite numbers", settings.learning_rate))
        rows = validation.dataset
        groups = column_values(rows, "group").tolist() if "group" in rows.column_names else None
        logits = logits if scale is None else scale.restore(logits)
        metrics = compute_metrics(task, logits, column_values(rows, "label"), groups)
        return metrics | {"score": score(task, metrics)}

    sampler = LengthBucketSampler(
        column_values(train.dataset, "length"),
        settings.batch_size * processes.count,
        seed=options.seed,
        rows_per_epoch=options.rows_per_epoch,
        beside=options.copies,
    )
    ingredients = _ingredients(model, train, validation, task, settings, options)
    ingredients |= {"device": device.type, "processes": processes.count}
    checkpoints = CheckpointFolder(folder, ingredients, options.keep_checkpoints)
    session = Session(settings, options, sampler, validate, checkpoints, processes)
    with _at_work(model, settings, options.precision, device):
        arguments, names = _arguments(settings, options, device, len(sampler)), _columns(options.distil)
        rows = train.dataset.select_columns([name for name in names if name in train.dataset.column_names])
        collator = Collator.of(tokenizer, task.kind, train.max_length)
        trainer = ArmTrainer(
            model, arguments, session, kind=task.kind, target_scale=scale, rows=rows, collator=collator
        )
        try:
            trainer.run()
        except DivergedError as fault:
            raise _explain(fault, trainer, train.dataset) from None
        processes.first_says(None)  # its best weights lie on the disk now
    return _finish(model, session, scale)


@contextmanager
def _at_work(model: nn.Module, settings: SettledTraining, precision: str, device: torch.device) -> Iterator[None]:
    """Set what holds while a model trains; afterwards all is as it was."""
    with (
        freed_memory_kept(device),
        frozen_in_half(model, precision),
        dropout_set(model, settings.dropout),
        fast_on_cpu(model, device),
        activations_recomputed(model, settings.gradient_checkpointing),
        _left_as_found(model),
    ):
        yield


def _check(train: Tokenised, validation: Tokenised, distil: DistilConfig | None) -> None:
    for name, data in (("training", train), ("validation", validation)):
        if len(data.dataset) == 0:
            raise DataError(f"the {name} split has no rows")
        if "label" not in data.dataset.column_names:
            raise DataError(f"the {name} split has no column 'label'; it has {', '.join(data.dataset.column_names)}")
    if distil is not None and COLUMN not in train.dataset.column_names:
        raise DataError(
            "distil is set, but the training rows have no teacher_logits; TeacherLogits.attach(dataset) adds them, "
            "before tokenise"
        )
    if distil is None and LABELLED in train.dataset.column_names:
        raise DataError("rows without labels teach by their teacher alone, but distil is None; leave them out")


def _explain(fault: DivergedError, trainer: ArmTrainer, data: Dataset) -> KdLoraError:
    """Add the rows of the step to a divergence, and what is left from before it."""
    text = str(fault)
    if fault.step > 0 and "id" in data.column_names:
        ids = data.select(trainer.rows_of_step(fault.step))["id"][:]
        shown = ", ".join(repr(name) for name in ids[:8]) + (", …" if len(ids) > 8 else "")
        text += f". The step's {len(ids)} rows: {shown}"
    kept = trainer.session.checkpoints.newest()
    last = "none was written yet" if kept is None else f"{kept}, from before that"
    return KdLoraError(f"{text}. Last good checkpoint: {last}")


def _finish(model: nn.Module, session: Session, scale: TargetScale | None) -> TrainOutcome:
    """Choose the weights, bring them to the original scale, and sum up."""
    chosen = session.history[-1]
    if session.settings.select == "best":
        chosen = session.best or chosen
        load_trained_tensors(model, load_file(session.checkpoints.best))
    model.eval()
    if scale is not None:
        fold_into_head(model, scale)
    seconds = session.watch.read()
    return TrainOutcome(
        history=session.history,
        train_seconds=seconds,
        evaluation_seconds=session.evaluation.read(),
        examples=session.examples,
        examples_per_second=session.examples / max(seconds, 1e-9),
        steps=int(session.history[-1]["step"]),
        best_epoch=float(chosen["epoch"]),
    )


def _ingredients(
    model: nn.Module,
    train: Tokenised,
    validation: Tokenised,
    task: Task,
    settings: SettledTraining,
    options: TrainingOptions,
) -> dict[str, Any]:
    """Name what a checkpoint must not outlive."""
    return {
        "model": hash_model(model),
        "train": hash_columns(train.dataset, ["id", *_columns(options.distil)]),
        "validation": hash_columns(validation.dataset, ["id", *INPUTS, "label", "group"]),
        "settings": settings.model_dump(mode="json"),
        "distil": None if options.distil is None else options.distil.model_dump(mode="json"),
        "lora": None if options.lora is None else options.lora.model_dump(mode="json"),
        "task": task.to_dict(),
        "seed": options.seed,
        "precision": options.precision,
        "rows_per_epoch": options.rows_per_epoch,
        "copies": options.copies,
    }


def _columns(distil: DistilConfig | None) -> list[str]:
    """Name the columns that training reads: without `distil` the teacher's stay unread, so that a control is one."""
    return [*INPUTS, "label", *([COLUMN, LABELLED] if distil is not None else [])]


def _arguments(
    settings: SettledTraining, options: TrainingOptions, device: torch.device, steps_per_epoch: int
) -> TrainingArguments:
    """Say it in the words of transformers."""
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
        logging_strategy="steps",
        logging_steps=max(1, steps // _LOGS_PER_TRAINING),
        logging_nan_inf_filter=False,  # it would hide a diverged loss, and reads it in every step
        save_strategy="no",
        eval_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        ddp_broadcast_buffers=False,  # none of them changes, and processes run different numbers of micro-batches
        ddp_timeout=TIMEOUT_SECONDS,
        push_to_hub=False,
    )
    if arguments.n_gpu > 1:  # Trainer would split every batch over all devices that it sees
        arguments._n_gpu = 1
    return arguments


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Take back what Trainer and Accelerate leave on a model: a forward under autocast, and a config entry.

    Under that forward, a model trained in bf16 would go on computing in bf16 wherever it is used afterwards.
    """
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    known = config is not None and "use_cache" in vars(config)
    own_forward = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("_original_forward", None)
        vars(model).pop("forward", None)
        if own_forward is not None:
            vars(model)["forward"] = own_forward
        if known and config is not None:
            config.use_cache = use_cache
        elif config is not None:
            vars(config).pop("use_cache", None)
