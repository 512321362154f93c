"""What is known about a run before, and after, its training."""

from __future__ import annotations

from datetime import UTC, datetime

import torch
from datasets import Dataset
from torch import nn
from transformers.utils.logging import disable_progress_bar

from kdlora.config import Arm, Config
from kdlora.data.load import Splits
from kdlora.distil.fingerprints import hash_columns, hash_json
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_precision
from kdlora.evidence.records import RunRecord, collect_versions, describe_machine, git_state
from kdlora.experiment.arms import Trained
from kdlora.models.adapters import count_parameters


def splits_by_name(splits: Splits, *, scored: bool = False) -> dict[str, Dataset]:
    """Return the splits that an experiment has, or only those that models are scored on.

    Args:
        splits: the task with its examples.
        scored: leave out the training rows and the unlabelled ones.
    """
    seen = {} if scored else {"train": splits.train, "unlabelled": splits.unlabelled}
    parts = seen | {"validation": splits.validation, "test": splits.test}
    return {name: part for name, part in parts.items() if part is not None}


def hash_splits(splits: Splits) -> str:
    """Fingerprint the ids, texts and labels of every split, in their order.

    Args:
        splits: the task with its examples.

    Returns:
        Hexadecimal SHA-256.
    """
    parts = splits_by_name(splits).items()
    return hash_json({name: hash_columns(rows, sorted(rows.column_names)) for name, rows in parts})


def new_record(config: Config, splits: Splits, arm: Arm, seed: int) -> RunRecord:
    """Start the record of a run with everything that is known beforehand.

    Args:
        config: the experiment.
        splits: the task with its examples.
        arm: the arm.
        seed: the run's seed.
    """
    precision, reason = resolve_precision(config.run.precision, config.run.device)
    teacher, student = config.teacher, config.student
    student_name = student.model or f"{teacher.model}, layers {list(student.from_teacher_layers or ())}"
    teacher_name = teacher.fine_tuned or teacher.logits or teacher.probabilities or teacher.model
    return RunRecord(
        experiment=config.title(),
        task=splits.task.to_dict(),
        rows={name: len(part) for name, part in splits_by_name(splits).items()},
        arm=arm,
        seed=seed,
        status="running",
        teacher_model=teacher_name,
        student_model=student_name if student.model or student.from_teacher_layers else None,
        model=str(teacher_name if arm == "fft" else teacher.model if arm == "lora" else student_name),
        precision=precision,
        device=_device_name(config),
        fingerprints={"config": config.fingerprint(), "data": hash_splits(splits)},
        versions=collect_versions(),
        machine=describe_machine(),
        git=git_state(),
        started=now(),
        notes=[*_notes(splits), f"precision {precision}: {reason}", f"{torch.get_num_threads()} threads"],
        config=config.model_dump(mode="json"),
    )


def add_training(
    record: RunRecord, trained: Trained, teacher: TeacherLogits | None, unlabelled: TeacherLogits | None = None
) -> RunRecord:
    """Add what the training was and cost.

    Args:
        record: of the run.
        trained: what the training left.
        teacher: what taught; the texts that it read cut are counted too.
        unlabelled: its logits of the unlabelled rows.
    """
    outcome, parameters = trained.outcome, trained.parameters
    sources = {"train (by the teacher)": teacher, "unlabelled (by the teacher)": unlabelled}
    by_teacher = {name: logits.truncated for name, logits in sources.items() if logits is not None}
    return record.model_copy(
        update={
            "history": outcome.history,
            "train_seconds": outcome.train_seconds,
            "evaluation_seconds": outcome.evaluation_seconds,
            "examples_per_second": outcome.examples_per_second,
            "best_epoch": outcome.best_epoch,
            "trainable_parameters": parameters.trainable,
            "adapter_parameters": parameters.adapter,
            "head_parameters": parameters.head,
            "truncated": trained.truncated | by_teacher,
        }
    )


def add_size(record: RunRecord, model: nn.Module) -> RunRecord:
    """Add how large the model is as it would be shipped.

    Args:
        record: of the run.
        model: a plain model; `size_bytes` is that of its weights file.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return record.model_copy(update={"total_parameters": count_parameters(model).total, "size_bytes": size})


def _notes(splits: Splits) -> list[str]:
    """Say what was done to the data, what the unlabelled rows are for, and what keeps the control fair."""
    if splits.unlabelled is None or len(splits.unlabelled) == splits.copies:
        return list(splits.notes)
    count = len(splits.unlabelled) - splits.copies
    return [
        *splits.notes,
        f"{count} unlabelled rows: the teacher labelled them, and the distilled arms learn from them "
        "too; the other student arms see the labelled rows alone, as often as it takes for the same optimiser steps",
    ]


def _device_name(config: Config) -> str:
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_name())


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def prepare_process(config: Config) -> None:
    """Set the threads that the config names, and leave the terminal to the experiment's own progress.

    Args:
        config: the experiment.
    """
    disable_progress_bar()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
