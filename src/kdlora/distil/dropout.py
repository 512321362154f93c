"""Dropout of the model while it trains, set without touching its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

ADAPTER_DROPOUT = "lora_dropout"


@contextmanager
def dropout_set(model: nn.Module, rate: float | None) -> Iterator[int]:
    """Train with another dropout than the model's config asks for; the model's own comes back on exit.

    A model that is small for its task underfits rather than overfits, and a teacher's soft targets regularise by
    themselves; dropout then only adds noise. The config stays as it is, so what is saved is an ordinary checkpoint.

    Args:
        model: with or without an adapter, whose own dropout (`lora.dropout`) is left alone.
        rate: share of activations dropped, wherever the architecture has dropout; None changes nothing.

    Yields:
        The number of places that were set.
    """
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
        if ADAPTER_DROPOUT in path.split("."):
            continue
        if isinstance(module, nn.Dropout):
            found.append((module, "p"))
        else:
            numbers = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
            found += [(module, name) for name in numbers]
    return found
