"""The stages of an experiment; each reads its inputs from disk, so it can run in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config
from kdlora.data.load import Splits, load_splits
from kdlora.data.spool import label_array, read_texts
from kdlora.distil.logits import attach_teacher
from kdlora.distil.processes import current_processes
from kdlora.distil.teacher import teacher_logits
from kdlora.distil.tracking import TrackedRun, tracked
from kdlora.distil.trainer import TrainingOptions
from kdlora.distil.words import fit_words
from kdlora.evidence.records import ExperimentLayout, RunRecord
from kdlora.experiment.arms import Progress, Trained, train_arm
from kdlora.experiment.inputs import check_collection, labels_unlabelled, load_base, load_teacher, stored_logits
from kdlora.experiment.recording import (
    add_origin,
    add_training,
    choose_precision,
    finish,
    logged,
    new_record,
    prepare_process,
    splits_by_name,
)
from kdlora.experiment.scoring import score_given_teacher, score_model, score_outputs
from kdlora.experiment.settle import cut_at, rows_per_epoch, settings_for
from kdlora.experiment.shipping import keep_weights
from kdlora.models.encoders import Encoder
from kdlora.system.environment import MemoryLevel, forget_peak, peak_since, read_memory

StageName = Literal["train", "label", "deploy"]
Counted = Callable[[int, int], None]
"""Hears how many rows are done, of how many."""


@dataclass(frozen=True)
class Stage:
    """What an experiment is busy with: a training, the teacher reading its rows, a student that is measured."""

    name: StageName
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
    record = add_training(record, trained, teacher).model_copy(update={"peak_memory_bytes": peak_since(level)})
    with logged("merge", arm, seed):
        encoder, kept = keep_weights(config, layout, splits.task, trained, arm, seed)
    with logged("evaluate", arm, seed):
        record = score_model(record, encoder, splits, cut_at(settings), place)
    count, rows = processes.count, settings.batch_size
    spread = f"{count} processes, each with {rows} of the {rows * count} rows of a step"
    return finish(record, layout, [place.predictions, *kept], [spread] if count > 1 else [])


def _train_words(layout: ExperimentLayout, splits: Splits, record: RunRecord, level: MemoryLevel | None) -> RunRecord:
    """Fit and score a bag of words; nothing of it is kept but its record and its predictions."""
    place, start = layout.run("words", record.seed), time.perf_counter()
    with logged("train", "words", record.seed):
        texts = read_texts(splits.train), read_texts(splits.validation)
        words = fit_words(splits.task, texts[0], label_array(splits.train), texts[1], label_array(splits.validation))
    trained = time.perf_counter()
    with logged("evaluate", "words", record.seed):
        parts = splits_by_name(splits, scored=True)
        outputs = {split: words.predict(read_texts(rows)) for split, rows in parts.items()}
        record = score_outputs(record, splits, outputs, place)
    note = f"bag of words: inverse regularisation {words.strength:g}, chosen on validation"
    note += f"; learnt from {words.rows:,} of {len(splits.train):,} rows" if words.rows < len(splits.train) else ""
    update = {
        "precision": "fp32",
        "device": "cpu",
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
    run = TrackedRun(config.title(), place.root.name, tags, place.root, layout.root / "tracking")
    with tracked(config.run.report_to if current_processes().is_first else (), run) as callbacks:
        options = TrainingOptions(
            folder=place.checkpoints,
            lora=config.lora if arm in LORA_ARMS else None,
            seed=seed,
            precision=choose_precision(config, layout)[0],
            device=config.run.device,
            checkpoint_seconds=config.run.checkpoint_seconds,
            keep_checkpoints=config.run.keep_checkpoints,
            rows_per_epoch=len(splits.train) + splits.held_out if arm in TEACHER_ARMS else rows_per_epoch(splits),
            progress=progress,
            callbacks=callbacks,
        )
        return train_arm(encoder, splits, settings_for(config, arm), options)


def label_training_rows(config: Config, layout: ExperimentLayout, progress: Counted | None = None) -> None:
    """Let the teacher read the training rows, and the unlabelled ones, once and store its logits; stored ones stay."""
    prepare_process(config)
    label_splits(config, layout, load_splits(config.task, config.data, copies_in=layout.copies), progress)


def label_splits(config: Config, layout: ExperimentLayout, splits: Splits, progress: Counted | None = None) -> None:
    """Do the same on given splits."""
    encoder, columns = load_teacher(config, splits.task, layout.teacher)
    check_collection(config, encoder)
    parts = [(splits.train, layout.teacher_logits)]
    if splits.unlabelled is not None and labels_unlabelled(config):
        parts.append((splits.unlabelled, layout.unlabelled_logits))
    total, done = sum(len(rows) for rows, _ in parts), 0
    for rows, folder in parts:

        def count_on(part: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + part, total)

        with logged("label", folder.name, config.teacher_seed):
            teacher_logits(
                encoder,
                columns,
                rows,
                splits.task,
                folder,
                max_length=cut_at(config.teacher.train),
                precision=choose_precision(config, layout)[0],
                device=config.run.device,
                rows_per_shard=shard_rows(len(rows)),
                progress=count_on,
            )
        done += len(rows)


def shard_rows(rows: int) -> int:
    """Choose how many teacher logits go into one file: what a crash can cost, against the number of files."""
    return min(max(2_000, rows // 200), 50_000)
