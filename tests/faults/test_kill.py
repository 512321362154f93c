"""`kill -9`, and SIGTERM in the middle of a training, through the real command line."""

import os
import random
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from kill_driver import Blow, differences, run_command

from experiments import processes_marked, snapshot
from kdlora.configfile import load_config
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment import jobs
from kdlora.experiment.run import run_experiment
from kdlora.experiment.stages import Stage

SETTINGS = {"epochs": 12, "batch_size": 8, "learning_rate": 2e-3, "select": "best"}


@pytest.mark.slow
def test_struck_in_its_trainings_an_experiment_ends_as_if_undisturbed(cli, workshop, tmp_path, monkeypatch):
    """A resumed experiment that differs in one bit is another experiment, and nobody would know.

    All but the killed call are in this process: a command takes seconds to begin. `benchmarks/faults.py` strikes every
    stage, and every attempt is a command there.
    """
    changes = {
        "teacher": {"train": SETTINGS},
        "student": {"train": SETTINGS | {"epochs": 16}},  # long enough to be struck, on a fast machine too
        "run": {"arms": ["kd-lora"], "checkpoint_seconds": 0.1},
    }
    config, mark, struck = tmp_path / "config.yaml", f"kdlora-mark-{uuid.uuid4()}", tmp_path / "struck"
    config.write_text(yaml.safe_dump(workshop.values(changes)))
    cli("run", config, "--out", tmp_path / "undisturbed")

    checkpoints = ExperimentLayout(struck).run("fft", 0).checkpoints
    asked_at: list[float] = []
    there: list[Path] = []

    def ask_to_end() -> None:
        while not there:
            time.sleep(0.02)
            there.extend(checkpoints.glob("step-*"))
        time.sleep(0.03)  # until the training goes on; by itself it saves after 0.1 s
        asked_at.append(time.time())
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # where it comes too late
    threading.Thread(target=ask_to_end, daemon=True).start()
    try:
        shown = cli("run", config, "--out", struck, code=128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert time.time() - asked_at[0] < 30  # a loaded machine takes seconds for a checkpoint
    assert shown.err.endswith("the same command continues where it stopped\n")
    assert max(checkpoints.glob("step-*")) > max(there), "it saved after it was asked to end"

    monkeypatch.setenv("KDLORA_TEST_MARK", mark)
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecretThatNobodyMayRead")
    blow = Blow("train kd-lora seed 0", random.Random(8).uniform(0.0, 0.1), checkpoints=2)
    killed = run_command(["run", str(config), "--out", str(struck)], blow)
    assert (killed.hit, killed.code) == (blow.stage, -signal.SIGKILL), killed.log
    assert killed.lost_seconds() < 5
    time.sleep(0.2)
    assert processes_marked(mark) == []
    assert "hf_this" not in "\n".join(killed.log)
    assert any("continuing from" in line for line in killed.log)

    before = snapshot(struck / "teacher")
    events: list[tuple[Stage, Any]] = []
    run_experiment(load_config(config), struck, listen=lambda stage, event: events.append((stage, event)))
    assert {stage.arm for stage, _ in events if stage.name == "train"} == {"kd-lora"}
    assert next(event.step for stage, event in events if stage.name == "train") >= killed.checkpoints[-1][1]
    assert snapshot(struck / "teacher").items() >= before.items()
    assert differences(tmp_path / "undisturbed", struck) == []


def test_a_training_is_not_lost_between_its_end_and_its_record(workshop, tmp_path, monkeypatch):
    """Checkpoints that go before the record is there cost a whole training where the process is killed in between."""

    def be_killed(*_: object) -> None:
        raise KeyboardInterrupt

    config = workshop.config({"run": {"checkpoint_seconds": 0.01}})
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_record", be_killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, tmp_path)
    last = max(path.name for path in tmp_path.rglob("step-*"))
    steps: list[int] = []
    result = run_experiment(config, tmp_path, listen=lambda _, event: steps.append(event.step))
    assert not result.failed
    assert result.records[0].peak_memory_bytes is None  # that of loading alone is not the training's
    assert [step for step in steps if step < int(last.removeprefix("step-"))] == []
    assert not list(tmp_path.rglob("step-*"))
