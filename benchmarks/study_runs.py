"""The trainings of a study, in one process, so that imports, data and teachers are there once."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout
from study_plan import Places, Study, Work, settings_of, teacher_of
from transformers.utils.logging import disable_progress_bar as disable_model_progress

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, DataConfig, TaskConfig, TrainConfig
from kdlora.data.load import Splits, load_splits
from kdlora.data.split import split_rows
from kdlora.data.tasks import Task
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_precision
from kdlora.distil.teacher import teacher_logits
from kdlora.evidence.predictions import Predictions, write_predictions
from kdlora.experiment.arms import Trained, evaluate, label_array, rows_per_epoch, train_arm
from kdlora.experiment.inputs import load_base
from kdlora.experiment.trial import Holdout, load_held_out
from kdlora.models.adapters import merge_student
from kdlora.models.encoders import Encoder, load_fine_tuned, save_encoder
from kdlora.system.environment import collect_versions, describe_machine, git_state
from kdlora.system.storage import atomic_folder, write_json_atomic

WATCHED = 64
"""Rows that a training looks at after every epoch: it keeps the last epoch's weights, so they decide nothing."""
SELECTING = 0.1
"""Share of the training rows that is held out to choose an epoch by: the scored rows choose nothing."""


def prepare() -> None:
    """Keep the progress bars of the libraries out of the log."""
    disable_model_progress()
    datasets.disable_progress_bars()


def write_tables(study: Study, places: Places) -> None:
    """Write what the tasks are read from, once, by one of the processes that share the work.

    That is vader's files with a header, and texts without their labels.
    """
    places.out.mkdir(parents=True, exist_ok=True)
    with FileLock(places.out / "tables.lock"):
        for name, task in study.tasks.items():
            if task.vader is not None and not places.table(name).exists():
                file = places.models / "vader" / task.vader
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
                rows = [line.split("\t", 2) for line in lines if line.strip()]
                _write_table(places.table(name), ("id", "rating", "text"), rows)
            if any(recipe.unlabelled for recipe in study.recipes.values()) and not places.texts(name).exists():
                _write_table(places.texts(name), *_rows_left(study, places, name))


def _rows_left(study: Study, places: Places, name: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Give the texts of the training rows that the task does not use, under the benchmark's column names."""
    settings = study.task_settings(name, places)
    del settings["data"]["max_train_examples"]
    splits = load_splits(TaskConfig(**settings["task"]), DataConfig(**settings["data"]))
    rest = splits.train.select(range(study.tasks[name].rows or 0, len(splits.train)))
    columns = [column for column in ("text", "text_pair") if column in rest.column_names]
    return list(splits.task.text), list(zip(*(rest[column] for column in columns), strict=True))


def _write_table(file: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    partial = file.with_suffix(".part")
    with partial.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows(rows)
    partial.replace(file)


def read_scores(places: Places) -> dict[str, float]:
    """Read the score of every finished training, by the key of its work."""
    records = (json.loads(path.read_text(encoding="utf-8")) for path in places.out.glob("*/*.json"))
    return {record["key"]: record["score"] for record in records}


@contextlib.contextmanager
def claimed(work: Work, places: Places) -> Iterator[bool]:
    """Take a training for this process; it is free again when the process ends, however it ends.

    Yields:
        Whether it is ours: nobody else is at it, and nobody has finished it meanwhile.
    """
    record = places.run(work)
    record.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(record.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield not record.exists()
    finally:
        lock.release()


def carry_out(work: Work, places: Places) -> dict[str, Any]:
    """Train, score the merged model, and record it; a teacher is kept for its students.

    An interrupted training goes on from its last checkpoint.
    """
    splits = _splits(work)
    distilled = work.arm in DISTILLED_ARMS
    teacher = teach(work, places, splits.task, "train") if distilled else None
    unlabelled = teach(work, places, splits.task, "unlabelled") if distilled and splits.unlabelled else None
    record = places.run(work)
    checkpoints = record.with_suffix(".checkpoints")
    settings = settings_of(work.config, work.arm)
    rows = watched_splits(splits, settings)
    drawn = len(rows.train) + rows.held_out if work.arm in TEACHER_ARMS else rows_per_epoch(rows)
    if work.copied_labels:
        rows = with_labelled_copies(rows)
    trained = train_arm(
        load_base(work.config, work.arm, work.seed, splits.task),
        rows,
        settings,
        folder=checkpoints,
        lora=work.config.lora if work.arm in LORA_ARMS else None,
        teacher=teacher,
        unlabelled=unlabelled,
        distil=work.config.distil,
        seed=work.seed,
        precision=work.precision,
        rows_per_epoch=drawn,
        checkpoint_seconds=45.0,
    )
    encoder = trained.encoder
    if work.arm in LORA_ARMS:
        encoder = dataclasses.replace(encoder, model=merge_student(trained.model))
    content = _score(work, splits, trained, encoder, record)
    if work.arm == "fft":
        with atomic_folder(_model_folder(work, places)) as folder:
            save_encoder(encoder, folder)
    write_json_atomic(record, content)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return content


def teach(work: Work, places: Places, task: Task, part: str) -> TeacherLogits:
    """Give the logits of the task's teacher; read once a process.

    Args:
        work: of a distilled arm.
        places: where the teachers lie.
        task: labels and kind.
        part: `train` or `unlabelled` rows.
    """
    teacher, data = teacher_of(work), work.config.data
    folder = _model_folder(teacher, places)
    more = [data.max_unlabelled_examples, data.augment] if part == "unlabelled" else []
    stored = folder.with_suffix("-".join([f".{part}", *(str(count) for count in more if count)]))
    if stored not in _taught:
        encoder, columns = load_fine_tuned(str(folder), task)
        _taught[stored] = teacher_logits(
            encoder,
            columns,
            getattr(_splits(work), part),
            task,
            stored,
            max_length=settings_of(teacher.config, "fft").max_length,
            precision=resolve_precision("auto", "auto")[0],
            batch_tokens=4096,
        )
    return _taught[stored]


_taught: dict[Path, TeacherLogits] = {}


def _model_folder(work: Work, places: Places) -> Path:
    return places.run(work).with_suffix(".model")


def watched_splits(splits: Splits, settings: TrainConfig) -> Splits:
    """Give what a training learns from, and what it looks at after every epoch.

    Args:
        splits: of the work; its validation rows are those that are scored.
        settings: whether the best epoch is chosen, by rows that are then held out of the training rows.
    """
    if settings.select == "best":
        return _hold_out(splits, SELECTING, 0)
    watched = splits.validation.select(range(min(WATCHED, len(splits.validation))))
    return dataclasses.replace(splits, validation=watched)


def with_labelled_copies(splits: Splits) -> Splits:
    """Put the perturbed copies among the training rows, each with the label of the text that it was made from.

    Args:
        splits: whose unlabelled rows are copies.
    """
    train, copies = splits.train, splits.unlabelled
    assert copies is not None
    labels = dict(zip(train["id"], train["label"], strict=True))
    own = [labels[name.rpartition("~")[0]] for name in copies["id"]]
    columns = {name: copies[name][:] for name in copies.column_names} | {"label": own}
    labelled = datasets.Dataset.from_dict(columns).select_columns(train.column_names).cast(train.features)
    joined = datasets.concatenate_datasets([train, labelled])
    return dataclasses.replace(splits, train=joined, unlabelled=None, copies=0)


def _splits(work: Work) -> Splits:
    task, data = work.config.task, work.config.data
    return _load_held_out(task, data, Holdout(work.held_out, work.split_seed)) if work.held_out else _load(task, data)


def _hold_out(whole: Splits, fraction: float, seed: int) -> Splits:
    """Put a share of the training rows in place of the validation rows."""
    classes = label_array(whole.train) if whole.task.kind == "single-label" else None
    kept, drawn = split_rows(len(whole.train), fraction, seed, classes)
    part = dataclasses.replace(
        whole,
        train=whole.train.select(kept),
        validation=whole.train.select(drawn),
        held_out=round(whole.held_out * (1 - fraction)),  # as many steps as with all rows, whose share is held out too
    )
    if whole.unlabelled is None:
        return part
    ids = set(part.train["id"])  # a copy of a held-out text is not to be seen either
    origins = [name.rpartition("~")[0] for name in whole.unlabelled["id"]]  # empty for a text that is no copy
    own = [row for row, origin in enumerate(origins) if not origin or origin in ids]
    copies = sum(origins[row] != "" for row in own)
    return dataclasses.replace(part, unlabelled=whole.unlabelled.select(own), copies=copies)


@functools.lru_cache(maxsize=16)
def _load(task: Any, data: Any) -> Splits:
    return load_splits(task, data)


@functools.lru_cache(maxsize=16)
def _load_held_out(task: Any, data: Any, holdout: Holdout) -> Splits:
    return load_held_out(task, data, holdout)


def _score(work: Work, splits: Splits, trained: Trained, encoder: Encoder, record: Path) -> dict[str, Any]:
    settings, rows = settings_of(work.config, work.arm), splits.validation
    result = evaluate(encoder.model, encoder.tokenizer, rows, splits.task, max_length=settings.max_length)
    if not work.held_out:
        names = splits.task.label_names
        found = Predictions(
            tuple(rows["id"]), ("validation",) * len(rows), result.logits, names, labels=label_array(rows)
        )
        write_predictions(record.with_suffix(".parquet"), found)
    config = work.config
    return {
        "key": work.key,
        "task": work.task,
        "arm": work.arm,
        "seed": work.seed,
        "held_out": work.held_out,
        "score": result.score,
        "metrics": result.metrics,
        "rows": {"train": len(splits.train), "scored": len(rows)},
        "train": settings.model_dump(mode="json"),
        "lora": config.lora.model_dump(mode="json") if work.arm in LORA_ARMS else None,
        "distil": config.distil.model_dump(mode="json") if work.arm in DISTILLED_ARMS else None,
        "copied_labels": work.copied_labels,
        "precision": work.precision,
        "trainable": trained.parameters.trainable,
        "total": trained.parameters.total,
        "train_seconds": trained.outcome.train_seconds,
        "examples_per_second": trained.outcome.examples_per_second,
        "last_epoch": trained.outcome.history[-1],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": describe_machine(),
        "versions": collect_versions(),
    }
