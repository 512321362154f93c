"""What a suite would do: its runs, those that are finished, and an estimate of the time that the others take."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kdlora.config import LORA_ARMS, TEACHER_ARMS, Arm
from kdlora.errors import KdLoraError
from kdlora.evidence.records import RunRecord
from kdlora.experiment.engines import Here
from kdlora.experiment.jobs import TaskFacts
from kdlora.experiment.plan import Plan, PlannedRun, make_plan
from kdlora.experiment.queue import finished_runs
from kdlora.experiment.settle import closed, settings_for
from kdlora.experiment.suite import check_size, settle_plan, suite_folder
from kdlora.experiment.suitefile import SuiteConfig
from kdlora.system.children import run_in_child

CHARACTERS_PER_TOKEN = 4.5
"""Of English text, in word pieces."""
REACHED = 0.3
"""Share of the speed of large matrix products that a training reaches; an order of magnitude, no promise."""
OVERHEAD_SECONDS = 2.0
"""Of a run beyond its training, where no run was measured yet."""


@dataclass(frozen=True)
class PlannedArm:
    """One arm of a task: its runs in all families, shared ones once, and how many of them need not be repeated."""

    task: str
    arm: Arm
    runs: int
    finished: int


@dataclass(frozen=True)
class Overview:
    """What a suite would do: its runs by task and arm, how many teachers label their rows, the time of what is left.

    There is no estimate where the data or a model cannot be reached; `obstacle` says why.
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
    """Say what a suite would do, without doing any of it."""
    check_size(suite, confirmed=confirmed)
    plan = make_plan(suite)
    root = suite_folder(suite, out)
    records: dict[str, RunRecord] = {}
    found: Estimate | None = None
    obstacle = ""
    try:
        plan, facts = settle_plan(suite, Here())
        records = finished_runs(plan.runs(), root, facts)
        found = estimate(plan, records, facts, lambda sources: run_in_child(measure_speed, sources))
    except (KdLoraError, OSError) as error:
        obstacle = str(error)
    runs = plan.runs()
    counts = Counter((run.task, run.arm) for run in runs)
    done = Counter((run.task, run.arm) for run in runs if run.key in records)
    arms = tuple(PlannedArm(task, arm, number, done[task, arm]) for (task, arm), number in counts.items())
    return Overview(plan, arms, len(plan.lessons()), found, obstacle)


@dataclass(frozen=True)
class MachineSpeed:
    """What an estimate is made from without finished runs: large matrix products, parameters without embeddings."""

    products_per_second: float
    parameters: dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """Seconds of the runs that are left, one after the other, without the teachers' labelling, which is small.

    `measured` of these runs were estimated from finished ones of the same arm and model.
    """

    seconds: float
    measured: int
    runs: int


def estimate(
    plan: Plan,
    records: Mapping[str, RunRecord],
    facts: Mapping[str, TaskFacts],
    speed: Callable[[list[str]], MachineSpeed],
) -> Estimate:
    """Estimate the time of the runs that have not finished, from finished ones like them or from sizes and speed."""
    runs = [run for run in plan.runs() if run.arm != "words"]  # seconds
    left = [run for run in runs if run.key not in records]
    rates, overhead = _measured(runs, records, facts)
    unknown = list(dict.fromkeys(_source(run) for run in left if (run.arm, _source(run)) not in rates))
    machine = speed(unknown) if unknown else MachineSpeed(1.0, {})
    seconds = 0.0
    for run in left:
        rate = rates.get((run.arm, _source(run)))
        if rate is None:  # two operations a parameter forward, and once or twice that again backward
            operations = 2.0 * (2 if run.arm in LORA_ARMS else 3) * machine.parameters[_source(run)]
            rate = operations / (REACHED * machine.products_per_second)
        seconds += overhead + rate * _tokens(run, facts)
    return Estimate(seconds, sum((run.arm, _source(run)) in rates for run in left), len(left))


def _source(run: PlannedRun) -> str:
    teacher, student = run.config.teacher, run.config.student
    return str((teacher.model if run.arm in TEACHER_ARMS else student.model) or teacher.model)


def _tokens(run: PlannedRun, facts: Mapping[str, TaskFacts]) -> float:
    """Count the tokens that a run trains on."""
    settings = closed(settings_for(run.config, run.arm))
    of_row = min(settings.max_length, facts[run.task].characters / CHARACTERS_PER_TOKEN + 3)
    return facts[run.task].rows["train"] * settings.epochs * of_row


def _measured(
    runs: Sequence[PlannedRun], records: Mapping[str, RunRecord], facts: Mapping[str, TaskFacts]
) -> tuple[dict[tuple[str, str], float], float]:
    """Give the seconds of training for a token, by arm and model, and those of a run beyond its training."""
    rates: dict[tuple[str, str], list[float]] = {}
    beyond: list[float] = []
    for run, record in ((run, records[run.key]) for run in runs if run.key in records):
        if record.status == "finished" and record.train_seconds is not None:
            if record.train_seconds:
                rates.setdefault((run.arm, _source(run)), []).append(record.train_seconds / _tokens(run, facts))
            if record.started:
                whole = datetime.fromisoformat(record.finished) - datetime.fromisoformat(record.started)
                beyond.append(max(0.0, whole.total_seconds() - record.train_seconds))
    overhead = statistics.median(beyond) if beyond else OVERHEAD_SECONDS
    return {key: statistics.median(values) for key, values in rates.items()}, overhead


def measure_speed(sources: list[str]) -> MachineSpeed:
    """Measure this machine's matrix products for a second, and size models without loading their weights."""
    import torch
    from transformers import AutoModel

    from kdlora.models.loading import load_config, open_source

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(2048, 2048, device=device)
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < 1.0:
        begin = time.perf_counter()
        torch.mm(matrix, matrix).sum().item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begin))
    parameters = {}
    for source in sources:
        with torch.device("meta"):
            model = AutoModel.from_config(load_config(open_source(source, None, False)), trust_remote_code=False)
        parameters[source] = sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    return MachineSpeed(best, parameters)
