"""The stages of an experiment; each reads its inputs from disk, so it can run in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config, TrainConfig
from kdlora.data.load import Splits, load_splits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_device, resolve_precision
from kdlora.distil.processes import current_processes
from kdlora.distil.teacher import teacher_logits
from kdlora.distil.tracking import TrackedRun, tracked
from kdlora.evidence.integrity import hash_files
from kdlora.evidence.measure import forget_peak, peak_since, read_memory
from kdlora.evidence.records import ExperimentLayout, RunRecord
from kdlora.experiment.arms import Progress, Trained, rows_per_epoch, train_arm
from kdlora.experiment.origin import add_origin, check_origin
from kdlora.experiment.recording import add_training, new_record, now, prepare_process
from kdlora.experiment.scoring import score_given_teacher, score_model
from kdlora.experiment.shipping import keep_weights, kept_places
from kdlora.experiment.sources import (
    check_collection,
    labels_unlabelled,
    load_base,
    load_teacher,
    stored_logits,
    stored_unlabelled_logits,
)
from kdlora.experiment.stage_log import logged
from kdlora.models.encoders import Encoder

StageName = Literal["train", "label", "deploy"]


@dataclass(frozen=True)
class Stage:
    """What an experiment is busy with.

    Attributes:
        name: `train`; `label`: the teacher reads the training rows; `deploy`: the student is exported and measured.
        arm: the arm; for `label` the first one that needs the logits.
        seed: the run's seed.
    """

    name: StageName
    arm: Arm
    seed: int


def settings_for(config: Config, arm: Arm) -> TrainConfig:
    """Return how an arm is trained.

    `fft` follows `teacher.train`; all else, the teacher-size `lora` included, follows `student.train`, since the
    paper searches one range for LoRA and KD-LoRA. Fully tuned students take `student.full_learning_rate`.

    Args:
        config: the experiment.
        arm: the arm.
    """
    if arm == "fft":
        return config.teacher.train
    if arm in LORA_ARMS:
        return config.student.train
    return config.student.train.model_copy(update={"learning_rate": config.student.full_learning_rate})


def shares_out(config: Config, arm: Arm) -> bool:
    """Say whether several processes share the model of an arm out: a teacher all of whose weights are trained.

    Args:
        config: the experiment.
        arm: the arm.
    """
    return config.run.shard_teacher and arm == "fft"


def train_run(config: Config, layout: ExperimentLayout, arm: Arm, seed: int, progress: Progress | None) -> RunRecord:
    """Train, measure and keep one arm with one seed; a given teacher is only evaluated.

    Of several processes all train, and the first measures and keeps.

    Args:
        config: the experiment.
        layout: its folder; an interrupted training continues from the run's checkpoints.
        arm: the arm.
        seed: the run's seed.
        progress: called with each training event.

    Returns:
        The record. Whoever has written it to disk removes the run's checkpoints. Its peak memory is that of the
        training, data and validation included, above the level after imports; it means that of this run alone where
        the process is the run's own. That of another process than the first stays unfinished.
    """
    prepare_process(config)
    forget_peak()
    level = read_memory()
    splits = load_splits(config.task, config.data)
    record = new_record(config, splits, arm, seed)
    processes = current_processes()
    if arm == "fft" and config.given_teacher:
        return score_given_teacher(config, layout, splits, record) if processes.is_first else record
    place = layout.run(arm, seed)
    teacher = stored_logits(config, layout, splits.task) if arm in DISTILLED_ARMS else None
    unlabelled = stored_unlabelled_logits(config, layout, splits) if arm in DISTILLED_ARMS else None
    encoder = load_base(config, arm, seed, splits.task)
    record = add_origin(record, encoder, teacher, unlabelled)
    check_origin(layout, record)
    with logged("train", arm, seed):
        trained = train_splits(config, layout, splits, encoder, arm, seed, teacher, unlabelled, progress)
    if not processes.is_first:
        return record
    if processes.count > 1:
        rows = settings_for(config, arm).batch_size
        spread = f"{processes.count} processes, each with {rows} of the {rows * processes.count} rows of a step"
        spread += ", which shared the model out" if shares_out(config, arm) else ""
        record = record.model_copy(update={"notes": [*record.notes, spread]})
    record = add_training(record, trained, teacher, unlabelled)
    record = record.model_copy(update={"peak_memory_bytes": peak_since(level)})
    with logged("merge", arm, seed):
        encoder = keep_weights(config, layout, splits.task, trained, arm, seed)
        encoder.model.to(resolve_device(config.run.device))  # one that was shared out has been in main memory
    with logged("evaluate", arm, seed):
        record = score_model(record, encoder, splits, settings_for(config, arm).max_length, place)
    kept = hash_files(layout.root, kept_places(config, layout, arm, seed))
    return record.model_copy(update={"status": "finished", "finished": now(), "files": kept})


def train_splits(
    config: Config,
    layout: ExperimentLayout,
    splits: Splits,
    encoder: Encoder,
    arm: Arm,
    seed: int,
    teacher: TeacherLogits | None,
    unlabelled: TeacherLogits | None,
    progress: Progress | None,
) -> Trained:
    """Train one arm as the config says, on given splits, and tell the trackers that it names.

    Args:
        config: the experiment.
        layout: its folder, for the run's checkpoints.
        splits: the task with its examples.
        encoder: what is trained.
        arm: the arm.
        seed: the run's seed.
        teacher: logits of the training rows, for a distilled arm.
        unlabelled: logits of the unlabelled rows, for a distilled arm.
        progress: called with each training event.
    """
    trackers = config.run.report_to if current_processes().is_first else ()
    with tracked(trackers, _tracked_run(config, layout, splits, arm, seed)) as callbacks:
        return train_arm(
            encoder,
            splits,
            settings_for(config, arm),
            folder=layout.run(arm, seed).checkpoints,
            lora=config.lora if arm in LORA_ARMS else None,
            teacher=teacher,
            unlabelled=unlabelled,
            distil=config.distil,
            seed=seed,
            precision=config.run.precision,
            device=config.run.device,
            checkpoint_seconds=config.run.checkpoint_seconds,
            keep_checkpoints=config.run.keep_checkpoints,
            rows_per_epoch=None if arm in TEACHER_ARMS else rows_per_epoch(splits),
            shard=shares_out(config, arm),
            progress=progress,
            callbacks=callbacks,
        )


def _tracked_run(config: Config, layout: ExperimentLayout, splits: Splits, arm: Arm, seed: int) -> TrackedRun:
    """Name a run for the trackers."""
    tags = {"arm": arm, "seed": str(seed)} | ({"task": splits.task.name} if splits.task.name else {})
    place = layout.run(arm, seed).root
    return TrackedRun(config.title(), place.name, tags, place, layout.root / "tracking")


def label_training_rows(
    config: Config, layout: ExperimentLayout, progress: Callable[[int, int], None] | None = None
) -> int:
    """Let the teacher read the training rows, and the unlabelled ones, once and store its logits; stored ones stay.

    Args:
        config: the experiment.
        layout: its folder.
        progress: called with rows done and rows in all.

    Returns:
        How many texts the teacher read cut.
    """
    prepare_process(config)
    return label_splits(config, layout, load_splits(config.task, config.data), progress)


def label_splits(
    config: Config, layout: ExperimentLayout, splits: Splits, progress: Callable[[int, int], None] | None = None
) -> int:
    """Do the same on given splits.

    Args:
        config: the experiment.
        layout: its folder.
        splits: the task with its examples.
        progress: called with rows done and rows in all.

    Returns:
        How many texts the teacher read cut.
    """
    encoder, columns = load_teacher(config, splits.task, layout.teacher)
    check_collection(config, encoder)
    parts = [(splits.train, layout.teacher_logits)]
    if splits.unlabelled is not None and labels_unlabelled(config):
        parts.append((splits.unlabelled, layout.unlabelled_logits))
    total, done, truncated = sum(len(rows) for rows, _ in parts), 0, 0
    for rows, folder in parts:
        with logged("label", folder.name, config.teacher_seed):
            logits = teacher_logits(
                encoder,
                columns,
                rows,
                splits.task,
                folder,
                max_length=config.teacher.train.max_length,
                precision=resolve_precision(config.run.precision, config.run.device)[0],
                device=config.run.device,
                rows_per_shard=shard_rows(len(rows)),
                progress=_counting_on(progress, done, total),
            )
        done += len(rows)
        truncated += logits.truncated
    return truncated


def shard_rows(rows: int) -> int:
    """Choose how many teacher logits go into one file: what a crash can cost, against the number of files.

    Args:
        rows: of the training split.

    Returns:
        2,000 up to 400,000 rows, a 200th of more, 50,000 at most.
    """
    return min(max(2_000, rows // 200), 50_000)


def _counting_on(
    progress: Callable[[int, int], None] | None, done: int, total: int
) -> Callable[[int, int], None] | None:
    """Report the rows of one part as those of all."""
    return None if progress is None else lambda part, _: progress(done + part, total)
