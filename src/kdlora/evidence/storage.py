"""Writes that are either whole or absent: temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


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
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
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
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


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


def _temporary_name(target: Path) -> Path:
    """Name a hidden sibling by host and process, so that leftovers of dead processes can be told apart."""
    host = socket.gethostname().replace("/", "_")
    return target.with_name(f".{target.name}.tmp-{host}-{os.getpid()}-{secrets.token_hex(4)}")


def _discard_leftovers(target: Path) -> None:
    """Remove what a killed process of this machine left beside `target`: weights would fill the disk."""
    prefix = f".{target.name}.tmp-{socket.gethostname().replace('/', '_')}-"
    for entry in target.parent.iterdir():
        if not entry.name.startswith(prefix):
            continue
        process = entry.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            logger.info("removing %s, left by a process that was killed", entry)
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Say whether a process id is in use; signal 0 asks without sending anything."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; links and platforms without folder handles are passed over."""
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    """Turn NumPy values and non-finite numbers into what JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value
