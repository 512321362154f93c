"""What a suite would do: its runs, those that are finished, and an estimate of the time that the others take."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlora.config import Arm
from kdlora.errors import KdLoraError
from kdlora.evidence.measure import run_in_child
from kdlora.evidence.records import RunRecord
from kdlora.scale.course import finished_record
from kdlora.scale.engine import SerialEngine
from kdlora.scale.estimate import Estimate, estimate, measure_speed
from kdlora.scale.plan import Plan, make_plan
from kdlora.scale.suite import check_size, inspect_tasks
from kdlora.scale.suitefile import SuiteConfig


@dataclass(frozen=True)
class PlannedArm:
    """One arm of a task in a plan.

    Attributes:
        task: name in the suite.
        arm: the arm.
        runs: in all families, shared ones once.
        finished: how many of them need not be repeated.
    """

    task: str
    arm: Arm
    runs: int
    finished: int


@dataclass(frozen=True)
class Overview:
    """What a suite would do.

    Attributes:
        plan: its runs.
        arms: the runs by task and arm.
        labellings: how many teachers read their training rows.
        estimate: time of what is left; None where the data or a model cannot be reached.
        obstacle: why there is no estimate.
    """

    plan: Plan
    arms: tuple[PlannedArm, ...]
    labellings: int
    estimate: Estimate | None
    obstacle: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Give the figures for programs."""
        return {
            "runs": sum(one.runs for one in self.arms),
            "finished": sum(one.finished for one in self.arms),
            "labellings": self.labellings,
            "arms": [asdict(one) for one in self.arms],
            "estimate": None if self.estimate is None else asdict(self.estimate),
            "obstacle": self.obstacle,
        }


def look_at_suite(suite: SuiteConfig, out: str | Path | None = None, *, confirmed: bool = False) -> Overview:
    """Say what a suite would do, without doing any of it.

    Args:
        suite: tasks, families, arms, configurations and seeds.
        out: the suite's folder; default `runs/<name>`. Nothing is written to it.
        confirmed: whether a plan of more than 10,000 runs is meant.

    Raises:
        ConfigError: for a suite that cannot be carried out.
    """
    check_size(suite, confirmed=confirmed)
    plan = make_plan(suite)
    root = (Path(out) if out is not None else Path("runs") / suite.name).absolute()
    records: dict[str, RunRecord] = {}
    found: Estimate | None = None
    obstacle = ""
    try:
        facts = inspect_tasks(plan, SerialEngine())
        for run in plan.runs():
            record = finished_record(run, root, facts[run.task].fingerprint)
            if record is not None:
                records[run.key] = record
        found = estimate(plan, records, facts, lambda sources: run_in_child(measure_speed, sources).value)
    except (KdLoraError, OSError) as error:
        obstacle = str(error)
    runs = plan.runs()
    counts = Counter((run.task, run.arm) for run in runs)
    done = Counter((run.task, run.arm) for run in runs if run.key in records)
    arms = tuple(PlannedArm(task, arm, number, done[task, arm]) for (task, arm), number in counts.items())
    return Overview(
        plan, arms, len({tuple(one.key for one in group) for group in plan.teachers.values()}), found, obstacle
    )
