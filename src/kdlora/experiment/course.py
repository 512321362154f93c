"""The course of a suite: what is done, what waits for what, which teacher teaches; it carries out nothing itself."""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kdlora.config import DISTILLED_ARMS, Config
from kdlora.errors import ArtifactError
from kdlora.evidence.records import RunRecord, read_record, write_record
from kdlora.experiment.jobs import Job, Outcome, TaskFacts, failed_record
from kdlora.experiment.plan import Plan, PlannedRun, identity
from kdlora.system.integrity import damaged_files
from kdlora.system.ownership import remove

logger = logging.getLogger(__name__)


@dataclass
class _TeacherGroup:
    """Runs of which one teaches, and the runs that it teaches.

    Attributes:
        candidates: `fft` runs, in the order of the grid.
        students: the distilled runs.
        waiting: keys of the candidates that have not ended yet.
        chosen: the teacher, once every candidate has ended and its logits are stored.
    """

    candidates: tuple[PlannedRun, ...]
    students: list[PlannedRun] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    chosen: PlannedRun | None = None


class Course:
    """Gives the jobs that are ready, and takes their outcomes; what is finished on disk is not done again.

    Attributes:
        records: record of every run that has ended, by the run's key.
        total: runs in all.
        reused: runs that were finished before.
    """

    def __init__(self, plan: Plan, root: Path, facts: dict[str, TaskFacts]) -> None:
        """Read what is on disk."""
        self.plan, self.root, self.facts = plan, root, facts
        self.records: dict[str, RunRecord] = {}
        self._queue: list[tuple[int, int, Job]] = []
        self._count = 0
        runs = plan.runs()
        self.total = len(runs)
        self._groups = self._group(runs)
        self._order = {task: place for place, task in enumerate(plan.suite.tasks)}
        for run in runs:
            record = finished_record(run, root, facts[run.task].fingerprint)
            if record is not None:
                self.records[run.key] = record
            else:
                self._forget(run)
        self.reused = len(self.records)
        for run in runs:
            if run.arm not in DISTILLED_ARMS and run.key not in self.records:
                self._push(self._job(run))
        for group in self._groups:
            group.waiting = {one.key for one in group.candidates if one.key not in self.records}
            if not group.waiting:
                self._open(group)

    def _forget(self, run: PlannedRun) -> None:
        """Remove a record that no longer holds: a run that is done again must not be compared with it."""
        remove(run.layout(self.root).run(run.arm, run.seed).record)

    def _group(self, runs: Iterable[PlannedRun]) -> list[_TeacherGroup]:
        groups: dict[tuple[str, ...], _TeacherGroup] = {}
        of_cell: dict[str, _TeacherGroup] = {}
        for cell in self.plan.cells:
            if cell.arm in DISTILLED_ARMS:
                candidates = self.plan.teachers[cell.task, cell.family]
                group = groups.setdefault(tuple(one.key for one in candidates), _TeacherGroup(candidates))
                of_cell.update({run.key: group for run in cell.runs})
        for run in runs:
            if run.key in of_cell:
                of_cell[run.key].students.append(run)
        return list(groups.values())

    @property
    def failed(self) -> list[RunRecord]:
        """The runs that failed, in no particular order."""
        return [record for record in self.records.values() if record.status == "failed"]

    def next_job(self) -> Job | None:
        """Give a job whose needs are met; None where every such job was given."""
        return heapq.heappop(self._queue)[2] if self._queue else None

    def pending(self) -> list[PlannedRun]:
        """List the runs that have not ended."""
        return [run for run in self.plan.runs() if run.key not in self.records]

    def take(self, outcome: Outcome) -> None:
        """Note the outcome of a job, and what it makes ready."""
        job = outcome.job
        if job.kind == "label":
            for group in self._groups:
                if group.chosen is not None and group.chosen.key == job.key:
                    self._teach(group, outcome.error)
            return
        assert outcome.record is not None  # a training always leaves one
        self.records[job.key] = outcome.record
        if job.arm == "fft":
            for group in self._groups:
                if job.key in group.waiting:
                    group.waiting.remove(job.key)
                    if not group.waiting:
                        self._open(group)
            self._prune()

    def _push(self, job: Job) -> None:
        """Queue a job: task by task, so that the tables fill from above."""
        self._count += 1
        place = self._order[job.key.split("/")[1]]
        heapq.heappush(self._queue, (place, self._count, job))

    def _open(self, group: _TeacherGroup) -> None:
        """Choose the teacher, and let it label, unless all that it teaches is done."""
        teacher = self._best(group)
        if teacher is None:
            self._fail(group, f"there is no teacher: none of the {len(group.candidates)} fft runs finished")
            return
        mark = self._mark(teacher)
        for run in group.students:  # taught by another teacher, or by an earlier training of this one
            if run.key in self.records and self.records[run.key].fingerprints.get("taught_by") != mark:
                del self.records[run.key]
                self._forget(run)
        if all(run.key in self.records for run in group.students):
            return
        layout = teacher.layout(self.root)
        if not layout.teacher.exists():
            logger.info("%s has no weights and is trained again", teacher.key)
            del self.records[teacher.key]
            group.waiting = {teacher.key}
            self._push(self._job(teacher))
            return
        group.chosen = teacher
        config = _taught(group.students[0].config, teacher, self.root)
        task = self.facts[teacher.task].task
        self._push(Job("label", teacher.key, config, layout, "fft", teacher.seed, task, mark))

    def _teach(self, group: _TeacherGroup, fault: str | None) -> None:
        if fault is not None:
            self._fail(group, f"the teacher's logits are missing: {fault}")
            return
        for run in group.students:
            if run.key not in self.records:
                self._push(self._job(run, group.chosen))

    def _fail(self, group: _TeacherGroup, fault: str) -> None:
        for run in group.students:
            if run.key not in self.records:
                self.records[run.key] = failed_record(self._job(run), fault)
                write_record(run.layout(self.root).run(run.arm, run.seed).record, self.records[run.key])

    def _best(self, group: _TeacherGroup) -> PlannedRun | None:
        """Choose among the candidates that finished: the best on validation, the first of equals."""
        finished = [one for one in group.candidates if self._is_finished(one)]
        return max(finished, key=lambda one: self.records[one.key].score or -math.inf, default=None)

    def _is_finished(self, run: PlannedRun) -> bool:
        record = self.records.get(run.key)
        return record is not None and record.status == "finished"

    def _prune(self) -> None:
        """Delete the weights of teachers that another one has beaten: a grid of them would fill the disk."""
        kept = {best.key for group in self._groups if (best := self._best(group)) is not None}
        for group in self._groups:
            for one in group.candidates:
                if one.key not in kept and self._is_finished(one):
                    remove(one.layout(self.root).teacher)

    def _mark(self, teacher: PlannedRun) -> str:
        return f"{teacher.key} of {self.records[teacher.key].finished}"

    def _job(self, run: PlannedRun, teacher: PlannedRun | None = None) -> Job:
        layout, config, mark = run.layout(self.root), run.config, ""
        if teacher is not None:
            layout = dataclasses.replace(layout, shared_teacher=teacher.layout(self.root).teacher)
            config, mark = _taught(config, teacher, self.root), self._mark(teacher)
        return Job("train", run.key, config, layout, run.arm, run.seed, self.facts[run.task].task, mark)


def _taught(config: Config, teacher: PlannedRun, root: Path) -> Config:
    """Fill in the teacher that was chosen; it reads texts as it was trained to."""
    folder = str(teacher.layout(root).teacher)
    section = teacher.config.teacher.model_copy(update={"fine_tuned": folder})
    return config.model_copy(update={"teacher": section})


def finished_record(run: PlannedRun, root: Path, rows: str) -> RunRecord | None:
    """Read the record of a run that need not be repeated."""
    place = run.layout(root).run(run.arm, run.seed)
    if not place.record.exists():
        return None
    record = read_record(place.record)
    if record.status != "finished" or record.fingerprints.get("data") != rows:
        return None
    if hurt := damaged_files(run.layout(root).root, record.files):
        logger.warning("%s: damaged or gone since it was written; %s is run again", ", ".join(hurt), run.key)
        return None
    try:
        made = identity(Config.model_validate(record.config))
    except ValueError as error:
        raise ArtifactError(f"{place.record}: its config cannot be read ({error}); delete {place.root}") from None
    wanted = identity(run.config)
    if run.arm in DISTILLED_ARMS:  # the teacher is checked by its mark, once it is chosen
        del made["teacher"], wanted["teacher"]
    return record if made == wanted else None
