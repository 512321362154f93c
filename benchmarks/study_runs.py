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
from candidate_relations import Features, open_features
from candidate_sad import ROWS, input_covariances, spectral_basis
from candidate_teachers import joined_logits, mean_logits, rows_of_fold, without_fold
from candidate_warm_up import warmed_up
from filelock import FileLock, Timeout
from study_candidates import callbacks_of
from study_plan import Places, Study, Work, fully_tuned, teacher_of, teachers_of
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar as disable_model_progress

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, DataConfig, TaskConfig, TrainConfig
from kdlora.data.batches import Collator, tokenise
from kdlora.data.load import Splits, load_splits
from kdlora.data.split import split_rows
from kdlora.data.tasks import Task
from kdlora.distil.inference import INPUTS
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_precision
from kdlora.distil.teacher import teacher_logits
from kdlora.evidence.environment import collect_versions, describe_machine, git_state
from kdlora.evidence.predictions import Predictions, write_predictions
from kdlora.evidence.storage import atomic_folder, write_json_atomic
from kdlora.experiment.arms import Trained, evaluate, label_array, rows_per_epoch, train_arm
from kdlora.experiment.sources import load_base
from kdlora.experiment.stages import settings_for
from kdlora.models.adapters import merge_student, resolve_targets
from kdlora.models.encoders import Encoder, load_fine_tuned, save_encoder

WATCHED = 64
"""Rows that a training looks at after every epoch: it keeps the last epoch's weights, so they decide nothing."""
SELECTING = 0.1
"""Share of the training rows that is held out to choose an epoch by: the scored rows choose nothing."""


def prepare() -> None:
    """Keep the progress bars of the libraries out of the log."""
    disable_model_progress()
    datasets.disable_progress_bars()


def write_tables(study: Study, places: Places) -> None:
    """Write what the tasks are read from, once: vader's files with a header, texts without their labels."""
    places.out.mkdir(parents=True, exist_ok=True)
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
    settings = settings_for(work.config, work.arm)
    rows = watched_splits(splits, settings)
    drawn = None if work.arm in TEACHER_ARMS else rows_per_epoch(rows)
    if work.parts.read_by(work.arm).get("copied_labels"):
        rows = with_labelled_copies(rows)
    encoder = _base(work, places, splits.task)
    callbacks = callbacks_of(
        work, lambda: _features(work, places, encoder), lambda: _bases(work, places, encoder, splits.task)
    )
    if callbacks:  # they remember nothing of a training that was interrupted
        shutil.rmtree(checkpoints, ignore_errors=True)
    trained = train_arm(
        encoder,
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
        callbacks=callbacks,
    )
    encoder = trained.encoder
    if work.arm in LORA_ARMS:
        encoder = dataclasses.replace(encoder, model=merge_student(trained.model))
    content = _score(work, splits, trained, encoder, record)
    if work.arm == "fft" or work.kept:
        with atomic_folder(_model_folder(work, places)) as folder:
            save_encoder(encoder, folder)
    write_json_atomic(record, content)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return content


def teach(work: Work, places: Places, task: Task, part: str) -> TeacherLogits:
    """Give the logits of the task's teachers; read once a process.

    Args:
        work: of a distilled arm.
        places: where the teachers lie.
        task: labels and kind.
        part: `train` or `unlabelled` rows; those of the whole task, whatever share of them the work takes.
    """
    whole = _load(work.config.task, work.config.data)
    rows, ids = getattr(whole, part), whole.train["id"][:]
    answers = []
    for teacher in teachers_of(work):
        own = rows if teacher.fold is None else rows_of_fold(rows, ids, *teacher.fold)
        answers.append(_answers(teacher, places, task, own, part))
    return joined_logits(answers) if work.parts.folds > 1 else mean_logits(answers)


def _answers(teacher: Work, places: Places, task: Task, rows: datasets.Dataset, part: str) -> TeacherLogits:
    """Give one teacher's logits of some rows."""
    folder, data = _model_folder(teacher, places), teacher.config.data
    more = [data.max_unlabelled_examples, data.augment] if part == "unlabelled" else []
    stored = folder.with_suffix("-".join([f".{part}", *(str(count) for count in more if count)]))
    if stored not in _taught:
        encoder, columns = load_fine_tuned(str(folder), task)
        _taught[stored] = teacher_logits(
            encoder,
            columns,
            rows,
            task,
            stored,
            max_length=teacher.config.teacher.train.max_length,
            precision=resolve_precision("auto", "auto")[0],
            batch_tokens=4096,
        )
    return _taught[stored]


def _base(work: Work, places: Places, task: Task) -> Encoder:
    """Load what an arm trains; a student that is to be warmed up learns from the pretrained teacher first."""
    encoder, config = load_base(work.config, work.arm, work.seed, task), work.config
    steps = work.parts.read_by(work.arm).get("warm_up")
    if steps is None:
        return encoder
    texts = tokenise(_load(config.task, config.data).train, encoder.tokenizer, config.student.train.max_length)
    layers = "-".join(str(layer) for layer in config.student.from_teacher_layers or ())
    file = places.out / work.task / f"warm-{Path(str(config.teacher.model)).name}-{layers}-{steps}.safetensors"
    return warmed_up(encoder, load_base(config, "fft", 0, task), texts, steps, file)


def _features(work: Work, places: Places, student: Encoder) -> Features:
    """Give what the last layer of the task's one teacher makes of every text and copy; kept beside its logits."""
    whole, data = _load(work.config.task, work.config.data), work.config.data
    folder = _model_folder(teacher_of(work), places)
    teacher, _ = load_fine_tuned(str(folder), whole.task)
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise SystemExit("relations need a teacher and a student of the same tokenizer")
    texts = [rows for rows in (whole.train, whole.unlabelled) if rows is not None]
    tokens = [tokenise(rows, student.tokenizer, work.config.student.train.max_length) for rows in texts]
    return open_features(teacher, tokens, folder.with_suffix(f".relations-{data.augment}"))


def _bases(work: Work, places: Places, student: Encoder, task: Task) -> dict[str, Tensor]:
    """Give SAD-LoRA's directions for every layer that gets an adapter."""
    tuned, _ = load_fine_tuned(str(_model_folder(fully_tuned(work), places)), task)
    rows = _load(work.config.task, work.config.data).train
    part = tokenise(rows.select(range(min(ROWS, len(rows)))), student.tokenizer, work.config.student.train.max_length)
    collator = Collator.of(student.tokenizer, task.kind, part.max_length)
    inputs = part.dataset.select_columns([name for name in INPUTS if name in part.dataset.column_names])
    batches = [collator(inputs.select(range(at, min(at + 32, len(inputs))))) for at in range(0, len(inputs), 32)]
    model, lora = student.model, work.config.lora
    targets = resolve_targets(model, lora.targets, student.fresh)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # A head ends in the name of a layer, too ("dense"), but it takes no adapter.
    names = [
        name
        for name in linear
        if not name.startswith(student.fresh) and any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    covariances = input_covariances(model.eval(), names, batches)
    before, after = ({name: one.get_submodule(name).weight.detach() for name in names} for one in (model, tuned.model))
    return {name: spectral_basis(after[name] - before[name], covariances[name], lora.rank) for name in names}


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
    whole = _load(work.config.task, work.config.data)
    if work.fold is not None:
        return without_fold(whole, *work.fold)
    return _hold_out(whole, work.held_out, work.split_seed) if work.held_out else whole


def _hold_out(whole: Splits, fraction: float, seed: int) -> Splits:
    """Put a share of the training rows in place of the validation rows."""
    classes = label_array(whole.train) if whole.task.kind == "single-label" else None
    kept, drawn = split_rows(len(whole.train), fraction, seed, classes)
    part = dataclasses.replace(whole, train=whole.train.select(kept), validation=whole.train.select(drawn))
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


def _score(work: Work, splits: Splits, trained: Trained, encoder: Encoder, record: Path) -> dict[str, Any]:
    settings, rows = settings_for(work.config, work.arm), splits.validation
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
        "parts": work.parts.read_by(work.arm),
        "fold": work.fold,
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
