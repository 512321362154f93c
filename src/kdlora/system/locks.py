"""Locks on folders: one process works, the others wait or are told who does; a lock goes with its process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kdlora.errors import ArtifactError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldLock:
    """A lock that this process holds.

    Attributes:
        path: the lock's file.
        identity: device and number of that file.
    """

    path: Path
    identity: tuple[int, int]

    def check(self) -> None:
        """See that the locked folder is still there.

        Raises:
            OSError: it was removed, moved or unmounted; writing on would put a part of the results elsewhere.
        """
        try:
            found = self.path.stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self.identity:
            raise FileNotFoundError(
                errno.ENOENT, "the folder was removed, moved or unmounted while it was in use", str(self.path.parent)
            )


@contextlib.contextmanager
def hold_lock(path: Path, what: str, *, wait: bool = False, remedy: str = "") -> Iterator[HeldLock]:
    """Hold a lock, which the system drops with the process, however it ends.

    Args:
        path: the lock's file, in the folder that is locked; it is created, and stays.
        what: what the holder does, for messages: "runs the experiment in out".
        wait: wait until the lock is free, in place of refusing.
        remedy: what else to do than wait.

    Yields:
        The lock.

    Raises:
        ArtifactError: another process holds it; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = _read_holder(path)
        if not wait:
            raise ArtifactError(f"another process {what}{holder}; wait for it{remedy}") from None
        logger.warning("waiting: another process %s%s", what, holder)
        lock.acquire()
    try:
        held = path.stat()
        _write_holder(path)
        yield HeldLock(path, (held.st_dev, held.st_ino))
    finally:
        lock.release()


def _write_holder(path: Path) -> None:
    """Leave a name for the others; the lock holds without it too."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    with contextlib.suppress(OSError):
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n", encoding="utf-8")


def _read_holder(path: Path) -> str:
    """Give `": process 12 on host, since ..."`; empty where the file does not say."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return f": {text}" if text else ""
