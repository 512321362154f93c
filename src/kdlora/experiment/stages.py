"""The stages of an experiment, each of which reads its inputs from disk, for a process of its own; any arm trained."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import TrainerCallback

from kdlora.config import (
    DISTILLED_ARMS,
    LORA_ARMS,
    Arm,
    Config,
    LoraSettings,
    StudentTrainConfig,
    TeacherTrainConfig,
    TrainConfig,
)
from kdlora.data.batches import tokenise
from kdlora.data.load import Splits, load_splits
from kdlora.data.logit_table import open_store
from kdlora.data.spool import label_array, read_texts, slice_rows, spread_rows, text_columns
from kdlora.data.tasks import Task
from kdlora.data.word_tokens import words_seen
from kdlora.distil.inference import LOGITS_MANIFEST, TEACHER_TOKENS, hash_model, teacher_logits
from kdlora.distil.logits import attach_teacher, join_unlabelled
from kdlora.distil.precision import resolve_device, settle_precision
from kdlora.distil.processes import current_processes
from kdlora.distil.tracking import TrackedRun, tracked
from kdlora.distil.train import Trained, train_model
from kdlora.distil.trainer import ProgressEvent, TrainingOptions
from kdlora.distil.words import MOST_ROWS, fit_words
from kdlora.errors import ArtifactError, ModelError
from kdlora.evidence.records import ExperimentLayout, RunRecord, read_record
from kdlora.experiment.recording import (
    add_origin,
    add_training,
    finish,
    keep_weights,
    logged,
    new_record,
    prepare_process,
    refuse_loss,
    splits_by_name,
    weight_folders,
)
from kdlora.experiment.scoring import score_given_teacher, score_model, score_outputs
from kdlora.experiment.settle import (
    check_collection,
    closed,
    labels_unlabelled,
    load_base,
    load_teacher,
    rows_per_epoch,
    settings_for,
    settled,
    stored_logits,
)
from kdlora.models.adapters import add_adapter, count_parameters
from kdlora.models.encoders import Encoder, load_encoder
from kdlora.system.children import run_in_child
from kdlora.system.environment import MemoryLevel, forget_peak, peak_since, read_memory
from kdlora.system.integrity import hash_json

Progress = Callable[[ProgressEvent], None]
Counted = Callable[[int, int], None]
"""Hears how many rows are done, of how many."""


@dataclass(frozen=True)
class Stage:
    """What an experiment is busy with: a training, the teacher reading its rows, a student that is measured."""

    name: Literal["train", "label", "deploy"]
    arm: Arm  # for `label` the first one that needs the logits
    seed: int


def train_run(config: Config, layout: ExperimentLayout, arm: Arm, seed: int, progress: Progress | None) -> RunRecord:
    """Train, measure and keep one arm with one seed; of several processes the first measures and keeps."""
    prepare_process(config)
    forget_peak()
    level = read_memory()
    splits = load_splits(config.task, config.data, copies_in=layout.copies)
    record = new_record(config, layout, splits, arm, seed)
    processes = current_processes()
    refuse_loss(*weight_folders(config, layout, arm, seed))  # before hours are spent
    if arm == "fft" and config.given_teacher:
        return score_given_teacher(config, layout, splits, record) if processes.is_first else record
    if arm == "words":
        return _train_words(layout, splits, record, level) if processes.is_first else record
    teacher = stored_logits(config, layout, splits) if arm in DISTILLED_ARMS else []
    if teacher:
        splits = attach_teacher(splits, *teacher, distil=config.distil)
    encoder = load_base(config, arm, seed, splits.task)
    record = add_origin(record, layout, encoder, teacher)
    settings, place = settings_for(config, arm), layout.run(arm, seed)
    with logged("train", arm, seed):
        trained = train_splits(config, layout, splits, encoder, arm, seed, progress)
    if not processes.is_first:
        return record
    peak = None if trained.outcome.resumed else peak_since(level)
    record = add_training(record, trained, teacher).model_copy(update={"peak_memory_bytes": peak})
    with logged("merge", arm, seed):
        encoder, kept = keep_weights(config, layout, trained, arm, seed)
        encoder.model.to(resolve_device(config.run.device))
    with logged("evaluate", arm, seed):
        record = score_model(record, encoder, splits, closed(settings).max_length, place)
    count, rows = processes.count, settings.batch_size
    spread = f"{count} processes, each with {rows} of the {rows * count} rows of a step"
    return finish(record, layout, [place.predictions, *kept], [spread] if count > 1 else [])


def _train_words(layout: ExperimentLayout, splits: Splits, record: RunRecord, level: MemoryLevel | None) -> RunRecord:
    """Fit and score a bag of words; nothing of it is kept but its record and its predictions."""
    place, start = layout.run("words", record.seed), time.perf_counter()
    with logged("train", "words", record.seed):
        some = [spread_rows(rows, MOST_ROWS) for rows in (splits.train, splits.validation)]
        (known, asked), (labels, expected) = map(read_texts, some), map(label_array, some)
        words = fit_words(splits.task, known, labels, asked, expected)
    trained = time.perf_counter()
    with logged("evaluate", "words", record.seed):
        outputs = {
            split: np.concatenate([words.predict(part.to_pydict()) for part in slice_rows(rows, text_columns(rows))])
            for split, rows in splits_by_name(splits, scored=True).items()
        }
        record = score_outputs(record, splits, outputs, place)
    note = f"bag of words: inverse regularisation {words.strength:g}, chosen on validation"
    note += f"; learnt from {words.rows:,} of {len(splits.train):,} rows" if words.rows < len(splits.train) else ""
    update = {
        "train_seconds": trained - start,
        "evaluation_seconds": time.perf_counter() - trained,
        "examples_per_second": words.rows / (trained - start),
        "trainable_parameters": words.parameters,
        "total_parameters": words.parameters,
        "peak_memory_bytes": peak_since(level),
        "notes": list(splits.notes),
    }
    return finish(record.model_copy(update=update), layout, [place.predictions], [note])


def train_splits(
    config: Config,
    layout: ExperimentLayout,
    splits: Splits,
    encoder: Encoder,
    arm: Arm,
    seed: int,
    progress: Progress | None,
) -> Trained:
    """Train one arm as the config says, on given splits, and tell the trackers that it names."""
    place = layout.run(arm, seed)
    tags = {"arm": arm, "seed": str(seed)} | ({"task": splits.task.name} if splits.task.name else {})
    run = TrackedRun(config.title(), place.root.name, tags, place.checkpoints, layout.root / "tracking")
    with tracked(config.run.report_to if current_processes().is_first else (), run) as callbacks:
        options = TrainingOptions(
            folder=place.checkpoints,
            lora=config.lora if arm in LORA_ARMS else None,
            seed=seed,
            precision=settle_precision(config.run.precision, config.run.device, layout.precision)[0],
            device=config.run.device,
            checkpoint_seconds=config.run.checkpoint_seconds,
            keep_checkpoints=config.run.keep_checkpoints,
            rows_per_epoch=rows_per_epoch(splits, unlabelled=arm not in ("fft", config.teacher_arm)),
            progress=progress,
            callbacks=callbacks,
        )
        return train_arm(encoder, splits, settings_for(config, arm), options)


def label_training_rows(config: Config, layout: ExperimentLayout, progress: Counted | None = None) -> None:
    """Let the teacher read the training rows, and the unlabelled ones, once and store its logits; stored ones stay."""
    prepare_process(config)
    label_splits(config, layout, load_splits(config.task, config.data, copies_in=layout.copies), progress)


def label_splits(config: Config, layout: ExperimentLayout, splits: Splits, progress: Counted | None = None) -> None:
    encoder, columns = load_teacher(config, splits.task, layout.teacher)
    check_collection(config, encoder, splits.task)
    _check_scored(config, layout, encoder)
    parts = [(splits.train, layout.teacher_logits)]
    if splits.unlabelled is not None and labels_unlabelled(config):
        parts.append((splits.unlabelled, layout.unlabelled_logits))
    total, done = sum(len(rows) for rows, _ in parts), 0
    for rows, folder in parts:

        def count_on(part: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + part, total)

        precision = settle_precision(config.run.precision, config.run.device, layout.precision)[0]
        if config.run.precision == "auto":  # as these logits were begun, perhaps on another device
            with contextlib.suppress(ArtifactError):
                precision = str(open_store(folder / LOGITS_MANIFEST).ingredients.get("precision", precision))
        with logged("label", folder.name, config.teacher_seed):
            teacher_logits(
                encoder,
                columns,
                rows,
                splits.task,
                folder,
                max_length=closed(config.teacher.train).max_length,
                precision=precision,
                device=config.run.device,
                # What a crash can cost, against the number of files.
                rows_per_shard=min(max(2_000, len(rows) // 200), 50_000),
                batch_tokens=min(TEACHER_TOKENS, config.teacher.train.micro_batch_tokens or TEACHER_TOKENS),
                progress=count_on,
            )
        done += len(rows)


def _check_scored(config: Config, layout: ExperimentLayout, teacher: Encoder) -> None:
    """Refuse a given teacher other than the one that was scored, whose score stands beside its students'."""
    place = layout.run("fft", config.run.seeds[0])
    scored = read_record(place.record).fingerprints.get("given") if place.record.exists() else None
    if scored is not None and scored != hash_model(teacher.model):
        raise ArtifactError(
            f"{teacher.source} (teacher.fine_tuned) has other weights than when it was scored. Put back what was "
            f"there, or delete {place.root} to have it scored anew"
        )


def refuse_exchanged_teacher(
    config: Config, layout: ExperimentLayout, splits: Splits, finished: Iterable[RunRecord]
) -> None:
    """Refuse a given teacher other than the one that finished runs learnt from, or scored, at the same place."""
    teacher, taught = config.teacher, [one for one in finished if one.arm == "fft" or one.arm in DISTILLED_ARMS]
    place = Path(teacher.logits or teacher.probabilities or teacher.fine_tuned or "")
    if not taught or not config.given_teacher or not place.exists():
        return
    seen = [place.lstat(), place.stat(), *(file.stat() for file in place.glob("*") if file.is_file())]
    changed = max(max(one.st_ctime, one.st_mtime) for one in seen)  # by a rename or link, too; Windows' ctime is birth
    if datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds") < min(one.started for one in taught):
        return  # to load a large model, or table, takes seconds
    told = {one.fingerprints.get("teacher" if teacher.is_table else "given") for one in taught}
    if teacher.is_table:
        here = hash_json([one.fingerprint for one in stored_logits(config, None, splits)])
    else:
        if (manifest := layout.teacher_logits / LOGITS_MANIFEST).exists():
            told.add(open_store(manifest).ingredients.get("weights"))
        here = run_in_child(hash_teacher, config, splits.task)
    if told - {None, here}:
        raise ArtifactError(
            f"{place} is another teacher than the one that finished runs in {layout.root} learnt from, or scored. Put "
            "back what was there, or name another folder with --out"
        )


def hash_teacher(config: Config, task: Task) -> str:
    return hash_model(load_teacher(config, task)[0].model)


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
        source: Hub id or folder of a pretrained encoder, or one that is already loaded and stays as it is.
        splits: the task with its examples, from `attach_teacher`; as loaded they train on the labels alone (the
            control).
        settings: epochs, learning rate and the like; without adapters the width chooses a rate that is not set.
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
    if isinstance(source, Encoder):  # training changes a model, and the caller's may start another one
        encoder = replace(source, model=copy.deepcopy(source.model))
    else:
        encoder = load_encoder(source, splits.task, seed=seed)
    if lora is None and "learning_rate" not in settings.model_fields_set:  # that of adapters is far too high
        settings = settings.model_copy(update={"learning_rate": None})
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
    final = settled(settings, encoder, splits, adapters=options.lora is not None, rows=options.rows_per_epoch)
    model = encoder.model if options.lora is None else add_adapter(encoder, options.lora, seed=options.seed)
    parameters = count_parameters(model)
    parts = {"train": splits.train, "validation": splits.validation}
    if splits.distil is not None and splits.unlabelled is not None:
        parts["unlabelled"] = splits.unlabelled
    windows = splits.task.windows
    tokens = {
        name: tokenise(rows, encoder.tokenizer, final.max_length, windows=windows) for name, rows in parts.items()
    }
    unseen = {}
    for name, part in tokens.items() if splits.task.kind == "tokens" else ():
        seen = words_seen(part.dataset)
        if not seen.any():
            raise ModelError(
                f"the tokenizer of {encoder.source} drops all characters of the {name} words; choose another model"
            )
        unseen[name] = int((~seen).sum())
    train = tokens["train"]
    described = {"kdlora_task": splits.task.to_dict(), "kdlora_max_length": train.max_length}
    encoder.model.config.update(described)  # saved, merged or not, it reads texts as it was trained
    if "unlabelled" in tokens:
        train = join_unlabelled(train, tokens["unlabelled"], splits.task)
    copies = 0 if splits.distil is None else splits.copies
    options = replace(options, distil=splits.distil, fresh=encoder.fresh, copies=copies)
    outcome = train_model(model, encoder.tokenizer, train, tokens["validation"], splits.task, final, options)
    truncated = {name: part.truncated for name, part in tokens.items()}
    return Trained(encoder, model, outcome, parameters, truncated, unseen)
