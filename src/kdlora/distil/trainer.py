"""Training of one model on one task, with or without a teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from kdlora.config import DistilConfig, LoraConfig, SettledTraining
from kdlora.data.batches import Collator, LengthBucketSampler, Tokenised
from kdlora.data.row_hash import hash_columns
from kdlora.data.tasks import Task
from kdlora.distil.arm_trainer import ArmTrainer, MicroBatchCollator
from kdlora.distil.fast_cpu import fast_on_cpu
from kdlora.distil.fingerprints import hash_model
from kdlora.distil.inference import INPUTS, column_values, predict_logits
from kdlora.distil.logits import COLUMN, LABELLED, labelled_values
from kdlora.distil.loss_sums import DivergedError, diverged
from kdlora.distil.precision import frozen_in_half, resolve_device, settle_precision
from kdlora.distil.processes import TIMEOUT_SECONDS, Processes, current_processes
from kdlora.distil.resume import CheckpointFolder, load_trained_tensors
from kdlora.distil.session import ProgressEvent, Session
from kdlora.distil.standardise import TargetScale, fold_into_head
from kdlora.distil.training_modes import activations_recomputed, dropout_set, freed_memory_kept
from kdlora.errors import DataError, KdLoraError
from kdlora.evidence.metrics import compute_metrics, score

logger = logging.getLogger(__name__)

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
    *,
    seed: int,
    precision: str,
    device: str = "auto",
    distil: DistilConfig | None = None,
    lora: LoraConfig | None = None,
    fresh: Sequence[str] = (),
    folder: Path,
    checkpoint_seconds: float = 60.0,
    keep_checkpoints: int = 1,
    rows_per_epoch: int | None = None,
    copies: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Callable[[ProgressEvent], None] | None = None,
) -> TrainOutcome:
    """Train a model in place; it is left holding the selected weights, in evaluation mode.

    The same seed on the same machine gives the same bits, whether or not the training was interrupted: a call with
    the same arguments and folder continues from the last whole checkpoint. Ctrl-C and SIGTERM end the step, save and
    stop (`TrainingStoppedError`, a KeyboardInterrupt); a second one stops at once. The folder stays until the caller
    has kept the weights and removes it. Validation runs in the precision of training. A regression trains on
    standardised targets, which are folded into the head at the end, so that the model predicts on the original
    scale.

    Where torch.distributed is set up with several processes, all of them must call, with the same arguments. An
    optimiser step then has `batch_size` rows of each, and the first process alone writes.

    Args:
        model: a transformers classifier in fp32, with or without an adapter, as it is before any training.
        tokenizer: the model's own.
        train: token ids with labels and, for `distil`, `teacher_logits`.
        validation: token ids with labels.
        task: kind, labels and metrics.
        settings: epochs, learning rate and the like.
        seed: seeds dropout and the order of the rows.
        precision: `auto`, `fp32`, `bf16` or `fp16`; what `auto` was found to be is kept in the folder.
        device: `auto`, `cpu` or `cuda`.
        distil: weights and temperature; None trains on the labels alone, whether or not there are teacher logits.
        lora: of the model's adapter; a checkpoint of another one is refused, for its scale is in no weight.
        fresh: names of the modules that `settings.head_learning_rate` is for: the encoder's `fresh`.
        folder: of this training alone, for checkpoints.
        checkpoint_seconds: training time between two checkpoints.
        keep_checkpoints: newest ones to keep.
        rows_per_epoch: rows that an epoch draws; default: every row once. A control with fewer rows thereby does as
            many optimiser steps as the arm that it is compared with.
        copies: how many of the last rows are perturbed copies, of which every step has as many as of the others.
        callbacks: transformers' own kind.
        progress: told every half second, and after every epoch, where the training stands.

    Raises:
        DataError: rows without labels, no rows, or no teacher logits.
        ArtifactError: the folder holds checkpoints of another training.
        ConfigError: a learning rate of the head, but no such module.
        KdLoraError: the training diverged.
    """
    _check(train, validation, distil)
    processes = current_processes()
    settled, _ = settle_precision(precision, device, Path(folder) / "precision.json")
    precision = processes.first_says(settled)  # `auto` is timed: let it be one answer
    place = resolve_device(device)
    scale = TargetScale.of(labelled_values(train.dataset)) if task.kind == "regression" else None
    ingredients = _ingredients(model, train, validation, task, settings, distil, lora)
    ingredients |= {"seed": seed, "precision": precision, "device": place.type, "rows_per_epoch": rows_per_epoch}
    ingredients |= {"copies": copies}
    ingredients["processes"] = processes.count
    checkpoints = CheckpointFolder(Path(folder), ingredients, keep_checkpoints)
    lengths = column_values(train.dataset, "length")
    rows_per_step = settings.batch_size * processes.count
    sampler = LengthBucketSampler(lengths, rows_per_step, seed=seed, rows_per_epoch=rows_per_epoch, beside=copies)
    session = _session(settings, len(sampler), checkpoint_seconds, progress, processes)
    collator = Collator.of(tokenizer, task.kind, train.max_length)
    with (
        freed_memory_kept(place),
        frozen_in_half(model, precision),
        dropout_set(model, settings.dropout),
        fast_on_cpu(model, place),
        activations_recomputed(model, settings.gradient_checkpointing),
        _left_as_found(model),
    ):
        trainer = ArmTrainer(
            model,
            _arguments(settings, seed, precision, place, Path(folder), len(sampler)),
            kind=task.kind,
            distil=distil,
            target_scale=scale,
            train_dataset=_rows(train, distil),
            sampler=sampler,
            collator=MicroBatchCollator(collator, settings.micro_batch_tokens),
            validate=lambda: _validate(model, tokenizer, validation, task, precision, scale, settings, processes),
            checkpoints=checkpoints,
            session=session,
            fresh=fresh,
            head_learning_rate=settings.head_learning_rate,
            callbacks=callbacks,
        )
        if processes.count > 1:  # each draws its own dropout; the weights are those of the first
            torch.manual_seed(seed * processes.count + processes.rank)
        try:
            _run(trainer, checkpoints, session)
        except DivergedError as fault:
            raise _explain(fault, trainer, checkpoints, train.dataset) from None
        processes.first_says(None)  # its best weights lie on the disk now
    return _finish(model, settings, session, checkpoints, scale)


def _session(
    settings: SettledTraining,
    steps_per_epoch: int,
    checkpoint_seconds: float,
    progress: Callable[[ProgressEvent], None] | None,
    processes: Processes,
) -> Session:
    return Session(
        steps_per_epoch=steps_per_epoch,
        epochs=settings.epochs,
        select=settings.select,
        patience=settings.early_stopping_patience,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
        processes=processes,
    )


def _explain(fault: DivergedError, trainer: ArmTrainer, checkpoints: CheckpointFolder, data: Dataset) -> KdLoraError:
    """Add the rows of the step to a divergence, and what is left from before it."""
    text = str(fault)
    if fault.step > 0 and "id" in data.column_names:
        ids = data.select(trainer.rows_of_step(fault.step))["id"][:]
        shown = ", ".join(repr(name) for name in ids[:8]) + (", …" if len(ids) > 8 else "")
        text += f". The step's {len(ids)} rows: {shown}"
    kept = checkpoints.newest()
    last = "none was written yet" if kept is None else f"{kept}, from before that"
    return KdLoraError(f"{text}. Last good checkpoint: {last}")


def _run(trainer: ArmTrainer, checkpoints: CheckpointFolder, session: Session) -> None:
    """Train, from the last checkpoint where there is one."""
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        with session.stop:
            trainer.train()
        return
    trainer.resume(checkpoint)
    logger.info("continuing from %s", checkpoint.folder)
    if not session.finished:
        with session.stop:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder))


def _finish(
    model: nn.Module,
    settings: SettledTraining,
    session: Session,
    checkpoints: CheckpointFolder,
    scale: TargetScale | None,
) -> TrainOutcome:
    """Choose the weights, bring them to the original scale, and sum up."""
    chosen = session.history[-1]
    if settings.select == "best":
        chosen = max(session.history, key=lambda entry: float(entry["score"]))
        load_trained_tensors(model, load_file(checkpoints.best))
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
    distil: DistilConfig | None,
    lora: LoraConfig | None,
) -> dict[str, Any]:
    """Name what a checkpoint must not outlive."""
    return {
        "model": hash_model(model),
        "train": hash_columns(train.dataset, ["id", *_columns(distil)]),
        "validation": hash_columns(validation.dataset, ["id", *INPUTS, "label", "group"]),
        "settings": settings.model_dump(mode="json"),
        "distil": None if distil is None else distil.model_dump(mode="json"),
        "lora": None if lora is None else lora.model_dump(mode="json"),
        "task": task.to_dict(),
    }


def _columns(distil: DistilConfig | None) -> list[str]:
    """Name the columns that training reads: without `distil` the teacher's stay unread, so that a control is one."""
    return [*INPUTS, "label", *([COLUMN, LABELLED] if distil is not None else [])]


def _rows(train: Tokenised, distil: DistilConfig | None) -> Dataset:
    return train.dataset.select_columns([name for name in _columns(distil) if name in train.dataset.column_names])


def _arguments(
    settings: SettledTraining, seed: int, precision: str, device: torch.device, folder: Path, steps_per_epoch: int
) -> TrainingArguments:
    """Say it in the words of transformers."""
    steps = math.ceil(settings.epochs * steps_per_epoch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_fraction,
        optim="adamw_torch_fused",
        seed=seed,
        data_seed=seed,
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


def _validate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    validation: Tokenised,
    task: Task,
    precision: str,
    scale: TargetScale | None,
    settings: SettledTraining,
    processes: Processes,
) -> dict[str, float]:
    """Give the validation metrics, on the original scale, and `score`."""
    logits = predict_logits(model, tokenizer, validation, precision=precision, processes=processes)
    if not np.isfinite(logits).all():
        raise KdLoraError(diverged("the validation logits are not finite numbers", settings.learning_rate))
    if scale is not None:
        logits = scale.restore(logits)
    rows = validation.dataset
    groups = column_values(rows, "group").tolist() if "group" in rows.column_names else None
    metrics = compute_metrics(task, logits, column_values(rows, "label"), groups)
    return metrics | {"score": score(task, metrics)}


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
