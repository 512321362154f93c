"""Gradient checkpointing, switched on while a model trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from kdlora.errors import ConfigError


@contextmanager
def activations_recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep only each layer's input for the backward pass, which computes the rest again (Chen et al., 2016).

    The results are the same bits: dropout draws the same elements again.

    Args:
        model: with or without an adapter.
        wanted: nothing is done where False.

    Raises:
        ConfigError: the architecture cannot.
    """
    if not wanted:
        yield
        return
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"train.gradient_checkpointing: {type(base).__name__} cannot compute its layers again; lower "
            "train.micro_batch_tokens to save memory"
        )
    with _old_names():
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        with _old_names():
            base.gradient_checkpointing_disable()


@contextmanager
def _old_names() -> Iterator[None]:
    """Quieten transformers, whose new names its older releases do not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
