"""Carry out a suite: check everything first, run what is not finished, keep what failed, write the tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlora.errors import ConfigError, KdLoraError
from kdlora.evidence.records import RunRecord
from kdlora.experiment.engines import Engine, Work, open_engine
from kdlora.experiment.jobs import Job, TaskFacts, carry_out, inspect_task, lost
from kdlora.experiment.plan import Plan, make_plan, whole_config
from kdlora.experiment.queue import Queue, finished_runs
from kdlora.experiment.ray_cluster import local_paths
from kdlora.experiment.suite_tables import write_tables
from kdlora.experiment.suitefile import SuiteConfig, save_suite
from kdlora.system.ownership import check_folder, claim_folder
from kdlora.system.storage import hold_lock, write_text_atomic

MOST_RUNS = 10_000
"""A plan of more runs has to be confirmed: it may be a slip of the pen."""


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
    root = suite_folder(suite, out)
    check_folder(root, "suite")
    doing = f"carries out the suite in {root}"
    with hold_lock(root / ".lock", doing, remedy=", or name another folder with --out") as lock:
        claim_folder(root, "suite")
        write_text_atomic(root / "suite.yaml", save_suite(suite))
        paths = [path for cell in plan.cells for path in local_paths(cell.runs[0].config)]
        with open_engine(on, suite.resources, [str(root / "suite.yaml"), *paths]) as engine:
            plan, facts = settle_plan(suite, engine, root / "copies")
            runs = plan.runs()
            queue = Queue(runs, plan.lessons(), root, facts, finished_runs(runs, root, facts))
            work = carry_out if on is not None else functools.partial(carry_out, check=lock.check)
            try:
                _carry_out(queue, engine, work, listen)
            finally:  # also after Ctrl-C: what there is can be read
                tables = write_tables(plan, root, queue.records)
    return SuiteResult(root, plan, queue.records, queue.reused, tables)


def _carry_out(queue: Queue, engine: Engine, work: Work, listen: Callable[[SuiteEvent], None] | None) -> None:
    def tell(job: Job | None, detail: Any) -> None:
        if listen is not None:
            listen(SuiteEvent(len(queue.records), len(queue.runs), len(queue.failed), job, detail))

    tell(None, None)
    for job, result in engine.results(work, queue.next_job, tell):
        outcome = lost(job, result) if isinstance(result, Exception) else result  # with its node, or a full disk there
        queue.take(outcome)
        tell(job, outcome)


def suite_folder(suite: SuiteConfig, out: str | Path | None) -> Path:
    """Say where a suite goes."""
    return (Path(out) if out is not None else Path("runs") / suite.name).absolute()


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


def settle_plan(suite: SuiteConfig, engine: Engine, copies_in: Path | None = None) -> tuple[Plan, dict[str, TaskFacts]]:
    """Look at the data of every task, and lay out the runs with what data and models decide."""
    configs = {task: {name: whole_config(suite, task, name) for name in suite.families} for task in suite.tasks}
    answers = engine.call_all(inspect_task, [(config, copies_in) for config in configs.values()])
    facts: dict[str, TaskFacts] = dict(zip(configs, _without_faults(configs, answers), strict=True))
    chosen = {(task, family): found for task, one in facts.items() for family, found in one.chosen.items()}
    return make_plan(suite, chosen), facts


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
