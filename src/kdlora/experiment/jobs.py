"""The jobs of a plan: how each is carried out in a process of its own, and the one queue, which knows what is ready."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import logging
import operator
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdlora.config import DISTILLED_ARMS, ROUNDING_KEYS, TEACHER_ARMS, Arm, Config
from kdlora.configfile import save_config
from kdlora.data.load import add_copies, load_splits
from kdlora.distil.precision import resolve_device
from kdlora.distil.resume import OtherTrainingError
from kdlora.errors import ArtifactError, ConfigError, KdLoraError, StaleError, harmless, listed
from kdlora.evidence.records import ExperimentLayout, RunRecord, read_record, write_record
from kdlora.experiment.plan import Lesson, PlannedRun, run_identity
from kdlora.experiment.recording import TaskFacts, blank_record, look_at, now, refuse_loss
from kdlora.experiment.settle import Looks, check_table, look_at_models, sample_texts, with_values
from kdlora.experiment.stages import label_training_rows, train_run
from kdlora.section import WINDOW_KEYS, DataConfig
from kdlora.system.children import run_in_child
from kdlora.system.environment import collect_versions, describe_machine
from kdlora.system.integrity import damaged_files
from kdlora.system.ownership import remove
from kdlora.system.storage import write_text_atomic

logger = logging.getLogger(__name__)

Listener = Callable[[Any], None]


def inspect_task(
    configs: dict[str, Config], sections: Iterable[DataConfig], copies_in: Path | None, timed: bool
) -> tuple[TaskFacts, dict[str, Looks]]:
    """Load a task's data by every `data` section of its runs, and look at the models of each family."""
    config = next(iter(configs.values()))
    first = config.data.without_copies
    splits = load_splits(config.task, first)
    if splits.task.kind == "tokens" and "words" in config.run.arms:
        raise ConfigError("arms: a bag of words has one answer a text, and a task of tokens wants one a word; drop it")
    for one in configs.values():
        check_table(one, splits)
    facts, texts = look_at(splits, first), sample_texts(splits.train)
    read = {first.row_settings: splits}  # files are read once, whatever the number of copies
    for section in sections:
        if section.row_settings in facts.rows:
            continue
        plain = section.without_copies
        if plain.row_settings not in read:
            read[plain.row_settings] = load_splits(config.task, plain)
        own = add_copies(read[plain.row_settings], section, keep_in=copies_in)
        more = look_at(own, section)
        facts.fingerprints.update(more.fingerprints)
        facts.rows.update(more.rows)
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
    layout: ExperimentLayout
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
    """Carry out a job in a child of this process; what goes wrong there becomes a failed outcome.

    What the user has to mend first is raised: a full disk, checkpoints of another training. `check` is called before
    the record, which gets the notes, is written.
    """
    start, hear = time.perf_counter(), listen or (lambda event: None)
    record, fault = None, None
    try:
        if job.kind == "label":
            label = functools.partial(in_child, label_training_rows, job.config, job.layout, on_message=hear)
            afresh = functools.partial(train_afresh, label, job.layout.unlabelled_logits)
            (label if job.ships else afresh)()  # an experiment refuses other texts
        else:
            record = _train(job, in_child, hear)
    except (OSError, OtherTrainingError):
        raise
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        if "OutOfMemoryError" in fault:  # torch's, here or in another process of the run
            fault += ". Lower micro_batch_tokens in teacher.train or student.train"
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
    train = functools.partial(in_child, train_run, job.config, job.layout, job.arm, job.seed, on_message=listen)
    if not job.ships:
        write_text_atomic(job.layout.config, save_config(job.config))
    place = job.layout.run(job.arm, job.seed)
    record: RunRecord = train() if job.ships else train_afresh(train, place.checkpoints)
    if not job.facts.made(record, job.config):
        raise ArtifactError("the data changed while the experiment ran; put back what was there and run it again")
    if job.ships:
        return record
    # A suite compares, it ships nothing, and thousands of models fill a disk.
    remove(place.model)
    inside = f"{place.model.relative_to(job.layout.root).as_posix()}/"
    files = {name: digest for name, digest in record.files.items() if not name.startswith(inside)}
    taught = {"taught_by": job.teacher} if job.teacher else {}
    return record.model_copy(update={"fingerprints": record.fingerprints | taught, "files": files})


def train_afresh(train: Callable[[], Any], checkpoints: Path) -> Any:
    """Train, or label; where it was begun under another teacher, data or version, begin again without what is there."""
    try:
        return train()
    except StaleError as error:
        if not checkpoints.exists():
            raise
        logger.info("%s starts afresh: %s", checkpoints.parent, error)
        remove(checkpoints)
        return train()


def record_failure(
    run: Job | PlannedRun, layout: ExperimentLayout, facts: TaskFacts, fault: str, notes: Sequence[str] = ()
) -> RunRecord:
    record = blank_record(run.config, run.arm, run.seed, facts)
    update = {"status": "failed", "error": harmless(fault), "finished": now(), "notes": [*record.notes, *notes]}
    record = record.model_copy(update=update)
    write_record(layout.run(run.arm, run.seed).record, record)
    return record


def lost(job: Job, error: Exception) -> Outcome:
    fault = f"{type(error).__name__}: {error}"
    record = None if job.kind == "label" else record_failure(job, job.layout, job.facts, fault)
    return Outcome(job, record, fault, 0.0)


class Queue:
    """Gives the jobs that are ready, and takes their outcomes; a run that has a record is not done again.

    A lesson begins when all candidates for its teacher have ended: the best of them labels, then its students train.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        lessons: Sequence[Lesson],
        root: Path,
        facts: Mapping[str, TaskFacts],
        finished: Mapping[str, RunRecord],
        *,
        ships: bool = False,
    ) -> None:
        self.runs, self.records = runs, dict(finished)
        self._lessons, self._root, self._facts, self._ships = lessons, root, facts, ships
        self._teachers: dict[int, PlannedRun | None] = {}
        self._ready: list[tuple[int, Job]] = []  # by the place of their task, since tables fill task by task
        self._order = {task: place for place, task in enumerate(facts)}
        for run in runs:
            place = run.layout(root).run(run.arm, run.seed)
            if run.key in self.records:
                remove(place.checkpoints)
            else:
                if not ships:  # the tables of a suite must not compare a run that is done again with it
                    remove(place.record)
                if run.arm not in DISTILLED_ARMS:
                    self._push(run)
        for number in range(len(lessons)):
            self._begin(number)

    @property
    def failed(self) -> list[RunRecord]:
        return [record for record in self.records.values() if record.status == "failed"]

    def in_order(self) -> list[RunRecord]:
        return [self.records[run.key] for run in self.runs if run.key in self.records]

    def next_job(self, later: Container[str] = ()) -> Job | None:
        """Give a job whose needs are met; None where all were given, but for those of arms that come later."""
        return self._ready.pop(0)[1] if self._ready and self._ready[0][1].arm not in later else None

    def take(self, outcome: Outcome) -> None:
        job = outcome.job
        if job.kind == "label":
            self._teach(job.lesson, f"the teacher's logits are missing: {outcome.error}" if outcome.error else "")
        else:
            assert outcome.record is not None  # a training always leaves one
            self.records[job.key] = outcome.record
        if job.kind == "train" and job.arm in TEACHER_ARMS:
            for number, lesson in enumerate(self._lessons):
                if any(one.key == job.key for one in lesson.candidates):
                    self._begin(number)
            self._prune()

    def _push(self, run: PlannedRun, lesson: int = -1, labels: PlannedRun | None = None) -> None:
        """Queue the training of a run, or the labelling that it waits for by that teacher."""
        place = labels or run
        layout, config, mark = place.layout(self._root, texts_of=run), run.config, ""
        if (teacher := self._teachers.get(lesson)) is not None:
            folder = teacher.layout(self._root).teacher
            layout, mark = dataclasses.replace(layout, shared_teacher=folder), self._mark(teacher)
            if not self._ships:  # it reads texts as it was trained to
                changes: dict[str, Any] = {"teacher": teacher.config.teacher, "teacher.tuning": "full"}
                changes["teacher.fine_tuned"] = str(folder)
                if labels is None:  # the head of `kd-fft` has the rate of its control's
                    changes["teacher.train.head_learning_rate"] = run.config.teacher.train.head_learning_rate
                else:
                    changes |= {f"data.{key}": getattr(teacher.config.data, key) for key in WINDOW_KEYS}
                config = with_values(config, changes)
        kind: Literal["train", "label"] = "train" if labels is None else "label"
        facts = self._facts[run.task]
        for path in () if self._ships or labels else layout.runs.glob("*/run.json"):  # of seeds that are named no more
            other = read_record(path)
            same = facts.made(other, config) and other.fingerprints.get("taught_by", "") == mark
            if other.status == "finished" and not same:
                remove(path)  # else this run would be refused, since the two are not comparable
        job = Job(kind, place.key, config, layout, run.arm, run.seed, facts, mark, lesson, self._ships)
        bisect.insort(self._ready, (self._order[run.task], job), key=operator.itemgetter(0))

    def _begin(self, number: int) -> None:
        """Choose the teacher and let it label, once every candidate has ended, unless all that it teaches is done."""
        lesson = self._lessons[number]
        if any(one.key not in self.records for one in lesson.candidates):
            return
        teacher = self._teachers[number] = self._best(lesson)
        if teacher is None and lesson.candidates:
            arm, count = lesson.candidates[0].arm, len(lesson.candidates)
            told = f"there is no teacher: no {arm} run of {count} finished; the same command trains it again"
            self._teach(number, told)
            return
        mark = self._mark(teacher)
        for run in lesson.students:  # taught by another teacher, or by an earlier training of this one
            if run.key in self.records and self.records[run.key].fingerprints.get("taught_by", "") != mark:
                del self.records[run.key]
                remove(run.layout(self._root).run(run.arm, run.seed).record)
        first = next((run for run in lesson.students if run.key not in self.records), None)
        if first is None:
            return
        if teacher is not None and not self._has_weights(teacher):
            logger.info("%s has no weights and is trained again", teacher.key)
            del self.records[teacher.key]
            self._push(teacher)
        elif not first.config.teacher.is_table:
            self._push(first, number, labels=teacher or first)
        else:
            self._teach(number)

    def _teach(self, number: int, fault: str = "") -> None:
        """Queue the students of a lesson; without a teacher or its logits they have failed."""
        for run in self._lessons[number].students:
            if run.key not in self.records and not fault:
                self._push(run, number)
            elif run.key not in self.records:
                self.records[run.key] = record_failure(run, run.layout(self._root), self._facts[run.task], fault)

    def _best(self, lesson: Lesson) -> PlannedRun | None:
        finished = [one for one in lesson.candidates if self._is_finished(one)]
        return max(finished, key=lambda one: self.records[one.key].score or 0.0, default=None)

    def _is_finished(self, run: PlannedRun) -> bool:
        record = self.records.get(run.key)
        return record is not None and record.status == "finished"

    def _has_weights(self, run: PlannedRun) -> bool:
        """Say whether the weights are there that a run left; all seeds of a suite's configuration have one folder."""
        folder = run.layout(self._root).teacher
        kept = self._ships or any(name.startswith(f"{folder.name}/") for name in self.records[run.key].files)
        return kept and folder.exists()

    def _prune(self) -> None:
        """Delete the weights of a suite's teachers that teach nobody: a grid of them would fill the disk."""
        kept = {best.key for lesson in self._lessons if (best := self._best(lesson)) is not None}
        for one in () if self._ships else self.runs:
            layout = one.layout(self._root)
            keeps = one.arm in TEACHER_ARMS and one.seed == one.config.teacher_seed  # all its seeds have one folder
            taught = not self._lessons and layout.teacher_logits.exists()  # students that this call does not name
            if keeps and one.key not in kept and not taught and self._is_finished(one):
                with contextlib.suppress(ArtifactError):  # what was put there by hand stays, and so do the weights
                    refuse_loss(layout.teacher)
                    remove(layout.teacher)

    def _mark(self, teacher: PlannedRun | None) -> str:
        """Say which training of which run teaches; of an experiment there is but one."""
        return "" if self._ships or teacher is None else f"{teacher.key} of {self.records[teacher.key].finished}"


def undamaged_record(run: PlannedRun, root: Path) -> RunRecord | None:
    """Read the record of a run that finished and whose files are as they were written."""
    layout = run.layout(root)
    place = layout.run(run.arm, run.seed).record
    record = read_record(place) if place.exists() else None
    if record is None or record.status != "finished":
        return None
    files = record.files
    if run.seed != run.config.teacher_seed:  # once it taught; the weights there are those of the seed that teaches now
        files = {name: one for name, one in files.items() if not name.startswith(f"{layout.teacher.name}/")}
    if hurt := damaged_files(layout.root, files):
        logger.warning("%s: damaged or gone since it was written; %s is run again", ", ".join(hurt), run.key)
        return None
    return record


def refuse_another_teacher(teacher: PlannedRun, root: Path) -> None:
    """Refuse to train a teacher again that has taught, where it would not be the same to the bit."""
    layout, machine = teacher.layout(root), describe_machine()
    threads = str(teacher.config.run.threads or machine["cores"])
    here = resolve_device(teacher.config.run.device).type, collect_versions(), machine["cpu"], threads
    made = [one for path in sorted(layout.runs.glob("*/run.json")) if (one := read_record(path)).status == "finished"]
    taught = [one for one in made if one.arm in DISTILLED_ARMS]
    before = [one for one in made if (one.arm, one.seed) == (teacher.arm, teacher.seed)]
    own, places = teacher.config.teacher.train.model_dump(mode="json"), []
    for one in [*taught, *before]:
        threads = str((one.config.get("run") or {}).get("threads") or one.machine.get("cores"))
        places.append((one.device, one.versions, one.machine.get("cpu"), threads))
    trained = [(one.config.get("teacher") or {}).get("train") or {} for one in before or taught]
    rounded = any(then.get(key, own[key]) != own[key] for then in trained for key in ROUNDING_KEYS)
    if taught and (
        rounded or any(place != here for place in places)
    ):  # as on each GPU, whose name is not that of its type
        raise ArtifactError(
            f"{teacher.key}: files of the teacher ({layout.teacher}), its record or its predictions "
            f"({layout.run(teacher.arm, teacher.seed).root}) are gone or damaged, and trained again here it would not "
            f"be the same to the bit as the one that taught {listed(f'{one.arm}-seed{one.seed}' for one in taught)}. "
            f"Put them back, or delete the folders of these runs in {layout.runs} to have them trained again"
            + (f". {' or '.join(ROUNDING_KEYS)} (teacher.train) is another, too" if rounded else "")
        )


def finished_runs(runs: Iterable[PlannedRun], root: Path, facts: Mapping[str, TaskFacts]) -> dict[str, RunRecord]:
    """Read the records of a suite's runs that need not be repeated."""
    found = {}
    for run in runs:
        record, now = undamaged_record(run, root), facts[run.task]
        if record is None or not now.made(record, run.config):
            continue
        try:
            made, wanted = run_identity(Config.model_validate(record.config)), run_identity(run.config)
        except ValueError as error:
            place = run.layout(root).run(run.arm, run.seed)
            raise ArtifactError(f"{place.record}: its config cannot be read ({error}); delete {place.root}") from None
        if run.arm in DISTILLED_ARMS:
            del wanted["teacher"]  # which is checked by its mark, once it is chosen
        if any(made[key] != value for key, value in wanted.items()):
            continue
        if record.task.get("metrics") != list(now.task.metrics):
            raise ArtifactError(
                f"{run.key} was scored by {', '.join(record.task.get('metrics', ()))}, where the classes of "
                f"{run.task} now ask for {', '.join(now.task.metrics)}. Set task.metric of that task to what it "
                "was, or name another folder with --out"
            )
        found[run.key] = record
    return found
