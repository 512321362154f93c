"""A disk that fills, a folder that is read-only or goes away: exit 1, and nothing half-written counts."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_driver import differences

from kdlora.configfile import save_config
from kdlora.evidence.records import ExperimentLayout, read_record
from kdlora.experiment.run import run_experiment


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 8 MiB in memory; skips where it cannot be mounted, which root alone may do."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={8 * 2**20}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done and done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def undisturbed(workshop, tmp_path_factory):
    """The experiment on a disk that has room: its config, the config's file, and the folder."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = workshop.config({"run": {"arms": ["kd-lora"], "checkpoint_seconds": 0.01}})
    (root / "config.yaml").write_text(save_config(config))
    return config, root / "config.yaml", run_experiment(config, root / "out").folder


def test_a_full_disk_costs_what_was_not_written_and_no_more_and_a_read_only_one_is_named(cli, disk, undisturbed):
    """What was cut off by the end of the disk must not be taken for a model, and the remedy is to free some space.

    The sizes let it fill at the lock, in the teacher's training, and while models are kept. Root writes into every
    folder, so it takes a disk that is mounted read-only.
    """
    _, file, right = undisturbed
    command = ("run", file, "--out", disk / "out")
    ballast = disk / "ballast"
    for kilobytes in (0, 300, 700):
        ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - kilobytes * 1024))
        shown = cli(*command, code=1)
        assert "No space left on device" in shown.err
        assert shown.err.strip().splitlines()[-1].endswith("free some space and run the same command again")
        records = [read_record(place) for place in ExperimentLayout(disk / "out").runs.glob("*/run.json")]
        assert {record.status for record in records} <= {"finished"}
        ballast.unlink()
    cli(*command)
    assert differences(right, disk / "out") == []
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    shown = cli("run", file, "--out", disk / "another", code=1)
    assert "Read-only file system" in shown.err
    assert str(disk) in shown.err


def test_a_folder_that_vanishes(undisturbed, tmp_path):
    """A network disk that is gone leaves its empty mount point: results must not be scattered over two places."""
    config, *_ = undisturbed
    out, gone = tmp_path / "out", []

    def take_away(stage, event):
        if not gone:
            gone.append(stage)
            out.rename(tmp_path / "away")

    with pytest.raises(FileNotFoundError, match="removed, moved or unmounted") as caught:
        run_experiment(config, out, listen=take_away)
    assert str(out) in str(caught.value)
    assert not list(out.rglob("run.json"))
