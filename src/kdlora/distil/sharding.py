"""A model that its processes share out: each holds a part of every weight, gradient and moment (FSDP2)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kdlora.distil.processes import Processes
from kdlora.errors import ConfigError, ModelError
from kdlora.models.layers import find_layers

logger = logging.getLogger(__name__)


def check_sharding(model: nn.Module, weights: str, precision: str, processes: Processes) -> None:
    """Check that a model can be shared out; all processes must ask.

    Args:
        model: as it is before the training.
        weights: their hash.
        precision: `fp32`, `bf16` or `fp16`.
        processes: those that train it.

    Raises:
        ConfigError: frozen weights, fp16, or processes that hold different weights.
    """
    if frozen := [name for name, parameter in model.named_parameters() if not parameter.requires_grad]:
        raise ConfigError(
            f"only a model whose weights are all trained can be shared out over processes; {len(frozen)} are frozen, "
            f"first {frozen[0]}. Train an adapter without sharding: its gradients and optimiser states are small"
        )
    if precision == "fp16":
        raise ConfigError(
            "run.precision is fp16, whose loss scaling does not go with run.shard_teacher; set run.precision to bf16 "
            "or fp32"
        )
    if len(set(processes.gather(weights))) > 1:
        raise ConfigError("the processes of this run hold different weights; expected the same model on every machine")


@contextmanager
def sharded(model: nn.Module, processes: Processes, device: torch.device, *, wanted: bool) -> Iterator[nn.Module]:
    """Share a model out while it trains; at the end of an undisturbed training it holds the trained weights again.

    What trains is a copy of the modules whose weights are shards; the model itself stays whole where it lies, in main
    memory if nobody moved it. No device ever holds more whole weights than those of one layer and of what surrounds
    the layers.

    Args:
        model: a transformers classifier.
        processes: those that share it; all of them must enter, and run every forward and backward pass together.
        device: where it is trained.
        wanted: nothing is done where False.

    Yields:
        What to train: the shared copy, or the model itself.
    """
    if not wanted:
        yield model
        return
    shares = _share_out(model, processes, device)
    here = sum(value.to_local().numel() for value in shares.parameters() if isinstance(value, DTensor))
    total = sum(value.numel() for value in model.parameters())
    logger.info("this process holds %d of %d parameters, shared out over %d", here, total, processes.count)
    yield shares
    with torch.no_grad():
        for target, value in zip(_values(model), _values(shares), strict=True):
            target.copy_(whole(value))


def is_sharded(model: nn.Module) -> bool:
    """Say whether several processes share a model, and so must run every pass together.

    Args:
        model: any.
    """
    return isinstance(model, FSDPModule)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Put a tensor together; all processes must ask, in the same order.

    Args:
        tensor: a shard, or a plain tensor, which is given back.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Put tensors together, one after the other, so that a device never holds two whole ones.

    Args:
        tensors: shards, which go to main memory, and plain tensors, which stay.
        keep: give them; otherwise this process only contributes its shards.
    """
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            kept[name] = value if value is tensor else value.cpu()
    return kept


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write a whole value into a plain tensor, or this process's part of it into a shard.

    Args:
        target: changed in place.
        value: of the same shape.
    """
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


@torch.no_grad()
def shard_moments(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Cut the whole moments of an optimiser's state like the weights that they belong to.

    Args:
        state: as `state_dict` names it; changed in place.
        optimizer: of the weights, shards or not.
    """
    parameters = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
    for index, values in state["state"].items():
        parameter = parameters[index]
        for name, value in values.items():
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter)
                put(values[name], value)


def _share_out(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """Copy the modules but not the weights, and cut those: layer by layer, then the rest."""
    # The copy's parameters are its own, or moving them to a device would move the model's; their memory is not.
    parameters = {id(value): nn.Parameter(value.detach(), value.requires_grad) for value in model.parameters()}
    shares: Any = copy.deepcopy(model, parameters)
    mesh = init_device_mesh(device.type, (processes.count,))
    layers: list[nn.Module] = []
    with contextlib.suppress(ModelError):  # layers that cannot be told apart are whole together during a pass
        layers = list(find_layers(shares)[1])
    for module in [*layers, shares]:
        # Resharded after every pass, the outermost too: a checkpoint between two steps then finds shards everywhere.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return shares


def _values(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
