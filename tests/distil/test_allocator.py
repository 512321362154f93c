"""Memory that is freed in a training is used again in it, and given back after it."""

from __future__ import annotations

import resource

import pytest
import torch

from kdlora.distil import training_modes as allocator
from kdlora.distil.training_modes import freed_memory_kept

CPU = torch.device("cpu")
BYTES = 64 * 2**20
pytestmark = pytest.mark.skipif(allocator._glibc() is None, reason="not glibc, or its allocator is tuned by hand")


def faults_of_ten_blocks() -> int:
    """Count the pages that the kernel brings in while ten large blocks are made one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_freed_block_is_used_again():
    """Mapped afresh, a block's pages are cleared each time: on long texts that took longer than the products."""
    pages = BYTES // resource.getpagesize()
    with freed_memory_kept(CPU) as kept:
        assert kept
        with freed_memory_kept(CPU):
            torch.empty(BYTES, dtype=torch.uint8).fill_(1)
        inside = faults_of_ten_blocks()
    assert inside < 3 * pages
    assert faults_of_ten_blocks() > 3 * inside + pages


def test_other_devices_and_a_tuned_allocator_are_left_alone(monkeypatch):
    """A user who has tuned the allocator knows better."""
    with freed_memory_kept(torch.device("meta")) as kept:
        assert not kept
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with freed_memory_kept(CPU) as kept:
        assert not kept
