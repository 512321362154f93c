"""Trackers: one tracked run for each run of an experiment, which can be found by arm and seed."""

import socket
import sqlite3
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kdlora.distil import tracking
from kdlora.distil.tracking import TrackedRun, tracked
from kdlora.errors import ConfigError
from kdlora.experiment.run import run_experiment
from kdlora.system.ownership import refuse_links

SECRETS = {
    "HF_TOKEN": "hf_thisIsASecretThatNobodyMayRead",
    "WANDB_API_KEY": "5ec3e7" * 6 + "5ec3",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-secret-0123456789",
}
HOST, USER, COMMAND, REMOTE = (f"{what}-of-mine-4711" for what in ("host", "user", "command", "remote"))


@pytest.fixture(autouse=True, scope="module")
def machine(tmp_path_factory):
    """Give this machine, its user, the command and the repository names and secrets that can be looked for."""
    place = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        users = dict.fromkeys(("USER", "LOGNAME", "USERNAME", "LNAME"), USER)
        for name, value in {**SECRETS, **users, "HOSTNAME": HOST}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [f"/{COMMAND}", "run"])
        subprocess.run(["git", "init", "-q", place / "repository"], check=True)
        patch.chdir(place / "repository")
        subprocess.run(["git", "remote", "add", "origin", f"https://{REMOTE}/a.git"], check=True)
        yield place


@pytest.fixture(scope="module")
def tracking_folder(workshop, machine):
    """Two runs by all trackers that are here; what they noted of command, environment and output is looked through."""
    trackers = [name for name in ("tensorboard", "mlflow", "wandb") if find_spec(name)]
    changes = {"run": {"seeds": [0, 3], "report_to": trackers}}
    result = run_experiment(workshop.config(changes), machine / "out")
    assert not result.failed, [record.error for record in result.failed]
    host, above = socket.gethostname(), str(machine.parent).encode()
    for path in result.folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
        if path.is_relative_to(result.folder / "tracking"):
            wanted = (HOST, USER, COMMAND, REMOTE, f'"{host}"')  # in quotes: short names occur by chance
            assert not [name for name in wanted if name.encode() in content], path
            assert host not in path.name.split("."), path
        if path.suffix == ".wandb" or "tfevents" in path.name:
            assert above not in content, f"{path} has the path of a folder"
    return result.folder / "tracking"


def test_tensorboard_has_a_folder_for_each_run(tracking_folder):
    """Runs in one folder are drawn as one curve that jumps back and forth."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tracking_folder / "tensorboard"
    assert sorted(path.name[:-13] for path in folder.iterdir()) == ["student-lora-seed0", "student-lora-seed3"]
    (third,) = folder.glob("student-lora-seed3-*")
    events = accumulator.EventAccumulator(str(third)).Reload()
    assert len(events.Scalars("eval/score")) == 2  # one for each epoch
    assert events.Scalars("train/hard_loss")[0].value > 0
    tags = events.Tensors("tags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert tags == "arm: student-lora, seed: 3"


def test_a_training_has_one_key_until_its_checkpoints_go(tracking_folder, tmp_path):
    """One that began anew in its folder, or in a container with the same path, went on with another's curve."""

    def key(name="a"):
        run = TrackedRun("e", "r", {}, tmp_path / name, tmp_path)
        assert run.key == run.key, "MLflow asks twice"
        return run.key

    first = key()
    (tmp_path / "a" / "step-000000001").mkdir()
    assert key() == first != key("b")
    (tmp_path / "a" / "step-000000001").rmdir()
    assert key() != first, "it failed before its first checkpoint"
    assert not list(tracking_folder.parent.rglob("tracked"))  # its runs have finished


def test_a_training_that_fails_leaves_no_name_of_the_host(tmp_path, monkeypatch):
    """TensorBoard has it in the name of every file, and a killed process could not change it.

    Where a variable names the folder, arms of one name but of other experiments or trials changed each other's files.
    """
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run = TrackedRun("e", "r", {}, tmp_path / "checkpoints", tmp_path)
    folder = tmp_path / "logs" / "e" / f"r-{run.key}"
    folder.mkdir(parents=True)
    (folder / f"events.out.tfevents.1.{socket.gethostname()}.77.0").touch()
    with pytest.raises(RuntimeError), tracked(["tensorboard"], run):
        raise RuntimeError
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 2
    assert all(".unnamed." in name for name in names)


def test_mlflow_has_a_run_for_each_run_with_arm_and_seed(tracking_folder):
    """A tracked run without arm and seed cannot be told from its control."""
    pytest.importorskip("mlflow")
    with sqlite3.connect(tracking_folder / "mlflow.db") as database:
        runs = dict(database.execute("select name, run_uuid from runs where status = 'FINISHED'").fetchall())
        assert sorted(runs) == ["student-lora-seed0", "student-lora-seed3"]
        tags = dict(database.execute("select key, value from tags where run_uuid = ?", [runs["student-lora-seed3"]]))
        scores = database.execute("select count(*) from metrics where key = 'eval_score'").fetchone()
        folders = dict(database.execute("select key, value from params where key in ('output_dir', '_name_or_path')"))
    assert (tags["arm"], tags["seed"]) == ("student-lora", "3")
    assert scores == (4,)
    assert folders == {"output_dir": "checkpoints", "_name_or_path": "distilbert"}, "a path names the user"


def test_wandb_is_offline_unless_it_is_asked_for(tracking_folder):
    """A tracker that sends data off without being told to gives texts and names away."""
    pytest.importorskip("wandb")
    found = [file.read_bytes() for file in (tracking_folder / "wandb").glob("offline-run-*/*.wandb")]
    assert len(found) == 2
    assert all(b"arm:student-lora" in content and b"eval/score" in content for content in found)
    assert {seed for seed in (0, 3) for content in found if b"seed:%d" % seed in content} == {0, 3}


def test_a_tracked_experiment_goes_on_in_its_folder(tracking_folder):
    """Trackers make links, W&B even one out of the folder; taken for a stranger's, they would end every second call."""
    refuse_links(tracking_folder.parent)


def test_a_tracker_that_is_not_installed_is_told_before_any_training(monkeypatch):
    """Hours later every run would have failed."""
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb and mlflow, not installed here; pip install wandb mlflow"):
        tracking.check_trackers(["wandb", "mlflow"])
