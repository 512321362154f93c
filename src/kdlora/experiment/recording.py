"""What is known about a run before and after its training, where it began, and its log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar

from kdlora.config import DISTILLED_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.spool import hash_columns
from kdlora.distil.inference import hash_model, hash_tokenizer
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import settle_precision
from kdlora.distil.train import Trained
from kdlora.distil.words import BAG_OF_WORDS
from kdlora.errors import ArtifactError
from kdlora.evidence.records import Asked, ExperimentLayout, RunRecord, read_record
from kdlora.models.encoders import Encoder
from kdlora.system.environment import collect_versions, describe_machine, git_state
from kdlora.system.integrity import hash_files, hash_json

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


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a task's data."""

    task: dict[str, Any]  # Task.to_dict()
    fingerprints: dict[int, str]  # of ids, texts and labels, by the number of copies (data.augment)
    rows: dict[str, int]
    notes: tuple[str, ...]

    def fingerprint(self, config: Config) -> str:
        return self.fingerprints[config.data.augment]


def look_at(splits: Splits, copies: int) -> TaskFacts:
    rows = {name: len(part) for name, part in splits_by_name(splits).items()}
    return TaskFacts(splits.task.to_dict(), {copies: hash_splits(splits)}, rows, splits.notes)


def choose_precision(config: Config, layout: ExperimentLayout) -> tuple[str, str]:
    """Give the number format of all runs, and the reason in plain words; `auto` is settled by the first that asks."""
    return settle_precision(config.run.precision, config.run.device, layout.precision)


def now() -> str:
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


def blank_record(config: Config, arm: str, seed: int, facts: TaskFacts) -> RunRecord:
    """Start the record of a run with what is known without its process."""
    teacher, student = config.teacher, config.student
    student_name = student.model
    if student_name is None and student.from_teacher_layers is not None:
        student_name = f"{teacher.model}, layers {list(student.from_teacher_layers)}"
    asked = None if teacher.probabilities is None else Asked.read(Path(teacher.probabilities).parent)
    table = teacher.logits or teacher.probabilities
    teacher_name = teacher.fine_tuned or (asked.model if asked else table) or teacher.model
    models = {"words": BAG_OF_WORDS, "fft": teacher_name, "lora": teacher.model}
    return RunRecord(
        experiment=config.title(),
        task=facts.task,
        rows=facts.rows,
        arm=arm,
        seed=seed,
        status="running",
        teacher_model=teacher_name,
        student_model=student_name,
        model=str(models.get(arm, student_name)),
        asked=asked,
        fingerprints={"config": config.fingerprint(), "data": facts.fingerprint(config)},
        versions=collect_versions(),
        machine=describe_machine(),
        git=git_state(),
        notes=list(facts.notes),
        config=config.model_dump(mode="json"),
    )


def new_record(config: Config, layout: ExperimentLayout, splits: Splits, arm: Arm, seed: int) -> RunRecord:
    record = blank_record(config, arm, seed, look_at(splits, config.data.augment))
    precision, reason = choose_precision(config, layout)
    notes = [f"precision {precision}: {reason}", f"{torch.get_num_threads()} threads"]
    if splits.unlabelled is not None and (count := len(splits.unlabelled) - splits.copies):
        notes.insert(
            0,
            f"{count} unlabelled rows: the teacher labelled them, and the distilled arms learn from them too; the "
            "other student arms see the labelled rows alone, as often as it takes for the same optimiser steps",
        )
    if arm in DISTILLED_ARMS | {config.teacher_arm} and config.teacher_arm == "lora":
        notes.insert(0, "the teacher is tuned by adapters (teacher.tuning: lora), merged before it labels")
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    update = {"precision": precision, "device": "cpu" if on_cpu else str(torch.cuda.get_device_name())}
    return record.model_copy(update=update | {"started": now(), "notes": [*record.notes, *notes]})


def hash_base(encoder: Encoder) -> str:
    return hash_json([hash_model(encoder.model, without=encoder.fresh), hash_tokenizer(encoder.tokenizer)])


def add_origin(
    record: RunRecord, layout: ExperimentLayout, encoder: Encoder, teacher: Sequence[TeacherLogits]
) -> RunRecord:
    """Add fingerprints of pretrained model and teacher's logits; refuse others than finished runs here began with."""
    own = record.fingerprints | {"base": hash_base(encoder)}
    if teacher:
        own["teacher"] = hash_json([one.fingerprint for one in teacher])
    for path in sorted(layout.runs.glob("*/run.json")):
        other = read_record(path)
        if other.status != "finished" or (other.arm, other.seed) == (record.arm, record.seed):
            continue
        for key, meaning in _MEANING.items():
            if key == "base" and other.model != record.model:
                continue
            if len({other.fingerprints.get(key), own.get(key)} - {None}) == 2:
                raise ArtifactError(
                    f"{meaning} changed since {other.arm} with seed {other.seed} was trained: {record.arm} with seed "
                    f"{record.seed} would not be comparable. Put back what was there, or name another folder with "
                    f"--out, or delete {layout.root}"
                )
    return record.model_copy(update={"fingerprints": own})


def add_training(record: RunRecord, trained: Trained, teacher: Sequence[TeacherLogits]) -> RunRecord:
    outcome, parameters = trained.outcome, trained.parameters
    names = ("train (by the teacher)", "unlabelled (by the teacher)")
    by_teacher = {name: logits.truncated for name, logits in zip(names, teacher, strict=False)}
    unseen = trained.unseen | {name: logits.unseen for name, logits in zip(names, teacher, strict=False)}
    counted = ", ".join(f"{count} of {name}" for name, count in unseen.items() if count)
    notes = [f"words without a token: {counted}; they are no loss term, and are scored as O"] if counted else []
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
            "notes": [*record.notes, *notes],
        }
    )


def finish(record: RunRecord, layout: ExperimentLayout, kept: Iterable[Path], notes: Sequence[str] = ()) -> RunRecord:
    """End the record of a run, with the hashes of what it leaves and more notes."""
    ended = {"status": "finished", "finished": now(), "files": hash_files(layout.root, kept)}
    return record.model_copy(update=ended | {"notes": [*record.notes, *notes]})
