"""The jobs of a suite, each carried out in a process of its own: look at a task, train a run, let a teacher label."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc

from kdlora.config import Arm, Config
from kdlora.configfile import save_config
from kdlora.data.load import load_splits
from kdlora.data.spool import read_column
from kdlora.data.tasks import Task
from kdlora.distil.words import BAG_OF_WORDS
from kdlora.errors import ArtifactError, KdLoraError
from kdlora.evidence.records import RunRecord, write_record
from kdlora.experiment.inputs import check_models
from kdlora.experiment.plan import ConfigurationLayout
from kdlora.experiment.recording import hash_splits, now, splits_by_name
from kdlora.experiment.settle import Chosen, choose
from kdlora.experiment.stages import label_training_rows, train_run
from kdlora.system.children import run_in_child
from kdlora.system.ownership import remove
from kdlora.system.storage import write_text_atomic

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
        chosen: what data and models decide where the suite does not, by family.
    """

    task: dict[str, Any]
    fingerprint: str
    rows: dict[str, int]
    characters: float
    notes: tuple[str, ...]
    chosen: dict[str, Chosen] = field(default_factory=dict)


def inspect_task(configs: dict[str, Config], copies_in: Path | None) -> TaskFacts:
    """Load a task's data as its runs will, and sum it up."""
    config = next(iter(configs.values()))
    splits = load_splits(config.task, config.data, copies_in=copies_in)
    columns = [name for name in ("text", "text_pair") if name in splits.train.column_names]
    lengths = [pc.mean(pc.utf8_length(read_column(splits.train, name))).as_py() for name in columns]
    rows = {name: len(part) for name, part in splits_by_name(splits).items()}
    chosen = {name: choose(one, splits) for name, one in configs.items()}
    return TaskFacts(splits.task.to_dict(), hash_splits(splits), rows, float(sum(lengths)), splits.notes, chosen)


def inspect_models(config: Config, task: dict[str, Any]) -> None:
    """Load every model that a family's runs will use, so that a mistake shows before any training."""
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
    """Carry out a job in a child of this process; what goes wrong there becomes a failed outcome."""
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
        remove(place.checkpoints)
    return Outcome(job, record, record.error, time.perf_counter() - start)


def _train(job: Job, listen: Listener) -> RunRecord:
    place = job.layout.run(job.arm, job.seed)
    write_text_atomic(job.layout.config, save_config(job.config))
    arguments = (job.config, job.layout, job.arm, job.seed)
    try:
        record = run_in_child(train_run, *arguments, on_message=listen)
    except ArtifactError as error:
        if not place.checkpoints.exists():
            raise
        logger.info("%s starts afresh: %s", job.key, error)  # interrupted under another teacher or other data
        remove(place.checkpoints)
        record = run_in_child(train_run, *arguments, on_message=listen)
    remove(place.model)  # a suite compares; it ships nothing, and thousands fill a disk
    model = place.model.relative_to(job.layout.root).as_posix()
    files = {name: digest for name, digest in record.files.items() if not name.startswith(f"{model}/")}
    taught = {"taught_by": job.teacher} if job.teacher else {}
    return record.model_copy(update={"fingerprints": record.fingerprints | taught, "files": files})


def failed_record(job: Job, fault: str) -> RunRecord:
    """Make the record of a run that did not come to an end."""
    teacher, student = job.config.teacher, job.config.student
    words = BAG_OF_WORDS if job.arm == "words" else None
    model = words or (teacher.model if job.arm in ("fft", "lora") else student.model)
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
