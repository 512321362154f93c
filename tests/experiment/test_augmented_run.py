"""Perturbed copies through the whole experiment: labelled by the teacher, learnt by the student, at no more steps."""

from __future__ import annotations

import math

import pytest

from kdlora.data.load import load_splits
from kdlora.distil.teacher import read_stored_logits
from kdlora.experiment.run import run_experiment

pytest_plugins = ["experiment_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it


def test_the_teacher_labels_the_copies_and_the_epochs_stay_as_long(workshop, tmp_path):
    """Copies that nobody labels, or that make the student's training longer, would be an unfair gain or none."""
    config = workshop.config({"data": {"augment": 2}, "run": {"arms": ["fft", "kd-lora", "student-lora"]}})
    result = run_experiment(config, tmp_path / "out")
    teacher, control, student = result.records
    assert [record.status for record in result.records] == ["finished"] * 3
    splits = load_splits(config.task, config.data)
    assert 64 < splits.copies <= 128
    assert student.rows["unlabelled"] == splits.copies
    stored = read_stored_logits(result.layout.unlabelled_logits, splits.task)
    assert stored.ids.to_pylist() == splits.unlabelled["id"][:]
    steps = 2 * math.ceil(64 / 8)
    assert [record.history[-1]["step"] for record in (teacher, student, control)] == [steps] * 3
    assert student.history[-1]["loss"] != control.history[-1]["loss"]
    assert len(list(result.layout.copies.glob("*.arrow"))) == 1
    assert "perturbed copies" in result.layout.report_md.read_text()
