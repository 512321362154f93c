"""Several processes that train together, as `accelerate launch` and `torchrun` start them."""

import json
import os
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch
import yaml
from torch.distributed import HashStore

from experiments import Workshop
from kdlora.config import Config
from kdlora.data.load import load_splits
from kdlora.errors import ConfigError
from kdlora.evidence.records import ExperimentLayout, read_record
from kdlora.experiment.jobs import Job, carry_out
from kdlora.experiment.recording import look_at
from kdlora.experiment.run import run_experiment
from kdlora.experiment.settle import with_recorded
from kdlora.experiment.stages import label_splits
from kdlora.experiment.team import Team, _told
from kdlora.system.launch import Launch, check_launch, read_launch
from sentences import tagged_rows, write_conll

TRAIN = {"epochs": 15, "batch_size": 5, "learning_rate": 1e-3, "dropout": 0.0, "micro_batch_tokens": 64}
LIMIT_SECONDS = 60
SENTENCES = {"train": 37, "validation": 20}


class Together(NamedTuple):
    """What two processes left that were struck in the middle and then started again."""

    config: Config  # for one process
    layout: ExperimentLayout
    struck: tuple[int, float, str]  # exit code, seconds until the end, words of process 0, whose fellow was killed
    code: int  # of the launcher, the second time
    log: str


def changes(**train) -> dict:
    """Change a small experiment so that processes take the path of one."""
    return {
        "teacher": {"train": TRAIN | train},
        "student": {"train": TRAIN | {"epochs": 2} | train},
        "lora": {"dropout": 0.0},
        "run": {"arms": ["fft", "kd-lora"], "checkpoint_seconds": 0.2},
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def strike(command: list[str], layout: ExperimentLayout) -> tuple[int, float, str]:
    """Start two processes, kill the second once there is a checkpoint, and wait for the first."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}, stderr=-1, text=True)
        for rank in "01"
    ]
    try:
        until = time.monotonic() + LIMIT_SECONDS
        while not list(layout.run("fft", 0).checkpoints.glob("step-*/manifest.json")):
            assert time.monotonic() < until
            assert all(process.poll() is None for process in started)
            time.sleep(0.02)
        started[1].kill()
        struck = time.monotonic()
        said = started[0].communicate(timeout=LIMIT_SECONDS)[1]
        return started[0].returncode, time.monotonic() - struck, said
    finally:
        for process in started:
            process.kill()
            process.communicate()


def launch(verb: list[str]) -> tuple[int, str]:
    """Let accelerate start two processes; exit code, and all that was printed."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    ended = subprocess.run(
        [*launcher, "--main_process_port", str(free_port()), "-m", *verb],
        env=os.environ | {"KDLORA_LOG": "INFO"},
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_SECONDS,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def together(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(workshop.values(changes())))
    verb = ["kdlora", "run", str(config), "--out", str(folder / "out")]
    layout = ExperimentLayout(folder / "out")
    struck = strike([sys.executable, "-m", *verb], layout)
    code, log = launch(verb)
    doubled = workshop.config(changes(batch_size=2 * TRAIN["batch_size"]))
    return Together(doubled, layout, struck, code, log)


@pytest.mark.cluster
def test_a_lost_process_ends_the_run_with_an_error(together):
    """Processes that wait for a dead one for ever hold a cluster, and nobody is told."""
    code, seconds, said = together.struck
    assert code == 1, said
    assert seconds < 30
    assert "process 1 of this run is gone; the same command continues" in said
    assert "Traceback" not in said


@pytest.mark.cluster
def test_two_processes_take_the_path_of_one_with_the_doubled_batch(together, tmp_path):
    """Gradients that are averaged wrongly, or rows trained on twice, still train: only the path shows it.

    The two were struck and started again, their rows are cut into micro-batches of different number, and the last
    batch of an epoch has rows for one of them alone.
    """
    assert together.code == 0, together.log
    assert "continuing from" in together.log
    alone = run_experiment(together.config, tmp_path / "alone")
    assert not alone.failed
    for record in alone.records:
        other = read_record(together.layout.run(record.arm, 0).record)
        assert len(other.history) == len(record.history)
        for ours, theirs in zip(record.history, other.history, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (record.arm, ours["epoch"], name)
        assert "2 processes, each with 5 of the 10 rows of a step" in other.notes
    assert together.layout.student.is_dir()


@pytest.mark.cluster
def test_a_word_weighs_the_same_in_two_processes_as_in_one(workshop, tmp_path):
    """Each process that divides by its own words lets a word count for more where it has fewer beside it."""
    data = {name: str(write_conll(tmp_path / f"{name}.conll", tagged_rows(count))) for name, count in SENTENCES.items()}
    values = changes(epochs=2, max_length=10) | {"data": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(workshop.values(values)))
    code, log = launch(["kdlora", "run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "together")])
    assert code == 0, log
    doubled = workshop.config(changes(epochs=2, max_length=10, batch_size=2 * TRAIN["batch_size"]) | {"data": data})
    for record in run_experiment(doubled, tmp_path / "alone").records:
        other = read_record(ExperimentLayout(tmp_path / "together").run(record.arm, 0).record)
        for ours, theirs in zip(record.history, other.history, strict=True):
            for name in ("loss", "hard_loss", "entity_f1"):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-5), (record.arm, name)


@pytest.mark.cluster
def test_labels_of_two_processes_are_the_file_of_one(together):
    """Logits that are merged by position and not by id teach every row the answers of another."""
    before = {path.name: path.read_bytes() for path in together.layout.teacher_logits.glob("*.parquet")}
    assert before
    for path in together.layout.teacher_logits.iterdir():
        path.unlink()
    config = with_recorded(together.config, together.layout.config)
    label_splits(config, together.layout, load_splits(config.task, config.data))
    after = {path.name: path.read_bytes() for path in together.layout.teacher_logits.glob("*.parquet")}
    assert after == before


def test_the_process_that_ran_out_of_memory_is_named(workshop, tmp_path, monkeypatch):
    """Process 0 loses its connection, which tells nobody that the memory of another one's GPU is too small."""
    team, config = Team(Launch(rank=0, count=2, address="127.0.0.1", port=1), HashStore()), workshop.config()
    team.store.set("outcome-1-1", json.dumps(_told(torch.OutOfMemoryError("CUDA out of memory"))))

    def lose(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(team, "_take_part", lose)
    facts = look_at(load_splits(config.task, config.data), config.data)
    job = Job("train", "one", config, ExperimentLayout(tmp_path), "student-lora", 0, facts, ships=True)
    error = carry_out(job, in_child=team.run).error
    assert "process 0: RuntimeError: Connection closed by peer; process 1: OutOfMemoryError: CUDA out" in error
    assert error.endswith("Lower micro_batch_tokens in teacher.train or student.train")


def set_variables(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_settings_of_accelerate_that_contradict_the_config(workshop, monkeypatch):
    """Accelerate's own settings are read by libraries below: a run in another precision than its record says."""
    config = workshop.config()
    set_variables(monkeypatch, ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="no")
    check_launch(config)
    set_variables(
        monkeypatch,
        ACCELERATE_MIXED_PRECISION="bf16",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4",
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_USE_FSDP="true",
        ACCELERATE_DYNAMO_BACKEND="INDUCTOR",
        ACCELERATE_USE_CPU="true",
    )
    with pytest.raises(ConfigError, match=r"ACCELERATE_MIXED_PRECISION=bf16.*run\.precision \(here fp32\)") as refused:
        check_launch(config)
    assert str(refused.value).count("ACCELERATE_") == 5
    with pytest.raises(ConfigError, match=r"ACCELERATE_USE_CPU=true.*run\.device"):
        check_launch(workshop.config({"run": {"device": "cuda"}}))


@pytest.mark.parametrize("command", [["suite", "no.yaml"], ["search", "no.yaml"], ["label", "m", "d", "--to", "t"]])
def test_verbs_that_hand_out_their_work_are_started_once(cli, command, monkeypatch):
    """Two processes that carry out the same suite fight for its folder, or do everything twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    outcome = cli(*command, code=2)
    assert f"kdlora {command[0]} was started as 2 processes" in outcome.err


def test_a_launcher_that_starts_one_process_for_two_is_told_off(monkeypatch):
    """`accelerate launch --num_processes 2` starts one on CPUs, which would train alone on half of a step's rows."""
    set_variables(monkeypatch, OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3")
    assert read_launch().rank == 3
    set_variables(monkeypatch, WORLD_SIZE="two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        read_launch()
    set_variables(monkeypatch, WORLD_SIZE="2", RANK="2")
    with pytest.raises(ConfigError, match="expected RANK from 0 to 1"):
        read_launch()
    for name in ("WORLD_SIZE", "RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name)
    set_variables(monkeypatch, ACCELERATE_USE_CPU="False", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    with pytest.raises(ConfigError, match="started one"):
        read_launch()
