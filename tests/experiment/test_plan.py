"""The plan of an experiment: which runs, in which order."""

import pytest

from kdlora.configfile import build_config
from kdlora.experiment.run import Run, plan_runs
from kdlora.experiment.settle import settings_for
from kdlora.experiment.stages import shard_rows

BASE = {"data": {"train": "a.csv"}, "student": {"model": "s"}}


def plan(teacher, arms, seeds):
    return plan_runs(build_config(BASE | {"teacher": teacher, "run": {"arms": arms, "seeds": seeds}}))


@pytest.mark.parametrize(
    ("teacher", "arms", "seeds", "expected"),
    [
        ({"model": "t"}, ["kd-lora", "fft"], [3, 1], ["fft 3", "fft 1", "kd-lora 3", "kd-lora 1"]),
        ({"model": "t", "seed": 1}, ["fft", "kd-lora"], [3, 1], ["fft 1", "fft 3", "kd-lora 3", "kd-lora 1"]),
        ({"model": "t", "seed": 9}, ["fft"], [3], ["fft 9", "fft 3"]),
        ({"model": "t"}, ["kd-fft"], [2, 4], ["fft 2", "kd-fft 2", "kd-fft 4"]),
        ({"model": "t"}, ["student-lora", "lora"], [2], ["student-lora 2", "lora 2"]),
        ({"fine_tuned": "t"}, ["kd-lora", "fft"], [3, 1], ["fft 3", "kd-lora 3", "kd-lora 1"]),
        ({"logits": "t.parquet"}, ["fft", "kd-lora"], [0, 1], ["fft 0", "kd-lora 0", "kd-lora 1"]),
        ({"probabilities": "t.parquet"}, ["kd-lora"], [0], ["kd-lora 0"]),
    ],
)
def test_the_teacher_comes_first_and_only_once(teacher, arms, seeds, expected):
    """A teacher planned late leaves the students without logits; planned twice, it is the most expensive waste."""
    assert [f"{run.arm} {run.seed}" for run in plan(teacher, arms, seeds)] == expected


def test_no_run_is_planned_twice():
    """Two runs of one folder would overwrite each other."""
    runs = plan({"model": "t", "seed": 1}, ["fft", "lora", "kd-lora", "student-lora", "student-fft", "kd-fft"], [0, 1])
    assert len(runs) == len(set(runs)) == 12
    assert runs[0] == Run("fft", 1)


def test_student_arms_share_one_recipe():
    """A control with another recipe than the distilled arm measures the recipe."""
    config = build_config(BASE | {"teacher": {"model": "t"}, "student": {"model": "s", "train": {"epochs": 7}}})
    settings = {arm: settings_for(config, arm) for arm in ("kd-lora", "student-lora", "kd-fft", "student-fft")}
    assert settings["kd-lora"] == settings["student-lora"] == config.student.train
    assert settings["kd-fft"] == settings["student-fft"]
    assert settings["kd-fft"].learning_rate == config.student.full_learning_rate
    assert settings["kd-fft"].epochs == 7
    assert settings_for(config, "fft") == config.teacher.train


@pytest.mark.parametrize("rows", [1, 67_000, 400_000, 2_000_000, 10_000_000, 1_000_000_000])
def test_a_killed_labelling_loses_little_and_leaves_few_files(rows):
    """A shard is what a kill costs: at 50,000 rows, a quarter of an hour of a large teacher on a small data set."""
    assert shard_rows(rows) <= max(2_000, rows // 200)
    assert shard_rows(rows) <= 50_000
    assert rows / shard_rows(rows) <= max(201, rows / 50_000)
