"""How long a suite will take."""

from __future__ import annotations

import pytest

from kdlora.data.tasks import GLUE
from kdlora.evidence.records import RunRecord
from kdlora.experiment.jobs import TaskFacts
from kdlora.experiment.overview import OVERHEAD_SECONDS, REACHED, MachineSpeed, estimate
from kdlora.experiment.plan import make_plan
from kdlora.experiment.suitefile import build_suite

FACTS = {
    name: TaskFacts(GLUE[name].task.to_dict(), "", {"train": rows}, 9.0, ())
    for name, rows in (("cola", 1000), ("rte", 500))
}
"""Nine characters are five tokens: two words and the special ones."""


TWO, FOUR = ({"epochs": epochs, "learning_rate": 1e-3, "max_length": 128} for epochs in (2, 4))


def plan(**changes):
    values = {
        "name": "s",
        "tasks": list(FACTS),
        "families": {"own": {"teacher": {"model": "large"}, "student": {"model": "small"}}},
        "config": {"data": {"path": "x/y"}, "teacher": {"train": TWO}, "student": {"train": FOUR}},
        "arms": ["fft", "student-lora"],
    }
    return make_plan(build_suite(values | changes))


def finished(run, seconds):
    return RunRecord(
        experiment="e",
        task=GLUE[run.task].task.to_dict(),
        arm=run.arm,
        seed=run.seed,
        status="finished",
        model="m",
        train_seconds=seconds,
        started="2026-01-01T00:00:00+00:00",
        finished=f"2026-01-01T00:00:{seconds + 5:02.0f}+00:00",
    )


def refuse(sources):
    raise AssertionError(f"nothing is unknown, but {sources} were asked for")


def test_finished_runs_tell_how_long_others_like_them_take():
    """An estimate from a data sheet, where a measurement lies beside it, is off by a factor."""
    wanted = plan()
    runs = {(run.task, run.arm): run for run in wanted.runs()}
    records = {
        runs["cola", arm].key: finished(runs["cola", arm], seconds)
        for arm, seconds in (("fft", 20.0), ("student-lora", 8.0))
    }
    found = estimate(wanted, records, FACTS, refuse)
    # RTE has half the rows, texts of the same length, and the same five seconds beside the training.
    assert found.seconds == pytest.approx(10.0 + 4.0 + 2 * 5.0)
    assert (found.measured, found.runs) == (2, 2)


def test_without_finished_runs_size_and_speed_decide():
    """The first question is asked before anything has run."""
    speed = MachineSpeed(1e9, {"large": 1_000_000, "small": 10_000})
    found = estimate(plan(tasks=["cola"]), {}, FACTS, lambda sources: speed)
    tokens = 1000 * 5.0
    work = 2 * tokens * (2 * 3 * 1_000_000 + 4 * 2 * 10_000)
    assert found.seconds == pytest.approx(work / (REACHED * 1e9) + 2 * OVERHEAD_SECONDS)
    assert found.measured == 0
