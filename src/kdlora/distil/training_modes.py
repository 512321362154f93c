"""What is set for as long as a model is at work: dropout, recomputed activations, freed memory that is kept."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from kdlora.errors import ConfigError

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 * 2**20

_users: list[object] = []


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[bool]:
    """Let this process reuse the large blocks that it frees, in place of giving each back to the system.

    By default each tensor of many megabytes is mapped afresh and the kernel clears its pages, which on long texts takes
    longer than the matrix products. Nothing is done on another device, without glibc, or where the user has tuned it.
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


@contextmanager
def dropout_set(model: nn.Module, rate: float | None) -> Iterator[int]:
    """Train with another dropout than the model's config asks for, which stays as it is; its own comes back on exit."""
    places = [] if rate is None else _places(model)
    originals = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, rate)
        yield len(places)
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Find dropout modules, and the numbers that attention functions read in place of one (ModernBERT)."""
    found: list[tuple[nn.Module, str]] = []
    for path, module in model.named_modules():
        if "lora_dropout" in path.split("."):
            continue
        if isinstance(module, nn.Dropout):
            found.append((module, "p"))
        else:
            numbers = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
            found += [(module, name) for name in numbers]
    return found


@contextmanager
def activations_recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep only each layer's input for the backward pass, which computes the rest again (Chen et al., 2016).

    The results are the same bits: dropout draws the same elements again.
    """
    if not wanted:
        yield
        return
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"train.gradient_checkpointing: {type(base).__name__} cannot compute its layers again; lower "
            "micro_batch_tokens in teacher.train or student.train to save memory"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of new names, which older releases do not have
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            base.gradient_checkpointing_disable()


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Take back what Trainer and Accelerate leave on a model: a forward under autocast, and a config entry.

    Under that forward, a model trained in bf16 would go on computing in bf16 wherever it is used afterwards.
    """
    config: Any = getattr(model, "config", None)
    noted = {} if config is None else {name: value for name, value in vars(config).items() if name == "use_cache"}
    own = {name: value for name, value in vars(model).items() if name == "forward"}
    try:
        yield
    finally:
        vars(model).pop("_original_forward", None)
        vars(model).pop("forward", None)
        vars(model).update(own)
        if config is not None:
            vars(config).pop("use_cache", None)
            vars(config).update(noted)
