"""The stack of layers inside an encoder: find it, and build a smaller model from some of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from kdlora.errors import ModelError

logger = logging.getLogger(__name__)

PER_LAYER_SETTINGS = ("layer_types", "mlp_layer_types", "attention_window")
"""Settings of a configuration that hold one value per layer: ModernBERT's local and global attention, …"""


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the stack of encoder layers."""
    depth = model.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    outer = [(name, module) for name, module in found if not any(name.startswith(other + ".") for other, _ in found)]
    if len(outer) != 1:
        raise ModelError(
            f"cannot tell the layers of a {model.config.model_type!r} model apart: expected one list of {depth} "
            f"layers, found {', '.join(name for name, _ in outer) or 'none'}. Choose a smaller sibling with "
            "student.model instead of student.from_teacher_layers"
        )
    name, layers = outer[0]
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    return prefix + name, layers


def check_layers(layers: Sequence[int], depth: int, where: str) -> None:
    """Refuse a choice of layers that no student can be made of."""
    if not layers:
        raise ModelError("student.from_teacher_layers is empty; name at least one layer, counted from 0")
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ModelError(
            f"student.from_teacher_layers names layer {outside[0]}, but {where} has {depth} layers: 0 to {depth - 1}"
        )
    if list(layers) != sorted(set(layers)):
        raise ModelError(
            f"student.from_teacher_layers is {list(layers)}; expected increasing indices without repetition, "
            f"such as {sorted(set(layers))}"
        )


def keep_layers(model: PreTrainedModel, layers: Sequence[int], *, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model with some of the layers of another and all the rest of it.

    The new model is built from a configuration, not cut in place, so that what is saved loads again as the
    same function: ModernBERT's first layer, for one, lacks the norm that the others have.

    *Source*: which of them matters little, lower ones help (arXiv 2305.15032, 2502.04499).
    """
    stack, found = find_layers(model)
    check_layers(layers, len(found), model.name_or_path or "the teacher")
    config = copy.deepcopy(model.config)
    for key in PER_LAYER_SETTINGS:
        values = getattr(config, key, None)
        if isinstance(values, list | tuple) and len(values) == len(found):
            setattr(config, key, [values[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    with torch.random.fork_rng(devices=[]):
        small = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    given, origin = model.state_dict(), {}
    for key in small.state_dict():  # its layer number i is layer number `layers[i]` of the large one
        new, _, rest = key.removeprefix(stack + ".").partition(".")
        origin[key] = f"{stack}.{layers[int(new)]}.{rest}" if key.startswith(stack + ".") else key
    small.load_state_dict({key: given[old] for key, old in origin.items()})
    kept = tuple(f"{stack}.{layer}." for layer in layers)
    if unused := sorted(key for key in given.keys() - set(origin.values()) if key.startswith(kept)):
        logger.info("a model that begins with layer %d has no place for %s", layers[0], ", ".join(unused))
    small.name_or_path = small.config._name_or_path = ""
    return small.eval()
