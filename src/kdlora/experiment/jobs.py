"""The jobs of a plan, each carried out in a process of its own: look at a task, train a run, let a teacher label."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdlora.config import Arm, Config
from kdlora.configfile import save_config
from kdlora.data.load import add_copies, load_splits
from kdlora.errors import ArtifactError, ConfigError, KdLoraError
from kdlora.evidence.records import RunRecord, write_record
from kdlora.experiment.plan import ConfigurationLayout, PlannedRun
from kdlora.experiment.recording import TaskFacts, blank_record, hash_splits, look_at, now
from kdlora.experiment.settle import Looks, look_at_models, sample_texts
from kdlora.experiment.stages import label_training_rows, train_run
from kdlora.system.children import run_in_child
from kdlora.system.ownership import remove
from kdlora.system.storage import write_text_atomic

logger = logging.getLogger(__name__)

Listener = Callable[[Any], None]
T = TypeVar("T")


def inspect_task(
    configs: dict[str, Config], copies: Iterable[int], copies_in: Path | None, timed: bool
) -> tuple[TaskFacts, dict[str, Looks]]:
    """Load a task's data as its runs will, with each number of copies, and look at the models of each family."""
    config = next(iter(configs.values()))
    splits = load_splits(config.task, config.data.model_copy(update={"augment": 0}))
    if splits.task.kind == "tokens" and "words" in config.run.arms:
        raise ConfigError("arms: a bag of words has one answer a text, and a task of tokens wants one a word; drop it")
    facts, texts = look_at(splits, 0), sample_texts(splits.train)
    for number in copies:
        more = add_copies(splits, number, seed=config.data.split_seed, keep_in=copies_in)
        facts.fingerprints[number] = hash_splits(more)
    return facts, {name: look_at_models(one, splits.task, texts, timed=timed) for name, one in configs.items()}


@dataclass(frozen=True)
class Job:
    """One piece of work: `train` makes a run's record, `label` stores what a teacher says of the training rows.

    `config` has the teacher that was chosen; `teacher` says which training of which run that is, and is empty where
    there is but one. For `label`, `key` is the teacher's, `arm` that of the first run that needs the logits.
    Weights are kept where one of the runs ships.
    """

    kind: Literal["train", "label"]
    key: str
    config: Config
    layout: ConfigurationLayout
    arm: Arm
    seed: int
    facts: TaskFacts
    teacher: str = ""
    lesson: int = -1
    ships: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the record of a training, finished or failed; why it failed; wall-clock seconds of it all."""

    job: Job
    record: RunRecord | None
    error: str | None
    seconds: float


def carry_out(
    job: Job,
    listen: Listener | None = None,
    *,
    in_child: Callable[..., Any] = run_in_child,
    check: Callable[[], None] | None = None,
    notes: Sequence[str] = (),
) -> Outcome:
    """Carry out a job in a child of this process; what goes wrong there becomes a failed outcome, but for a full disk.

    `check` is called before the record, which gets the notes, is written.
    """
    start = time.perf_counter()
    record, fault = None, None
    try:
        if job.kind == "label":
            in_child(label_training_rows, job.config, job.layout, on_message=listen or ignore)
        else:
            record = _train(job, in_child, listen or ignore)
    except OSError:
        raise
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        logger.error("%s failed: %s", job.key, fault, exc_info=not isinstance(error, KdLoraError))
    if job.kind == "train":
        if check is not None:
            check()
        place = job.layout.run(job.arm, job.seed)
        if record is None:
            record = record_failure(job, job.layout, job.facts, fault or "", notes)
        else:
            record = record.model_copy(update={"notes": [*record.notes, *notes]})
            write_record(place.record, record)
            remove(place.checkpoints)  # from now on nothing of this run is ever resumed
    return Outcome(job, record, fault, time.perf_counter() - start)


def _train(job: Job, in_child: Callable[..., Any], listen: Listener) -> RunRecord:
    arguments = (job.config, job.layout, job.arm, job.seed)
    if job.ships:
        record: RunRecord = in_child(train_run, *arguments, on_message=listen)
    else:
        write_text_atomic(job.layout.config, save_config(job.config))
        stale = job.layout.run(job.arm, job.seed).checkpoints
        record = train_afresh(lambda: in_child(train_run, *arguments, on_message=listen), stale)
    if record.fingerprints.get("data") != job.facts.fingerprint(job.config):
        raise ArtifactError("the data changed while the experiment ran; put back what was there and run it again")
    return record if job.ships else _without_model(job, record)


def train_afresh(train: Callable[[], T], checkpoints: Path) -> T:
    """Train; where it was interrupted under another teacher, data or version, begin again without its checkpoints."""
    try:
        return train()
    except ArtifactError as error:
        if not checkpoints.exists():
            raise
        logger.info("%s starts afresh: %s", checkpoints.parent, error)
        remove(checkpoints)
        return train()


def _without_model(job: Job, record: RunRecord) -> RunRecord:
    """Remove a run's whole model: a suite compares, it ships nothing, and thousands of models fill a disk."""
    model = job.layout.run(job.arm, job.seed).model
    remove(model)
    inside = f"{model.relative_to(job.layout.root).as_posix()}/"
    files = {name: digest for name, digest in record.files.items() if not name.startswith(inside)}
    taught = {"taught_by": job.teacher} if job.teacher else {}
    return record.model_copy(update={"fingerprints": record.fingerprints | taught, "files": files})


def record_failure(
    run: Job | PlannedRun, layout: ConfigurationLayout, facts: TaskFacts, fault: str, notes: Sequence[str] = ()
) -> RunRecord:
    record = blank_record(run.config, run.arm, run.seed, facts)
    update = {"status": "failed", "error": fault, "finished": now(), "notes": [*record.notes, *notes]}
    record = record.model_copy(update=update)
    write_record(layout.run(run.arm, run.seed).record, record)
    return record


def lost(job: Job, error: Exception) -> Outcome:
    """Give the outcome of a job of which nothing came back."""
    fault = f"{type(error).__name__}: {error}"
    record = None if job.kind == "label" else record_failure(job, job.layout, job.facts, fault)
    return Outcome(job, record, fault, 0.0)


def ignore(event: Any) -> None:
    """Take an event that nobody listens to."""
