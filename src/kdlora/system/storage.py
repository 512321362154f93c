"""Writes that are whole or absent (temporary sibling, fsync, rename), and locks that go with their process."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdlora.errors import ArtifactError
from kdlora.system.ownership import MANIFEST, check_folder, is_ours, owned_name, read_manifest, remove, remove_abandoned

logger = logging.getLogger(__name__)

_HOLDER = "process "
"""How a lock's content begins, which says who took it."""
_MARKER = re.compile(r"([0-9]+)\n(\S+)\n(?:[0-9]+\n)?")
"""A lock where the system has none: process, machine, start, by which filelock tells the dead from the living."""
_NAMED_SECONDS = 1.0
"""How long who took a lock may take to write its name there: of two that begin at once, one asks before it is there."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file so that a reader sees the old file or the new one, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; what JSON lacks, NaN in a diverged run's record, becomes `null`."""
    text = json.dumps(plain_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; on success it is flushed to disk and takes the file's place."""
    target = Path(path)
    with _sibling_of(target) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(target)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary sibling folder; on success it takes the place of `path`, old content and all."""
    target = Path(path)
    with _sibling_of(target) as temporary:
        temporary.mkdir()
        yield temporary
        for weights in temporary.rglob("*.safetensors"):  # which safetensors keeps to their owner, whatever the umask
            weights.chmod(temporary.stat().st_mode & 0o666)
        _replace_folder(temporary, target)


def claim_folder(folder: Path, kind: str) -> None:
    """Make a folder ours, so that what we put into it may be replaced and removed."""
    check_folder(folder, kind)
    if read_manifest(folder) is None:
        mark_folder(folder, kind)


def mark_folder(folder: Path, kind: str, **about: Any) -> None:
    """Write the manifest into a folder whose content was looked at."""
    write_json_atomic(folder / MANIFEST, {"made_by": "kdlora", "kind": kind, **about})


def temporary_name(target: Path, mark: str = "tmp") -> Path:
    """Name a hidden sibling by its process; one marked `old` goes back to the target's place if that is killed."""
    return target.with_name(f".{target.name}.{mark}-{owned_name()}")


@contextlib.contextmanager
def _sibling_of(target: Path) -> Iterator[Path]:
    """Give the name of a sibling that its user puts in the place of a file or folder; a failure removes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, deep=False, of=target.name)
    temporary = temporary_name(target)
    try:
        yield temporary
    except BaseException as fault:
        remove(temporary)
        # safetensors tells a full disk in words of its own, and a write names no file; the caller wants both.
        is_full = getattr(fault, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(fault)
        if is_full and getattr(fault, "filename", None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from fault
        raise
    _sync(target.parent)


def _replace_folder(temporary: Path, target: Path) -> None:
    """Move the new folder in; after a kill between the two renames, the next call puts the old one back."""
    for entry in (*sorted(temporary.rglob("*"), reverse=True), temporary):
        _sync(entry)
    if not os.path.lexists(target):
        temporary.rename(target)
        return
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if not (is_empty or is_ours(target)):
        raise ArtifactError(f"{target} was not made by kdlora and stays; move it away, or name another place")
    aside = temporary_name(target, "old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    remove(aside)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; a link is passed over, and on Windows a folder, which cannot be opened."""
    if path.is_symlink():
        return
    try:  # Windows flushes only what is open for writing
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as fault:  # shared folders of VirtualBox, old SMB and some FUSE disks flush no folder
        if not path.is_dir() or fault.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            fault.filename = str(path)
            raise
    finally:
        os.close(handle)


def plain_json(value: Any) -> Any:
    """Turn NumPy values into what JSON has; numbers without an end, or of more than 64 bits, become null."""
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    return value


def _is_lock(path: Path) -> bool:
    """Say whether a file is there for us to lock: none, an empty one, or one that says who took it."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            content = file.read(1024)
    except OSError:  # not there, or a fault that locking it tells
        return True
    return content == "" or content.startswith(_HOLDER) or _MARKER.fullmatch(content) is not None


@contextlib.contextmanager
def hold_lock(path: Path, what: str, *, wait: bool = False, remedy: str = "") -> Iterator[Callable[[], None]]:
    """Hold a lock, which the system drops with the process, however it ends; refuse where another one has it, or wait.

    `what` and `remedy` are for the message: "runs the experiment in out", ", or name another folder". Gives what checks
    that the locked folder is still there: writing on would put a part of the results elsewhere.
    """
    if not _is_lock(path):
        raise ArtifactError(
            f"{path} was not made by kdlora, which would overwrite it; move it away, or name another place"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path), ""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        until = time.monotonic() + _NAMED_SECONDS
        while not holder and time.monotonic() < until:
            with contextlib.suppress(OSError):
                text = path.read_text(encoding="utf-8", errors="replace")
                holder = _MARKER.sub(rf"{_HOLDER}\1 on \2", text).strip()
            time.sleep(0 if holder else 0.02)
        holder = f": {holder}" if holder else ""
        if not wait:
            raise ArtifactError(f"another process {what}{holder}; wait for it{remedy}") from None
        logger.warning("waiting: another process %s%s", what, holder)
        lock.acquire()
    try:
        held = path.stat()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a name for the others; the lock holds without it too
            if not path.read_bytes().startswith(b"%d\n" % os.getpid()):  # else the file itself is the lock
                path.write_text(f"{_HOLDER}{os.getpid()} on {socket.gethostname()}, since {since}\n", encoding="utf-8")

        def check() -> None:
            with contextlib.suppress(OSError):
                if os.path.samestat(path.stat(), held):
                    return
            told = "the folder was removed, moved or unmounted while it was in use"
            raise FileNotFoundError(errno.ENOENT, told, str(path.parent))

        try:
            yield check
        except OSError:  # of a file that is missing, the reason may be that the folder is
            check()
            raise
    finally:
        lock.release()
