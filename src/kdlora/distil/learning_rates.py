"""Learning rates that differ between the parts of what is trained: B of the adapters, and the head."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from kdlora.config import LoraConfig

HEAD = ".modules_to_save."


def parameter_groups(
    model: nn.Module, lora: LoraConfig, learning_rate: float, weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model with an adapter into groups of one learning rate and weight decay.

    Args:
        model: with an adapter.
        lora: gives how many times `learning_rate` B and the head learn at.
        learning_rate: peak, of A and whatever else is trained.
        weight_decay: of the parameters in `decayed`.
        decayed: names of the parameters that decay.

    Returns:
        Groups for an optimiser, never an empty one; the one that the rate is reported of comes first.

    *Source*: LoRA+ (Hayou et al., arXiv 2402.12354): B starts at 0 and should move faster than A.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_ratio(name, lora), name in decayed), []).append(parameter)
    order = sorted(groups, key=lambda group: (group[0] != 1.0, group[0], not group[1]))
    return [
        {"params": groups[ratio, decays], "lr": ratio * learning_rate, "weight_decay": weight_decay if decays else 0.0}
        for ratio, decays in order
    ]


def _ratio(name: str, lora: LoraConfig) -> float:
    if ".lora_B." in name:
        return lora.b_learning_rate_ratio
    return lora.head_learning_rate_ratio if HEAD in name else 1.0
