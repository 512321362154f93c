"""A suite: check everything first, say what it would take, run what is not finished, write the tables."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlora.configfile import expand_target
from kdlora.errors import ConfigError, KdLoraError
from kdlora.evidence.records import RunRecord
from kdlora.experiment.engines import Engine, Here, Work, gpus_for, local_paths, open_engine, shared_machine
from kdlora.experiment.jobs import Job, Queue, carry_out, finished_runs, inspect_task, lost
from kdlora.experiment.plan import Plan, make_plan, whole_config
from kdlora.experiment.preview import RUN_SECONDS, training_seconds
from kdlora.experiment.recording import TaskFacts
from kdlora.experiment.settle import Chosen, Looks
from kdlora.experiment.suite_tables import write_tables
from kdlora.experiment.suitefile import SuiteConfig, save_suite
from kdlora.system.children import run_in_child
from kdlora.system.ownership import check_folder
from kdlora.system.storage import claim_folder, hold_lock, write_text_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuiteEvent:
    """Where a suite stands."""

    done: int  # runs that have ended, earlier calls included
    total: int  # runs in all
    failed: int  # of those done, how many failed
    job: Job | None = None  # the job that this is about; None where none is
    detail: Any = None  # an event of the job itself, such as a training's progress, or its `Outcome`; None at the start


@dataclass(frozen=True)
class SuiteResult:
    """What a suite left behind.

    Attributes:
        folder: the suite's.
        plan: its runs.
        records: record of every run, by the run's key.
        reused: runs that were finished before.
        tables: the files with the tables.

    Examples:
        >>> {record.status for record in result.records.values()}
        {'finished'}
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
    listen: Callable[[SuiteEvent], None] | None = None,
) -> SuiteResult:
    """Carry out every run of a suite that is not finished yet, and write its tables.

    Args:
        suite: tasks, families, arms, configurations and seeds.
        out: its folder, default `runs/<name>`. The same call again repeats no finished run.
        on: `ray` or `ray://HOST:PORT`: the cluster that carries the runs out; default: this process, one by one.
        listen: called with each event.

    Returns:
        The records. A run that fails is recorded, and the others are carried out.

    Raises:
        KdLoraError: if the suite, its data or its models do not fit, before any training.

    Examples:
        >>> result = run_suite(load_suite("suite.yaml"), "runs/suite")
    """
    plan = make_plan(suite)
    root = suite_folder(suite, out)
    doing = f"carries out the suite in {root}"
    with hold_lock(root / ".lock", doing, remedy=", or name another folder with --out") as check:
        claim_folder(root, "suite")
        configs = [run.config for run in plan.runs()]
        paths, gpus = [path for config in configs for path in local_paths(config)], gpus_for(configs[0])
        with open_engine(on, suite.resources, [str(root), *paths], gpus) as engine:
            plan, facts, _ = settle_plan(plan, engine, root / "copies")
            write_text_atomic(root / "suite.yaml", save_suite(suite))
            runs = plan.runs()
            before = finished_runs(runs, root, facts)
            queue = Queue(runs, plan.lessons(), root, facts, before)
            if not before and (others := list(root.glob("runs/*/*/runs/*/run.json"))):
                told = "of this suite: settings differ, or paths of files; all is done anew"
                logger.warning("none of the %d runs in %s is %s", len(others), root, told)
            own = functools.partial(carry_out, check=check, notes=shared_machine(gpus))
            work: Work = own if on is None else carry_out
            try:
                _carry_out(queue, engine, work, listen)
            finally:  # also after Ctrl-C: what there is can be read
                tables = write_tables(plan, root, queue.records)
    reused = sum(queue.records.get(key) is record for key, record in before.items())  # not by another teacher since
    return SuiteResult(root, plan, queue.records, reused, tables)


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
    """Give the folder of a suite, new or ours."""
    root = (expand_target(out) if out is not None else Path("runs") / suite.name).absolute()
    check_folder(root, "suite")
    return root


def settle_plan(
    plan: Plan, engine: Engine, copies_in: Path | None = None, *, timed: bool = False
) -> tuple[Plan, dict[str, TaskFacts], dict[tuple[str, str], Looks]]:
    """Look at the data of every task and its models, and lay out the runs with what they decide."""
    suite = plan.suite
    configs = {task: {name: whole_config(suite, task, name) for name in suite.families} for task in suite.tasks}
    read = {task: [config.data for config in own.values()] for task, own in configs.items()}
    for run in plan.runs():
        read[run.task].append(run.config.data)
    questions = iter([(task, own, read[task], copies_in, timed) for task, own in configs.items()])
    answers = {piece[0]: answer for piece, answer in engine.results(_inspect, lambda: next(questions, None))}
    faults = {task: answers[task] for task in configs if isinstance(answers[task], Exception)}
    for fault in faults.values():
        if len(faults) == 1 or not isinstance(fault, KdLoraError):
            raise fault
    if faults:
        raise ConfigError("\n".join([f"{len(faults)} faults", *(f"  - {task}: {it}" for task, it in faults.items())]))
    facts = {task: answers[task][0] for task in configs}
    looks = {(task, family): one for task in configs for family, one in answers[task][1].items()}
    rows = {task: found.rows for task, found in facts.items()}
    chosen = {
        (task, family): Chosen(one, rows[task][configs[task][family].data.row_settings], facts[task].task)
        for (task, family), one in looks.items()
    }
    return make_plan(suite, chosen, rows), facts, looks


def _inspect(question: tuple[Any, ...], _: object) -> Any:
    """Look at the data and models of a task in a child, so that no worker keeps its memory; a fault is an answer."""
    try:
        return run_in_child(inspect_task, *question[1:])
    except Exception as fault:
        return fault


def look_at_suite(suite: SuiteConfig, out: str | Path | None = None) -> dict[str, Any]:
    """Say what a suite would do: its runs by task and arm, those that families share once, and the labellings.

    `seconds` are of the runs that are left, one after the other, without the labelling; None for the `obstacle`.
    """
    plan, root, records = make_plan(suite), suite_folder(suite, out), dict[str, RunRecord]()
    seconds, obstacle = None, ""
    try:
        plan, facts, looks = settle_plan(plan, Here(), timed=True)
        records = finished_runs(plan.runs(), root, facts)
        seconds = estimate(plan, records, facts, looks)
    except (KdLoraError, OSError) as error:
        obstacle = str(error)
    counts = Counter((run.task, run.arm) for run in plan.runs())
    done = Counter((run.task, run.arm) for run in plan.runs() if run.key in records)
    return {
        "runs": counts.total(),
        "finished": done.total(),
        "arms": [
            {"task": task, "arm": arm, "runs": number, "finished": done[task, arm]}
            for (task, arm), number in counts.items()
        ],
        "labellings": len(plan.lessons()),
        "seconds": seconds,
        "obstacle": obstacle,
    }


def estimate(
    plan: Plan,
    records: Mapping[str, RunRecord],
    facts: Mapping[str, TaskFacts],
    looks: Mapping[tuple[str, str], Looks],
) -> float:
    """Estimate the seconds of the runs that have not finished, from timed forward passes."""
    return sum(
        RUN_SECONDS
        + training_seconds(
            run.config, run.arm, facts[run.task].rows[run.config.data.row_settings], looks[run.task, run.family]
        )
        for run in plan.runs()
        if run.key not in records
    )
