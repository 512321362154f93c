"""How long a suite will take."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kdlora.data.tasks import GLUE
from kdlora.experiment.plan import make_plan
from kdlora.experiment.preview import ADAPTERS, FULL, RUN_SECONDS
from kdlora.experiment.recording import TaskFacts
from kdlora.experiment.settle import ModelLook
from kdlora.experiment.suite import estimate
from kdlora.experiment.suitefile import build_suite

FACTS = {
    name: TaskFacts(GLUE[name].task.to_dict(), {}, {"train": rows}, ()) for name, rows in (("cola", 1000), ("rte", 500))
}
LENGTHS = np.array([4, 6])  # five tokens a text
LOOKS = {"teacher": ModelLook(LENGTHS, 128, 768, seconds=1e-4), "student": ModelLook(LENGTHS, 128, 384, seconds=1e-5)}
TWO, FOUR = ({"epochs": epochs, "learning_rate": 1e-3, "max_length": 128} for epochs in (2, 4))


def guess(tasks, seconds=()):
    """Estimate a suite of which the runs of the first task took some seconds."""
    values = {
        "name": "s",
        "tasks": tasks,
        "families": {"own": {"teacher": {"model": "large"}, "student": {"model": "small"}}},
        "config": {"data": {"path": "x/y"}, "teacher": {"train": TWO}, "student": {"train": FOUR}},
        "arms": ["fft", "student-lora"],
    }
    plan = make_plan(build_suite(values))
    records = {
        run.key: SimpleNamespace(
            train_seconds=each, started="2026-01-01T00:00:00+00:00", finished=f"2026-01-01T00:00:{each + 5:02.0f}+00:00"
        )
        for run, each in zip(plan.runs(), seconds, strict=False)
    }
    return estimate(plan, records, FACTS, {(task, "own"): LOOKS for task in tasks})


def test_finished_runs_tell_how_long_others_like_them_take():
    """An estimate from a data sheet, where a measurement lies beside it, is off by a factor."""
    found = guess(["cola", "rte"], seconds=(20.0, 8.0))
    # RTE has half the rows, texts of the same length, and the same five seconds beside the training.
    assert found.seconds == pytest.approx(10.0 + 4.0 + 2 * 5.0)
    assert (found.measured, found.runs) == (2, 2)


def test_without_finished_runs_forward_passes_decide():
    """The first question is asked before anything has run."""
    found = guess(["cola"])
    expected = 1000 * 5.0 * (2 * FULL * 1e-4 + 4 * ADAPTERS * 1e-5)
    assert found.seconds == pytest.approx(expected + 2 * RUN_SECONDS)
    assert found.measured == 0
