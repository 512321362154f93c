"""What is known about a run before and after its training, where it began, and its log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar

from kdlora.config import Arm, Config
from kdlora.data.load import Splits
from kdlora.data.spool import hash_columns
from kdlora.distil.inference import hash_model, hash_tokenizer
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import settle_precision
from kdlora.distil.words import BAG_OF_WORDS
from kdlora.errors import ArtifactError
from kdlora.evidence.records import ExperimentLayout, RunRecord, read_record
from kdlora.experiment.arms import Trained
from kdlora.models.encoders import Encoder
from kdlora.system.environment import collect_versions, describe_machine, git_state
from kdlora.system.integrity import hash_json

_MEANING = {
    "data": "the data",
    "base": "the pretrained model, its weights or its tokenizer,",
    "teacher": "what the teacher says about the training rows",
}
logger = logging.getLogger(__name__)


def splits_by_name(splits: Splits, *, scored: bool = False) -> dict[str, Dataset]:
    """Return the splits that an experiment has, or only those that models are scored on."""
    seen = {} if scored else {"train": splits.train, "unlabelled": splits.unlabelled}
    parts = seen | {"validation": splits.validation, "test": splits.test}
    return {name: part for name, part in parts.items() if part is not None}


def hash_splits(splits: Splits) -> str:
    """Fingerprint the ids, texts and labels of every split, in their order."""
    parts = splits_by_name(splits).items()
    return hash_json({name: hash_columns(rows, sorted(rows.column_names)) for name, rows in parts})


def choose_precision(config: Config, layout: ExperimentLayout) -> tuple[str, str]:
    """Give the number format of all runs, and the reason in plain words; `auto` is settled by the first that asks."""
    return settle_precision(config.run.precision, config.run.device, layout.precision)


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def prepare_process(config: Config) -> None:
    """Set the threads that the config names, and leave the terminal to the experiment's own progress."""
    disable_progress_bar()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)


@contextlib.contextmanager
def logged(stage: str, arm: str, seed: int) -> Iterator[None]:
    """Log the begin of a stage, and its end unless it fails."""
    logger.info("begin %s %s seed %d", stage, arm, seed)
    yield
    logger.info("end %s %s seed %d", stage, arm, seed)


def blank_record(
    config: Config,
    arm: str,
    seed: int,
    *,
    task: dict[str, Any],
    rows: dict[str, int],
    data: str,
    notes: Sequence[str],
) -> RunRecord:
    """Start the record of a run with what is known without its process; `data` is the fingerprint of its rows."""
    teacher, student = config.teacher, config.student
    student_name = student.model
    if student_name is None and student.from_teacher_layers is not None:
        student_name = f"{teacher.model}, layers {list(student.from_teacher_layers)}"
    teacher_name = teacher.fine_tuned or teacher.logits or teacher.probabilities or teacher.model
    models = {"words": BAG_OF_WORDS, "fft": teacher_name, "lora": teacher.model}
    return RunRecord(
        experiment=config.title(),
        task=task,
        rows=rows,
        arm=arm,
        seed=seed,
        status="running",
        teacher_model=teacher_name,
        student_model=student_name,
        model=str(models.get(arm, student_name)),
        fingerprints={"config": config.fingerprint(), "data": data},
        versions=collect_versions(),
        machine=describe_machine(),
        git=git_state(),
        notes=list(notes),
        config=config.model_dump(mode="json"),
    )


def new_record(config: Config, layout: ExperimentLayout, splits: Splits, arm: Arm, seed: int) -> RunRecord:
    """Start the record of a run in its process."""
    precision, reason = choose_precision(config, layout)
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    record = blank_record(
        config,
        arm,
        seed,
        task=splits.task.to_dict(),
        rows={name: len(part) for name, part in splits_by_name(splits).items()},
        data=hash_splits(splits),
        notes=[*_notes(splits), f"precision {precision}: {reason}", f"{torch.get_num_threads()} threads"],
    )
    device = "cpu" if on_cpu else str(torch.cuda.get_device_name())
    return record.model_copy(update={"precision": precision, "device": device, "started": now()})


def _notes(splits: Splits) -> list[str]:
    """Say what was done to the data, what the unlabelled rows are for, and what keeps the control fair."""
    count = 0 if splits.unlabelled is None else len(splits.unlabelled) - splits.copies
    more = (
        f"{count} unlabelled rows: the teacher labelled them, and the distilled arms learn from them "
        "too; the other student arms see the labelled rows alone, as often as it takes for the same optimiser steps"
    )
    return [*splits.notes, more] if count else list(splits.notes)


def add_origin(record: RunRecord, encoder: Encoder, teacher: Sequence[TeacherLogits]) -> RunRecord:
    """Add fingerprints of the pretrained model and of the teacher's logits to a record."""
    found = {"base": hash_base(encoder)}
    if teacher:
        found["teacher"] = hash_json([one.fingerprint for one in teacher])
    return record.model_copy(update={"fingerprints": record.fingerprints | found})


def hash_base(encoder: Encoder) -> str:
    """Fingerprint a pretrained model and its tokenizer, as it was loaded."""
    return hash_json([hash_model(encoder.model, without=encoder.fresh), hash_tokenizer(encoder.tokenizer)])


def check_origin(layout: ExperimentLayout, record: RunRecord) -> None:
    """Compare a run that is about to be trained with the finished ones of its experiment."""
    for path in sorted(layout.runs.glob("*/run.json")):
        other = read_record(path)
        if other.status != "finished" or (other.arm, other.seed) == (record.arm, record.seed):
            continue
        for key, meaning in _MEANING.items():
            if key == "base" and other.model != record.model:
                continue
            if len({one.fingerprints.get(key) for one in (other, record)} - {None}) == 2:
                raise ArtifactError(
                    f"{meaning} changed since {other.arm} with seed {other.seed} was trained: {record.arm} with seed "
                    f"{record.seed} would not be comparable. Put back what was there, or name another folder with "
                    f"--out, or delete {layout.root}"
                )


def add_training(record: RunRecord, trained: Trained, teacher: Sequence[TeacherLogits]) -> RunRecord:
    """Add what the training was and cost."""
    outcome, parameters = trained.outcome, trained.parameters
    names = ("train (by the teacher)", "unlabelled (by the teacher)")
    by_teacher = {name: logits.truncated for name, logits in zip(names, teacher, strict=False)}
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
