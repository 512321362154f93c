import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kdlora.errors import ArtifactError
from kdlora.system.ownership import MANIFEST, _start_of, owned_name, remove, remove_abandoned
from kdlora.system.storage import atomic_file, atomic_folder, claim_folder, write_json_atomic, write_text_atomic


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """A half-written record would be taken for a whole one."""
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    with pytest.raises(RuntimeError, match="stop"), atomic_file(path) as temporary:
        _write_and_stop(temporary)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]

    # The platform's encoding, or a temporary file's mode, would make folders unreadable for others.
    write_json_atomic(tmp_path / "deep" / "a.json", {"é": [1, float("inf")], "path": Path("x/y")})
    raw = (tmp_path / "deep" / "a.json").read_bytes()
    assert "é".encode() in raw
    assert json.loads(raw) == {"é": [1, None], "path": "x/y"}
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "b.json", {"x": object()})
    (tmp_path / "c.txt").write_text("x")
    assert (tmp_path / "deep" / "a.json").stat().st_mode == (tmp_path / "c.txt").stat().st_mode


def test_a_disk_that_flushes_no_folder_is_written_and_a_fault_of_flushing_names_its_file(tmp_path, monkeypatch):
    """On a shared folder of VirtualBox every command ended with "[Errno 22] Invalid argument"."""

    def refuse(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        if is_folder or os.lseek(handle, 0, os.SEEK_END) > 5:
            raise OSError(errno.EINVAL if is_folder else errno.ENOSPC, "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a.txt").write_text("whole")
    assert (tmp_path / "out" / "a.txt").read_text() == "whole"
    with pytest.raises(OSError, match=r"refused: '.*b\.txt\.tmp"):
        write_text_atomic(tmp_path / "b.txt", "too much")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Weights of one run beside the config of another would load without complaint."""
    target = tmp_path / "out" / "student"
    claim_folder(target.parent, "experiment")
    for content in ("one", "two"):
        with atomic_folder(target) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / f"{content}.txt").write_text(content)
    assert [entry.name for entry in (target / "deep").iterdir()] == ["two.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()  # which nobody misses; an export was refused at its end
    with atomic_folder(empty) as temporary:
        (temporary / "one.txt").touch()
    assert (empty / "one.txt").exists()
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(target) as temporary:
        _write_and_stop(temporary / "three.txt")
    rename = Path.rename

    def fail_into_target(self: Path, to: Path) -> Path:
        if to == target and (self / "new.txt").exists():
            raise OSError(errno.EIO, "broken")
        return rename(self, to)

    # Between the two renames the old folder must come back.
    monkeypatch.setattr(Path, "rename", fail_into_target)
    with pytest.raises(OSError, match="broken"), atomic_folder(target) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [entry.name for entry in (target / "deep").iterdir()] == ["two.txt"]
    assert {entry.name for entry in target.parent.iterdir()} == {MANIFEST, "student"}


def test_a_kill_between_the_two_renames_costs_no_folder(tmp_path):
    """The next call removed old and new as rubbish before it had anything whole; on a full disk there was no model."""
    claim_folder(tmp_path, "experiment")
    with atomic_folder(tmp_path / "student") as temporary:
        (temporary / "weights").write_text("old")
    script = (
        "import os, pathlib; from kdlora.system.storage import atomic_folder\n"
        f"target = pathlib.Path({str(tmp_path / 'student')!r})\n"
        "with atomic_folder(target) as folder:\n"
        "    rename = pathlib.Path.rename\n"
        "    pathlib.Path.rename = lambda path, to: os._exit(9) if to == target else rename(path, to)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert not (tmp_path / "student").exists()
    with pytest.raises(OSError, match="No space") as caught, atomic_folder(tmp_path / "student"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "student"), "a write that fails names no file"
    assert (tmp_path / "student" / "weights").read_text() == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == {MANIFEST, "student"}


def test_everything_that_is_abandoned_below_a_folder_goes(tmp_path):
    """What is not written again is not tidied up by its next write either."""
    place, end = owned_name().split("-")[0], "0123abcd"
    can_tell = _start_of(os.getpid()) is not None
    names = {
        f".a.tmp-{place}-999999999-0-{end}": True,
        f".back.old-{place}-999999999-0-{end}": True,  # nothing took its place, so it goes back there
        f"..f.tmp.old-{place}-999999999-0-{end}": True,
        f".b.tmp-{place}-{os.getpid()}-1-{end}": can_tell,  # another process had this id
        f".c.tmp-{owned_name()}": False,
        f".d.tmp-{'0' * 12}-1-1-{end}": False,  # of another machine or container, new
        f".e.tmp-{'0' * 12}-1-1-{end}": True,  # of another machine or container, old
        ".f.tmp": False,
        f"g.tmp-{place}-999999999-0-{end}": False,  # not ours: ours are hidden
        ".archive.tmp-2023-10-31-backup": False,  # of the user's, like the next ones
        f".a.tmp-{place}-²-0-{end}": False,
        f".a.tmp-{place}-{'9' * 20}-0-{end}": False,
        f".a.tmp-{place}-999999999-0-{end}.txt": False,
    }
    for name in names:
        (tmp_path / "deep" / name).mkdir(parents=True)
        (tmp_path / "deep" / name / "weights").write_text("half")
        if not name.startswith(".d"):
            os.utime(tmp_path / "deep" / name, (0, 0))
    remove_abandoned(tmp_path)
    stays = {name for name, goes in names.items() if not goes} | {"back"}
    assert {entry.name for entry in (tmp_path / "deep").iterdir()} == stays
    with pytest.raises(ArtifactError, match="was not made by kdlora and stays"):
        remove(tmp_path / "deep" / ".archive.tmp-2023-10-31-backup")
    remove_abandoned(tmp_path / "missing")


def _write_and_stop(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError("stop")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_weights_can_be_read_by_whoever_reads_their_config(tmp_path):
    """Safetensors writes files for their owner alone, so a service of another user found a model without weights."""
    with atomic_folder(tmp_path / "model") as folder:
        save_file({"w": np.ones(2)}, folder / "model.safetensors")
        (folder / "config.json").touch()
    weights, config = (tmp_path / "model" / name for name in ("model.safetensors", "config.json"))
    assert stat.S_IMODE(weights.stat().st_mode) == stat.S_IMODE(config.stat().st_mode)
