"""`kill -9`, and SIGTERM in the middle of a training, through the real command line."""

from __future__ import annotations

import logging
import random
import signal
import time
import uuid

import pytest
import yaml
from kill_driver import Attempt, Blow, differences, repeated_stages, run_command

from experiments import everything_said, processes_marked

pytest_plugins = ["experiment_fixtures"]
pytestmark = pytest.mark.slow

SETTINGS = {"epochs": 12, "batch_size": 8, "learning_rate": 2e-3, "select": "best"}


def test_struck_in_its_trainings_an_experiment_ends_as_if_undisturbed(cli, workshop, tmp_path, monkeypatch):
    """A resumed experiment that differs in one bit is another experiment, and nobody would know.

    One folder is struck twice, and ends in this process, as the undisturbed one: a command takes seconds to begin.
    `benchmarks/faults.py` strikes every stage, and every attempt is a command there.
    """
    changes = {
        "teacher": {"train": SETTINGS},
        "student": {"train": SETTINGS},
        "run": {"arms": ["kd-lora"], "checkpoint_seconds": 0.1},
    }
    config, mark = tmp_path / "config.yaml", f"kdlora-mark-{uuid.uuid4()}"
    config.write_text(yaml.safe_dump(workshop.values(changes)))
    assert cli("run", config, "--out", tmp_path / "undisturbed").code == 0
    draw = random.Random(8)
    blows = [
        Blow("train fft seed 0", draw.uniform(0.3, 0.6), number=signal.SIGTERM),
        Blow("train kd-lora seed 0", draw.uniform(0.0, 0.1), checkpoints=2),
    ]
    command = ["run", str(config), "--out", str(tmp_path / "struck")]
    monkeypatch.setenv("KDLORA_TEST_MARK", mark)
    attempts = [run_command(command, blow) for blow in blows]
    for attempt, blow in zip(attempts, blows, strict=True):
        assert attempt.hit == blow.stage, attempt.log
        assert attempt.lost_seconds() < 5
    asked, killed = attempts
    assert (asked.code, killed.code) == (128 + signal.SIGTERM, -signal.SIGKILL)
    assert asked.ended < 10
    assert asked.log[-1].endswith("the same command continues where it stopped")
    assert asked.checkpoints[-1][0] > asked.struck  # it saved after it was asked to end
    assert "Traceback" not in "\n".join(asked.log)
    time.sleep(0.2)
    assert processes_marked(mark) == []
    with everything_said(tmp_path / "log.txt", logging.INFO):
        ended = cli(*command)
    attempts.append(Attempt(ended.code))
    for line in (tmp_path / "log.txt").read_text().splitlines():
        attempts[-1].note(0.0, line)
    assert ended.code == 0, attempts[-1].log
    assert sum("continuing from" in line for attempt in attempts for line in attempt.log) == 2
    assert repeated_stages(attempts) == []
    assert differences(tmp_path / "undisturbed", tmp_path / "struck") == []
