"""Two processes on one folder: one works, the other waits or is told who does; a lock goes with its process."""

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdlora.errors import ArtifactError
from kdlora.system.storage import hold_lock

HOLDER = """
import sys, time
from pathlib import Path
from kdlora.system.storage import hold_lock
with hold_lock(Path(sys.argv[1]), "computes"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_holder_is_named_and_waited_for(holder, tmp_path, caplog):
    """Told only that somebody is at work, a user deletes the lock."""
    with (
        pytest.raises(ArtifactError) as caught,
        hold_lock(tmp_path / ".lock", "runs it in out", remedy=", or name another folder"),
    ):
        pass
    said = str(caught.value)
    assert said.startswith(f"another process runs it in out: process {holder.pid} on {socket.gethostname()}, since 20")
    assert said.endswith("; wait for it, or name another folder")

    # A command that waits in silence looks as if it hung.
    threading.Timer(0.3, holder.kill).start()
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING), hold_lock(tmp_path / ".lock", "computes logits in x", wait=True):
        assert time.monotonic() - begin > 0.2
    assert f"waiting: another process computes logits in x: process {holder.pid}" in caplog.text


def test_a_lock_knows_when_its_folder_is_gone(tmp_path):
    """Results would go on to another disk, or to a folder that somebody made anew."""
    (tmp_path / "out").mkdir()
    with hold_lock(tmp_path / "out" / ".lock", "runs it") as lock:
        lock.check()
        (tmp_path / "out").rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match="removed, moved or unmounted"):
            lock.check()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".lock").touch()
        with pytest.raises(FileNotFoundError, match="removed, moved or unmounted"):
            lock.check()


def test_a_file_that_is_missing_with_its_folder_is_told_as_the_folder(tmp_path):
    """A write in a child process may meet the empty mount point before anybody checks the lock."""
    out = tmp_path / "out"

    def write(*, moved: bool) -> None:
        with hold_lock(out / ".lock", "runs it"):
            if moved:
                out.rename(tmp_path / "away")
            (out / "deep" / "record").write_text("")

    with pytest.raises(FileNotFoundError, match="removed, moved or unmounted"):
        write(moved=True)
    with pytest.raises(FileNotFoundError, match="record"):
        write(moved=False)
