"""Writes that are either whole or absent: temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdlora.errors import ArtifactError
from kdlora.system.ownership import is_ours, remove, remove_abandoned, temporary_name


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file so that a reader sees the old file or the new one, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    NaN and infinities become `null` (JSON has no such numbers) and NumPy scalars and arrays become numbers
    and lists, so that the record of a diverged run can still be written and read by any JSON reader.
    """
    text = json.dumps(plain_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; on success it is flushed to disk and takes the file's place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, deep=False, of=target.name)
    temporary = temporary_name(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    except BaseException as fault:
        remove(temporary)
        _raise_full_disk(fault, target)
        raise
    _sync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary sibling folder; on success it takes the place of `path`, old content and all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, deep=False, of=target.name)
    temporary = temporary_name(target)
    try:
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*"), reverse=True):
            _sync(entry)
        _sync(temporary)
        _replace_folder(temporary, target)
    except BaseException as fault:
        remove(temporary)
        _raise_full_disk(fault, target)
        raise
    _sync(target.parent)


def _raise_full_disk(fault: BaseException, target: Path) -> None:
    """Give the operating system's own error for a full disk, which safetensors tells in words of its own."""
    if not isinstance(fault, OSError) and f"os error {errno.ENOSPC}" in str(fault):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from fault


def _replace_folder(temporary: Path, target: Path) -> None:
    """Move the new folder in; a kill between the two renames leaves no folder rather than a mixed one."""
    if not os.path.lexists(target):
        temporary.rename(target)
        return
    if not is_ours(target):
        raise ArtifactError(f"{target} was not made by kdlora and stays; move it away, or name another place")
    aside = temporary_name(target)
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    remove(aside)


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
    """Turn NumPy values and non-finite numbers into what JSON has."""
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
