"""A small suite, and the folder of one that was carried out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import Workshop, copy_experiment
from tiny import save_classifier


@pytest.fixture(scope="session")
def suite_values(workshop: Workshop) -> Callable[..., dict[str, Any]]:
    """`suite_values(key=value)` gives a suite of one task and family with two configurations of each kind."""

    def give(**changes: Any) -> dict[str, Any]:
        values = workshop.values()
        values["teacher"]["train"] = values["student"]["train"] = {"epochs": 1, "batch_size": 8}
        return {
            "name": "small",
            "tasks": {"reviews": {"data": values["data"]}},
            "families": {"tiny": {"teacher": values["teacher"], "student": values["student"]}},
            "config": {"run": {"precision": "fp32", "threads": 1}},
            "arms": ["fft", "lora", "kd-lora", "student-lora"],
            "seeds": [0],
            "grids": {
                "fft": {"teacher.train.learning_rate": [1e-3, 5e-3]},
                "adapters": {"lora.rank": [2, 4], "student.train.learning_rate": [5e-3]},
            },
            "best": 2,
        } | changes

    return give


@pytest.fixture(scope="session")
def finished_suite(suite_values: Callable[..., dict[str, Any]], made_once):
    """The small suite, carried out; read only."""
    from kdlora.experiment.suite import run_suite
    from kdlora.experiment.suitefile import build_suite

    return made_once("suite", lambda folder: run_suite(build_suite(suite_values()), folder / "small"))


@pytest.fixture
def suite_folder(finished_suite, tmp_path: Path) -> Path:
    """A copy of the small suite's folder."""
    return copy_experiment(finished_suite.folder, tmp_path / "suite")


@pytest.fixture(scope="session")
def model(tiny_model_folder, tmp_path_factory) -> Path:
    """A classifier as an experiment keeps its teacher; its weights are random."""
    return save_classifier(tiny_model_folder("bert"), tmp_path_factory.mktemp("label-model") / "teacher")
