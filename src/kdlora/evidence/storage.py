"""Writes that are either whole or absent: temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_FOREIGN_SECONDS = 24 * 3600.0
"""Age at which what a process of another machine was writing counts as abandoned."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file so that a reader sees the old file or the new one, never a part.

    Args:
        path: the file; its folder is created where it is missing.
        text: the whole content.

    Raises:
        OSError: the disk is full or the folder cannot be written; no temporary file is left behind.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    NaN and infinities become `null` (JSON has no such numbers) and NumPy scalars and arrays become numbers
    and lists, so that the record of a diverged run can still be written and read by any JSON reader.

    Args:
        path: the file; its folder is created where it is missing.
        value: what `json` can write, plus NumPy values.

    Raises:
        TypeError: a value that is neither.
        OSError: the disk is full or the folder cannot be written.
    """
    text = json.dumps(plain_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; on success it is flushed to disk and takes the file's place.

    Args:
        path: the file to create or replace.

    Yields:
        The temporary path. On any exception it is removed and `path` is left as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _discard_leftovers(target)
    temporary = _temporary_name(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    except BaseException as fault:
        temporary.unlink(missing_ok=True)
        _raise_full_disk(fault, target)
        raise
    _sync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary sibling folder; on success it takes the place of `path`, old content and all.

    Args:
        path: the folder to create or replace.

    Yields:
        The temporary folder. On any exception it is removed and `path` is left as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _discard_leftovers(target)
    temporary = _temporary_name(target)
    try:
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*"), reverse=True):
            _sync(entry)
        _sync(temporary)
        _replace_folder(temporary, target)
    except BaseException as fault:
        shutil.rmtree(temporary, ignore_errors=True)
        _raise_full_disk(fault, target)
        raise
    _sync(target.parent)


def _raise_full_disk(fault: BaseException, target: Path) -> None:
    """Give the operating system's own error for a full disk, which safetensors tells in words of its own."""
    if not isinstance(fault, OSError) and f"os error {errno.ENOSPC}" in str(fault):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from fault


def _replace_folder(temporary: Path, target: Path) -> None:
    """Move the new folder in; a kill between the two renames leaves no folder rather than a mixed one."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = _temporary_name(target)
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove all that killed processes were writing anywhere below a folder.

    Args:
        folder: one that nobody else writes to now, or that is not there.
    """
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if name.startswith(".") and ".tmp-" in name and is_abandoned(Path(place, name)):
                _remove(Path(place, name))
        folders[:] = [name for name in folders if not (name.startswith(".") and ".tmp-" in name)]


def owned_name() -> str:
    """Name this process by machine, id and start, with a random end: ids alone are used again."""
    host = socket.gethostname().replace("/", "_")
    return f"{host}-{os.getpid()}-{_start_of(os.getpid()) or 0}-{secrets.token_hex(4)}"


def is_abandoned(path: Path) -> bool:
    """Say whether the process that made a file or folder is gone, so that nobody will finish it.

    Args:
        path: its name ends in what `owned_name` gave.
    """
    owner, *numbers = path.name.rsplit("-", 3)
    if len(numbers) != 3 or not (numbers[0].isdigit() and numbers[1].isdigit()):
        return False
    host = socket.gethostname().replace("/", "_")
    if owner.endswith((f"tmp-{host}", f"scratch-{host}")):
        return not is_alive(int(numbers[0]), int(numbers[1]))
    try:  # of another machine, or of an earlier container
        return time.time() - path.lstat().st_mtime > _FOREIGN_SECONDS
    except OSError:
        return False


def is_alive(process: int, start: int = 0) -> bool:
    """Say whether a process of this machine still runs.

    Args:
        process: its id.
        start: its start in clock ticks after the boot, as `/proc` has it; 0 where it is not known.
    """
    try:
        os.kill(process, 0)  # signal 0 asks without sending anything
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return not start or _start_of(process) in (None, start)


def _start_of(process: int) -> int | None:
    """Read when a process started; None where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
        return int(fields.split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _temporary_name(target: Path) -> Path:
    """Name a hidden sibling by its process, so that leftovers of dead processes can be told apart."""
    return target.with_name(f".{target.name}.tmp-{owned_name()}")


def _discard_leftovers(target: Path) -> None:
    """Remove what a killed process left beside `target`: weights would fill the disk."""
    for entry in target.parent.iterdir():
        if entry.name.startswith(f".{target.name}.tmp-") and is_abandoned(entry):
            _remove(entry)


def _remove(entry: Path) -> None:
    logger.info("removing %s, left by a process that was killed", entry)
    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; links and platforms without folder handles are passed over."""
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain_json(value: Any) -> Any:
    """Turn NumPy values and non-finite numbers into what JSON has.

    Args:
        value: as `write_json_atomic` takes it.
    """
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    return value
