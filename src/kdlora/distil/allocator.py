"""glibc's memory allocator, told to keep what the steps of a training free."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 * 2**20

_users: list[object] = []


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[bool]:
    """Let this process reuse the large blocks that it frees, in place of giving each back to the system.

    Every operation of a step allocates tensors of many megabytes. By default each is mapped afresh and the kernel
    clears its pages, which on long texts takes longer than the matrix products. On exit the freed memory goes back.
    Nothing is done on another device, without glibc, or where the user has tuned its allocator through the
    environment. May be nested.

    Args:
        device: where is computed.

    Yields:
        Whether memory is kept.
    """
    libc = _glibc()
    if libc is None or device.type != "cpu":
        yield False
        return
    _users.append(device)
    if len(_users) == 1:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield True
    finally:
        _users.pop()
        if not _users:
            # glibc's own limits, its threshold at the value that it would have found by itself.
            libc.mallopt(_MMAP_MAX, 65536)
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
