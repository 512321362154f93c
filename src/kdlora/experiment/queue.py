"""The one queue of jobs: what is done, what waits for what, which teacher teaches; it carries out nothing itself."""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from kdlora.config import DISTILLED_ARMS, TEACHER_ARMS, Config
from kdlora.errors import ArtifactError
from kdlora.evidence.records import RunRecord, read_record
from kdlora.experiment.jobs import Job, Outcome, record_failure
from kdlora.experiment.plan import Lesson, PlannedRun, identity
from kdlora.experiment.recording import TaskFacts
from kdlora.system.integrity import damaged_files
from kdlora.system.ownership import remove

logger = logging.getLogger(__name__)


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
        """Take the plan, what is known of its tasks, and the records of the runs that need not be repeated."""
        self.runs, self.records, self.reused = runs, dict(finished), len(finished)
        self._lessons, self._root, self._facts, self._ships = lessons, root, facts, ships
        self._teachers: dict[int, PlannedRun | None] = {}
        self._heap: list[tuple[int, int, Job]] = []
        self._count = 0
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
        is_ready = self._heap and self._heap[0][2].arm not in later
        return heapq.heappop(self._heap)[2] if is_ready else None

    def take(self, outcome: Outcome) -> None:
        """Note the outcome of a job, and what it makes ready."""
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
        """Queue the training of a run, or the labelling that it waits for by that teacher; tables fill task by task."""
        place = labels or run
        layout, config, mark = place.layout(self._root), run.config, ""
        if (teacher := self._teachers.get(lesson)) is not None:
            folder = teacher.layout(self._root).teacher
            layout, mark = dataclasses.replace(layout, shared_teacher=folder), self._mark(teacher)
            if not self._ships:  # it reads texts as it was trained to
                section = teacher.config.teacher.model_copy(update={"fine_tuned": str(folder), "tuning": "full"})
                config = config.model_copy(update={"teacher": section})
        kind: Literal["train", "label"] = "train" if labels is None else "label"
        facts = self._facts[run.task]
        job = Job(kind, place.key, config, layout, run.arm, run.seed, facts, mark, lesson, self._ships)
        self._count += 1
        heapq.heappush(self._heap, (self._order[run.task], self._count, job))

    def _begin(self, number: int) -> None:
        """Choose the teacher and let it label, once every candidate has ended, unless all that it teaches is done."""
        lesson = self._lessons[number]
        if any(one.key not in self.records for one in lesson.candidates):
            return
        teacher = self._teachers[number] = self._best(lesson)
        if teacher is None and lesson.candidates:
            again = "the same command trains it again"
            self._teach(
                number,
                f"there is no teacher: no {lesson.candidates[0].arm} run of {len(lesson.candidates)} finished; {again}",
            )
            return
        mark = self._mark(teacher)
        for run in lesson.students:  # taught by another teacher, or by an earlier training of this one
            if run.key in self.records and self.records[run.key].fingerprints.get("taught_by", "") != mark:
                del self.records[run.key]
                remove(run.layout(self._root).run(run.arm, run.seed).record)
        first = next((run for run in lesson.students if run.key not in self.records), None)
        if first is None:
            return
        if teacher is not None and not teacher.layout(self._root).teacher.exists():
            logger.info("%s has no weights and is trained again", teacher.key)
            del self.records[teacher.key]
            self._push(teacher)
        elif lesson.labels:
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
        """Choose among the candidates that finished: the best on validation, the first of equals."""
        finished = [one for one in lesson.candidates if self._is_finished(one)]
        return max(finished, key=lambda one: self.records[one.key].score or -math.inf, default=None)

    def _is_finished(self, run: PlannedRun) -> bool:
        record = self.records.get(run.key)
        return record is not None and record.status == "finished"

    def _prune(self) -> None:
        """Delete the weights of teachers that another one has beaten: a grid of them would fill the disk."""
        kept = {best.key for lesson in self._lessons if (best := self._best(lesson)) is not None}
        for one in {one.key: one for lesson in self._lessons for one in lesson.candidates}.values():
            if one.key not in kept and self._is_finished(one):
                remove(one.layout(self._root).teacher)

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
    if hurt := damaged_files(layout.root, record.files):
        logger.warning("%s: damaged or gone since it was written; %s is run again", ", ".join(hurt), run.key)
        return None
    return record


def finished_runs(runs: Iterable[PlannedRun], root: Path, facts: Mapping[str, TaskFacts]) -> dict[str, RunRecord]:
    """Read the records of a suite's runs that need not be repeated."""
    found = {}
    for run in runs:
        record, now = undamaged_record(run, root), facts[run.task]
        if record is None or record.fingerprints.get("data") != now.fingerprint(run.config):
            continue
        if _is_same(run, record, root):
            if record.task.get("metrics") != list(now.task["metrics"]):
                raise ArtifactError(
                    f"{run.key} was scored by {', '.join(record.task.get('metrics', ()))}, where the classes of "
                    f"{run.task} now ask for {', '.join(now.task['metrics'])}. Set task.metric of that task to what it "
                    "was, or name another folder with --out"
                )
            found[run.key] = record
    return found


def _is_same(run: PlannedRun, record: RunRecord, root: Path) -> bool:
    """Whether a record is of a run's own config; the teacher is checked by its mark, once it is chosen."""
    try:
        made = identity(Config.model_validate(record.config))
    except ValueError as error:
        place = run.layout(root).run(run.arm, run.seed)
        raise ArtifactError(f"{place.record}: its config cannot be read ({error}); delete {place.root}") from None
    ignored = {"teacher"} if run.arm in DISTILLED_ARMS else set()
    wanted = identity(run.config)
    return all(made[key] == wanted[key] for key in wanted.keys() - ignored)
