"""Carry out a suite: check everything first, run what is not finished, keep what failed, write the tables."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlora.config import Config
from kdlora.errors import ConfigError, KdLoraError
from kdlora.evidence.records import RunRecord
from kdlora.experiment.course import Course
from kdlora.experiment.engines import Engine, SerialEngine
from kdlora.experiment.jobs import Job, Outcome, TaskFacts, inspect_models, inspect_task
from kdlora.experiment.plan import Plan, make_plan, whole_config
from kdlora.experiment.settle import Chosen
from kdlora.experiment.suite_tables import write_tables
from kdlora.experiment.suitefile import SuiteConfig, save_suite
from kdlora.system.ownership import check_folder, claim_folder
from kdlora.system.storage import hold_lock, write_text_atomic

logger = logging.getLogger(__name__)

MOST_RUNS = 10_000
"""A plan of more runs has to be confirmed: it may be a slip of the pen."""


@dataclass(frozen=True)
class SuiteLayout:
    """The names inside a suite's folder; the runs lie below `runs/`."""

    root: Path

    @property
    def suite(self) -> Path:
        """The suite as it was carried out last, every default filled in."""
        return self.root / "suite.yaml"

    @property
    def copies(self) -> Path:
        """Perturbed copies of the tasks' training texts."""
        return self.root / "copies"

    @property
    def lock(self) -> Path:
        """Held by the process that carries the suite out."""
        return self.root / ".lock"


@dataclass(frozen=True)
class SuiteEvent:
    """Where a suite stands.

    Attributes:
        done: runs that have ended, earlier calls included.
        total: runs in all.
        failed: of those done, how many failed.
        job: the job that this is about; None where none is.
        detail: an event of the job itself, such as a training's progress, or its `Outcome`; None at the start.
    """

    done: int
    total: int
    failed: int
    job: Job | None = None
    detail: Any = None


@dataclass(frozen=True)
class SuiteResult:
    """What a suite left behind.

    Attributes:
        folder: the suite's.
        plan: its runs.
        records: record of every run, by the run's key.
        reused: runs that were finished before.
        tables: the files with the tables.
    """

    folder: Path
    plan: Plan
    records: dict[str, RunRecord]
    reused: int
    tables: tuple[Path, ...]

    @property
    def failed(self) -> list[RunRecord]:
        """The runs that failed."""
        return [record for record in self.records.values() if record.status == "failed"]

    def to_dict(self) -> dict[str, Any]:
        """Give the figures for programs."""
        names = ("experiment", "arm", "seed", "error")
        return {
            "folder": str(self.folder),
            "runs": len(self.records),
            "finished": sum(record.status == "finished" for record in self.records.values()),
            "reused": self.reused,
            "failed": [{name: getattr(record, name) for name in names} for record in self.failed],
            "tables": [str(path) for path in self.tables],
        }


def run_suite(
    suite: SuiteConfig,
    out: str | Path | None = None,
    *,
    on: str | None = None,
    confirmed: bool = False,
    listen: Callable[[SuiteEvent], None] | None = None,
) -> SuiteResult:
    """Carry out every run of a suite that is not finished yet, and write its tables.

    Args:
        suite: tasks, families, arms, configurations and seeds.
        out: its folder, default `runs/<name>`. The same call again repeats no finished run.
        on: `ray` or `ray://HOST:PORT`: the cluster that carries the runs out; default: this process, one by one.
        confirmed: whether a plan of more than 10,000 runs is meant.
        listen: called with each event.

    Returns:
        The records. A run that fails is recorded, and the others are carried out.

    Raises:
        KdLoraError: if the suite, its data or its models do not fit, before any training.
    """
    check_size(suite, confirmed=confirmed)
    plan = make_plan(suite)
    if "://" in str(out):
        raise ConfigError(f"--out {out}: runs are written to a folder; mount the store, and name a folder of it")
    layout = SuiteLayout((Path(out) if out is not None else Path("runs") / suite.name).absolute())
    with _only_process(layout):
        write_text_atomic(layout.suite, save_suite(suite))
        course: Course | None = None

        def tell(job: Job | None, detail: Any) -> None:
            if listen is not None and course is not None:
                listen(SuiteEvent(len(course.records), course.total, len(course.failed), job, detail))

        with _engine(plan, layout, on, tell) as engine:
            facts = inspect_tasks(plan, engine, layout.copies)
            plan = make_plan(suite, chosen_settings(facts))
            course = Course(plan, layout.root, facts)
            check_models_of(plan, course, engine)
            tell(None, None)
            try:
                carry_out_course(course, engine, tell)
            finally:  # also after Ctrl-C: what there is can be read
                tables = write_tables(plan, layout.root, course.records)
    return SuiteResult(layout.root, plan, course.records, course.reused, tables)


@contextlib.contextmanager
def _engine(
    plan: Plan, layout: SuiteLayout, on: str | None, tell: Callable[[Job | None, Any], None]
) -> Iterator[Engine]:
    """Give what carries the jobs out: this process, or a cluster whose nodes were looked at."""
    if on is None:
        yield SerialEngine(tell)
        return
    from kdlora.experiment.engines import RayEngine
    from kdlora.experiment.ray_cluster import check_nodes, connect, local_paths, settle_needs

    ray = connect(on)
    needs = settle_needs(ray, plan.suite.resources)
    engine = RayEngine(ray, needs)
    try:
        paths = [str(layout.suite)]
        paths += [path for cell in plan.cells for path in local_paths(cell.runs[0].config)]
        check_nodes(ray, list(dict.fromkeys(paths)), needs)
        yield engine
    finally:
        engine.close()


def check_size(suite: SuiteConfig, *, confirmed: bool) -> None:
    """Refuse a huge plan that nobody has confirmed."""
    runs = suite.count_runs()
    if runs > MOST_RUNS and not confirmed:
        counts = [(suite.tasks, "tasks"), (suite.families, "families"), (suite.arms, "arms"), (suite.seeds, "seeds")]
        sizes = ", ".join(f"{word}: {len(values)}" for values, word in counts)
        raise ConfigError(
            f"this suite has {runs:,} runs ({sizes}, and the configurations of each arm), more than "
            f"{MOST_RUNS:,}; if that is what you mean, add --yes, else shorten a grid"
        )


def carry_out_course(course: Course, engine: Engine, tell: Callable[[Job | None, Any], None]) -> None:
    """Feed an engine until nothing is left."""
    while True:
        while engine.room > 0 and (job := course.next_job()) is not None:
            engine.submit(job)
        if not engine.busy:
            return
        outcome: Outcome = engine.wait()
        course.take(outcome)
        tell(outcome.job, outcome)


def inspect_tasks(plan: Plan, engine: Engine, copies_in: Path | None = None) -> dict[str, TaskFacts]:
    """Look at the data of every task."""
    suite = plan.suite
    configs = {task: {name: whole_config(suite, task, name) for name in suite.families} for task in suite.tasks}
    answers = engine.call_all(inspect_task, [(config, copies_in) for config in configs.values()])
    return dict(zip(configs, _without_faults(configs, answers), strict=True))


def chosen_settings(facts: dict[str, TaskFacts]) -> dict[tuple[str, str], Chosen]:
    """Give what data and models decide, by task and family."""
    return {(task, family): chosen for task, one in facts.items() for family, chosen in one.chosen.items()}


def check_models_of(plan: Plan, course: Course, engine: Engine) -> None:
    """Load every family's models once, on the first task that it has runs left on."""
    pending = {run.key for run in course.pending()}
    wanted: dict[str, tuple[Config, dict[str, Any]]] = {}
    for cell in plan.cells:
        if cell.family not in wanted and any(run.key in pending for run in cell.runs):
            wanted[cell.family] = (whole_config(plan.suite, cell.task, cell.family), course.facts[cell.task].task)
    _without_faults(wanted, engine.call_all(inspect_models, list(wanted.values())))


def _without_faults(names: Any, answers: list[Any]) -> list[Any]:
    faults = [(name, answer) for name, answer in zip(names, answers, strict=True) if isinstance(answer, Exception)]
    for _, fault in faults:
        if not isinstance(fault, KdLoraError):
            raise fault
    if len(faults) == 1:
        raise faults[0][1]
    if faults:
        raise ConfigError("\n".join([f"{len(faults)} faults", *(f"  - {name}: {fault}" for name, fault in faults)]))
    return answers


@contextlib.contextmanager
def _only_process(layout: SuiteLayout) -> Iterator[None]:
    """Hold the suite folder's lock; refuse a folder of something else."""
    root = layout.root
    check_folder(root, "suite")
    with hold_lock(layout.lock, f"carries out the suite in {root}", remedy=", or name another folder with --out"):
        claim_folder(root, "suite")
        yield
