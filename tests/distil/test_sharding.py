"""A model that processes share out: it stays whole for everyone else, and what cannot be shared is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from kdlora.distil.checkpoints import load_trained_tensors, pack_optimizer, trained_tensors, unpack_optimizer
from kdlora.distil.processes import ALONE, Processes
from kdlora.distil.sharding import check_sharding, shard_moments, sharded, whole, whole_tensors
from kdlora.errors import ConfigError, ModelError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair(Processes):
    """Two processes that name different values."""

    def gather(self, value):
        return [value, f"{value} of another"]


@pytest.fixture
def group() -> Iterator[Processes]:
    """A group of this process alone, whose shards are whole but are shards."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield ALONE
    distributed.destroy_process_group()


def take_step(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("layers", [True, False])
def test_a_model_that_was_shared_out_is_whole_again(make_setup, group, monkeypatch, layers):
    """A finished teacher that still consists of shards, or holds the weights of before, labels with them."""

    def refuse(model):
        raise ModelError("cannot tell the layers apart")

    if not layers:
        monkeypatch.setattr("kdlora.distil.sharding.find_layers", refuse)
    model = make_setup(lora=False, dropout=0.0).model
    same = make_setup(lora=False, dropout=0.0).model
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with sharded(model, group, CPU, wanted=True) as shares:
        take_step(shares)
        assert all(isinstance(value, DTensor) for value in shares.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    take_step(same)
    for (name, value), expected in zip(model.named_parameters(), same.parameters(), strict=True):
        assert type(value) is torch.nn.Parameter
        torch.testing.assert_close(value, expected, msg=name)


def test_weights_and_moments_go_through_whole_tensors(make_setup, group):
    """Moments that reach the wrong weight, or a shard that is taken for the whole, resume on another path."""
    model, other = (make_setup(lora=False, dropout=0.0).model for _ in range(2))
    with sharded(model, group, CPU, wanted=True) as shares, sharded(other, group, CPU, wanted=True) as again:
        optimizer = take_step(shares)
        moments, rest = pack_optimizer(optimizer.state_dict())
        stored, weights = whole_tensors(moments, keep=True), whole_tensors(trained_tensors(shares), keep=True)
        assert not any(isinstance(value, DTensor) for value in [*stored.values(), *weights.values()])
        assert whole_tensors(moments, keep=False) == {}
        load_trained_tensors(again, weights)
        resumed = torch.optim.AdamW(again.parameters(), 1e-2)
        state = unpack_optimizer(stored, rest)
        shard_moments(state, resumed)
        resumed.load_state_dict(state)
        for one, two in zip(shares.parameters(), again.parameters(), strict=True):
            assert torch.equal(whole(one), whole(two))
            for name, value in optimizer.state[one].items():
                assert isinstance(value, DTensor) is isinstance(resumed.state[two][name], DTensor) is (name != "step")
                assert torch.equal(whole(value), whole(resumed.state[two][name]))


def test_what_cannot_be_shared_out_is_refused(make_setup):
    """Shards of unequal models average into a third one, and nothing in the loss shows it."""
    whole_model = make_setup(lora=False).model
    check_sharding(whole_model, "hash", "bf16", ALONE)
    with pytest.raises(ConfigError, match="are frozen, first"):
        check_sharding(make_setup().model, "hash", "fp32", ALONE)
    with pytest.raises(ConfigError, match=r"set run\.precision to bf16 or fp32"):
        check_sharding(whole_model, "hash", "fp16", ALONE)
    with pytest.raises(ConfigError, match="hold different weights"):
        check_sharding(whole_model, "hash", "fp32", Pair(count=2))
