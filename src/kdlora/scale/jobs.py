"""The jobs of a suite, each carried out in a process of its own: look at a task, train a run, let a teacher label."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.compute as pc

from kdlora.config import Arm, Config
from kdlora.configfile import save_config
from kdlora.data.load import load_splits
from kdlora.data.rows import read_column
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError, KdLoraError
from kdlora.evidence.measure import run_in_child
from kdlora.evidence.records import RunRecord, write_record, write_text_atomic
from kdlora.experiment.recording import hash_splits, now, splits_by_name
from kdlora.experiment.sources import check_models
from kdlora.experiment.stages import label_training_rows, train_run
from kdlora.scale.plan import ConfigurationLayout

logger = logging.getLogger(__name__)

Listener = Callable[[Any], None]


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a task's data.

    Attributes:
        task: `Task.to_dict()`.
        fingerprint: of ids, texts and labels of every split.
        rows: examples per split.
        characters: mean length of a training example's text or pair.
        notes: what was inferred or dropped, in plain sentences.
    """

    task: dict[str, Any]
    fingerprint: str
    rows: dict[str, int]
    characters: float
    notes: tuple[str, ...]


def inspect_task(config: Config) -> TaskFacts:
    """Load a task's data as its runs will, and sum it up.

    Args:
        config: of any run on the task.

    Raises:
        DataError: the data are missing or do not fit.
    """
    splits = load_splits(config.task, config.data)
    columns = [name for name in ("text", "text_pair") if name in splits.train.column_names]
    lengths = [pc.mean(pc.utf8_length(read_column(splits.train, name))).as_py() for name in columns]
    rows = {name: len(part) for name, part in splits_by_name(splits).items()}
    return TaskFacts(splits.task.to_dict(), hash_splits(splits), rows, float(sum(lengths)), splits.notes)


def inspect_models(config: Config, task: dict[str, Any]) -> None:
    """Load every model that a family's runs will use, so that a mistake shows before any training.

    Args:
        config: with all arms of the suite.
        task: `Task.to_dict()`.

    Raises:
        ModelError: for a model or adapter target that does not fit.
    """
    check_models(config, Task.from_dict(task))


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind: `train` makes a run's record; `label` stores what a teacher says of the training rows.
        key: of the run; for `label` that of the teacher's.
        config: of the run, the teacher that was chosen filled in.
        layout: where it goes.
        arm: the arm.
        seed: the run's seed.
        task: `Task.to_dict()`, for the record of a run that fails.
        teacher: says which training of which run teaches; empty for an arm without a teacher.
    """

    kind: Literal["train", "label"]
    key: str
    config: Config
    layout: ConfigurationLayout
    arm: Arm
    seed: int
    task: dict[str, Any]
    teacher: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: the job.
        record: of a training, finished or failed; None for `label`.
        error: why it failed; None where it did not.
        seconds: wall-clock time of the whole job, imports of a first job included.
    """

    job: Job
    record: RunRecord | None
    error: str | None
    seconds: float


def carry_out(job: Job, listen: Listener | None = None) -> Outcome:
    """Carry out a job in a child of this process; what goes wrong there becomes a failed outcome.

    Args:
        job: what to do.
        listen: called with each event of the job.

    Returns:
        The outcome. The record lies in the run's folder, written last.

    Raises:
        OSError: the disk is full, or a folder cannot be written: it would end every job alike.
    """
    start = time.perf_counter()
    try:
        if job.kind == "label":
            run_in_child(label_training_rows, job.config, job.layout, on_message=listen or _ignore)
            return Outcome(job, None, None, time.perf_counter() - start)
        record = _train(job, listen or _ignore)
    except OSError:
        raise
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        logger.error("%s failed: %s", job.key, fault, exc_info=not isinstance(error, KdLoraError))
        record = failed_record(job, fault)
    if job.kind == "label":
        return Outcome(job, None, record.error, time.perf_counter() - start)
    place = job.layout.run(job.arm, job.seed)
    write_record(place.record, record)
    if record.status == "finished":  # from now on nothing of this run is ever resumed
        shutil.rmtree(place.checkpoints, ignore_errors=True)
    return Outcome(job, record, record.error, time.perf_counter() - start)


def _train(job: Job, listen: Listener) -> RunRecord:
    place = job.layout.run(job.arm, job.seed)
    write_text_atomic(job.layout.config, save_config(job.config))
    arguments = (job.config, job.layout, job.arm, job.seed)
    try:
        record = run_in_child(train_run, *arguments, on_message=listen).value
    except ArtifactError as error:
        if not place.checkpoints.exists():
            raise
        logger.info("%s starts afresh: %s", job.key, error)  # interrupted under another teacher or other data
        shutil.rmtree(place.checkpoints)
        record = run_in_child(train_run, *arguments, on_message=listen).value
    shutil.rmtree(place.model, ignore_errors=True)  # a suite compares; it ships nothing, and thousands fill a disk
    model = place.model.relative_to(job.layout.root).as_posix()
    files = {name: digest for name, digest in record.files.items() if not name.startswith(f"{model}/")}
    taught = {"taught_by": job.teacher} if job.teacher else {}
    return record.model_copy(update={"fingerprints": record.fingerprints | taught, "files": files})


def failed_record(job: Job, fault: str) -> RunRecord:
    """Make the record of a run that did not come to an end.

    Args:
        job: the run.
        fault: why.
    """
    teacher, student = job.config.teacher, job.config.student
    model = teacher.model if job.arm in ("fft", "lora") else student.model
    return RunRecord(
        experiment=job.config.title(),
        task=job.task,
        arm=job.arm,
        seed=job.seed,
        status="failed",
        error=fault,
        teacher_model=teacher.model,
        student_model=student.model,
        model=str(model or f"{teacher.model}, layers {list(student.from_teacher_layers or ())}"),
        finished=now(),
        config=job.config.model_dump(mode="json"),
    )


def _ignore(event: Any) -> None:
    """Take an event that nobody listens to."""
