"""How long a suite will take."""

from __future__ import annotations

import numpy as np
import pytest

from kdlora.data.tasks import GLUE
from kdlora.evidence.records import RunRecord
from kdlora.experiment.plan import make_plan
from kdlora.experiment.preview import ADAPTERS, FULL, RUN_SECONDS
from kdlora.experiment.recording import TaskFacts
from kdlora.experiment.settle import ModelLook
from kdlora.experiment.suite import estimate
from kdlora.experiment.suitefile import build_suite

FACTS = {
    name: TaskFacts(GLUE[name].task.to_dict(), {}, {"train": rows}, ()) for name, rows in (("cola", 1000), ("rte", 500))
}
LOOKS = {
    (task, "own"): {
        "teacher": ModelLook(np.array([4, 6]), 128, 768, seconds=1e-4),
        "student": ModelLook(np.array([4, 6]), 128, 384, seconds=1e-5),
    }
    for task in FACTS
}
"""Five tokens a text."""

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


def test_finished_runs_tell_how_long_others_like_them_take():
    """An estimate from a data sheet, where a measurement lies beside it, is off by a factor."""
    wanted = plan()
    runs = {(run.task, run.arm): run for run in wanted.runs()}
    records = {
        runs["cola", arm].key: finished(runs["cola", arm], seconds)
        for arm, seconds in (("fft", 20.0), ("student-lora", 8.0))
    }
    found = estimate(wanted, records, FACTS, LOOKS)
    # RTE has half the rows, texts of the same length, and the same five seconds beside the training.
    assert found.seconds == pytest.approx(10.0 + 4.0 + 2 * 5.0)
    assert (found.measured, found.runs) == (2, 2)


def test_without_finished_runs_forward_passes_decide():
    """The first question is asked before anything has run."""
    found = estimate(plan(tasks=["cola"]), {}, FACTS, LOOKS)
    rows = 1000 * 5.0
    expected = rows * (2 * FULL * 1e-4 + 4 * ADAPTERS * 1e-5)
    assert found.seconds == pytest.approx(expected + 2 * RUN_SECONDS)
    assert found.measured == 0
