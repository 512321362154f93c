"""Two processes on one folder: one works, the other waits or is told who does; a lock goes with its process."""

import errno
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time

import filelock
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


def test_the_holder_is_named_and_waited_for(tmp_path, caplog):
    """Told only that somebody is at work, a user deletes the lock; a command that waits in silence seems to hang."""
    lock = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        told = f"another process runs it: process {holder.pid} on {re.escape(socket.gethostname())}, since 20"
        with (
            pytest.raises(ArtifactError, match=f"^{told}.*; wait for it, or name another folder$"),
            hold_lock(lock, "runs it", remedy=", or name another folder"),
        ):
            pass
        threading.Timer(0.3, holder.kill).start()
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING), hold_lock(lock, "computes logits in x", wait=True):
            assert time.monotonic() - begin > 0.2
        assert f"waiting: another process computes logits in x: process {holder.pid}" in caplog.text


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has locks of its own")
@pytest.mark.skipif(filelock.__version__ < "4", reason="earlier ones take a live holder's marker away")
def test_a_dead_process_holds_no_lock_where_the_system_has_none(tmp_path, monkeypatch):
    """A cluster's disk may know no locks: after a kill every later call was refused, until the file was deleted."""
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    lock, killed = tmp_path / ".lock", HOLDER.replace("time.sleep(60)", "os.kill(os.getpid(), 9)")
    flockless = "import errno, fcntl, os\ndef refuse(*_): raise OSError(errno.ENOSYS, '')\nfcntl.flock = refuse\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", flockless + killed, str(lock)], check=False)
    assert lock.exists()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_lock(lock, "runs it"), pytest.raises(ArtifactError, match=f"runs it: process {os.getpid()} on "):
        hold_lock(lock, "runs it").__enter__()
    assert not lock.exists()


def test_a_lock_knows_when_its_folder_is_gone(tmp_path):
    """Results would go on to another disk, or a write in a child name a missing file, where the folder is missing."""
    out, gone = tmp_path / "out", "removed, moved or unmounted"

    def write(*, moved: bool) -> None:
        with hold_lock(out / ".lock", "runs it"):
            if moved:
                out.rename(tmp_path / "again")
            (out / "deep" / "record").write_text("")

    with hold_lock(out / ".lock", "runs it") as check:
        check()
        out.rename(tmp_path / "away")
        out.mkdir()
        (out / ".lock").touch()  # of somebody who made the folder anew
        with pytest.raises(FileNotFoundError, match=gone):
            check()
    with pytest.raises(FileNotFoundError, match="record"):
        write(moved=False)
    with pytest.raises(FileNotFoundError, match=gone):
        write(moved=True)
