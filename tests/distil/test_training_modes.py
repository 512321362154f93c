"""What is set while a training runs: dropout apart from the model's own and the adapters', memory that is kept."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from kdlora.config import LoraSettings
from kdlora.distil import training_modes as allocator
from kdlora.distil.training_modes import dropout_set, freed_memory_kept
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import load_encoder
from tiny import FAMILIES, batch, task

CPU = torch.device("cpu")
BYTES = 64 * 2**20
on_glibc = pytest.mark.skipif(allocator._glibc() is None, reason="not glibc, or its allocator is tuned by hand")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropout_is_no_dropout_anywhere(tiny_model_folder, family):
    """Attention functions take their dropout as a number; one that is missed leaves the training noisy, unnoticed."""
    encoder = load_encoder(str(tiny_model_folder(family)), task(), seed=0)
    model, inputs = encoder.model.train(), batch(encoder.tokenizer)
    with torch.no_grad():
        own = [model(**inputs).logits for _ in range(2)]
        assert not torch.equal(*own)
        with dropout_set(model, 0.0) as places:
            assert places > 0
            off = [model(**inputs).logits for _ in range(2)]
        assert torch.equal(*off)
        torch.testing.assert_close(off[0], model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)
        assert not torch.equal(*[model.train()(**inputs).logits for _ in range(2)])  # the model's own is back


def test_the_adapters_dropout_is_apart(tiny_model_folder):
    """`lora.dropout` is an option of its own; setting one by the other would tune two things at once."""
    encoder = load_encoder(str(tiny_model_folder("bert")), task(), seed=0)
    model = add_adapter(encoder, LoraSettings(dropout=0.25), seed=0)

    def rates(adapter: bool) -> set[float]:
        return {
            module.p
            for name, module in model.named_modules()
            if isinstance(module, nn.Dropout) and ("lora_dropout" in name) is adapter
        }

    with dropout_set(model, None) as places:
        assert places == 0
        assert rates(adapter=False) == {0.1}
    with dropout_set(model, 0.5):
        assert (rates(adapter=False), rates(adapter=True)) == ({0.5}, {0.25})
    assert rates(adapter=False) == {0.1}


def faults_of_ten_blocks() -> int:
    """Count the pages that the kernel brings in while ten large blocks are made one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@on_glibc
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


@on_glibc
def test_other_devices_and_a_tuned_allocator_are_left_alone(monkeypatch):
    """A user who has tuned the allocator knows better."""
    with freed_memory_kept(torch.device("meta")) as kept:
        assert not kept
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with freed_memory_kept(CPU) as kept:
        assert not kept
