"""A model's own layers on the kernels of `cpu_kernels`, for as long as a training on the CPU runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kdlora.distil.cpu_kernels import PackedWeight, adapted_linear, attention, dropout, frozen_linear

ATTENTION = "kdlora_cpu"
_PACKABLE = (torch.float32, torch.bfloat16)


class _Dropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in PyTorch
        return dropout(input, self.p) if self.training else input


class _FrozenLinear(nn.Linear):
    packed: PackedWeight
    casts: _Casts

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return frozen_linear(self.casts.to(input, self.packed.dtype), self.packed)


class _AdaptedLinear(LoraLinear):
    packed: PackedWeight
    casts: _Casts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (name,) = self.active_adapters
        rate = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        return adapted_linear(
            self.casts.to(x, self.packed.dtype),
            self.packed,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            scale=self.scaling[name],
            dropout=rate,
        )


class _Casts:
    """Remembers the last cast, for query, key and value read the same rows."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.version = -1
        self.grad = False
        self.cast: Tensor | None = None

    def to(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast, unless that was just done."""
        if rows.dtype == dtype or rows.is_inference():  # inference tensors count no versions
            return rows.to(dtype)
        grad = torch.is_grad_enabled()
        same = self.rows is rows and self.version == rows._version and self.grad == grad
        if self.cast is None or not same or self.cast.dtype != dtype:
            self.rows, self.version, self.grad, self.cast = rows, rows._version, grad, rows.to(dtype)
        return self.cast

    def forget(self) -> None:
        """Let go of the tensors."""
        self.rows = self.cast = None


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers asks of an attention implementation.

    Without dropout PyTorch's fused kernel is best, but for its backward in bf16, which can take half of a whole step:
    benchmarks/training_profile.py shows it.
    """
    if (shared := query.shape[1] // key.shape[1]) > 1:  # heads of queries that share keys and values
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    learns_in_half = torch.is_grad_enabled() and value.dtype == torch.bfloat16
    if dropout == 0.0 and not learns_in_half:
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mixed = attention(query, key, value, attention_mask, dropout=dropout, scale=scale)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def fast_on_cpu(model: nn.Module, device: torch.device) -> Iterator[int]:
    """Run frozen linear layers, plain LoRA, dropout and attention on our own kernels; on exit all is as it was.

    Layers are recognised by their exact class; what is not known (DoRA, an adapter with a bias, a subclass) stays
    with PyTorch. The trained tensors stay the same objects under the same names. On another device nothing is done.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        yield 0
        return
    casts = _Casts()
    changed = _replace_layers(model, casts)
    config, implementation = _choose_attention(model)
    handle = model.register_forward_hook(lambda *_: casts.forget())
    try:
        yield len(changed)
    finally:
        handle.remove()
        if implementation is not None:
            config._attn_implementation = implementation
        for module, original in changed:
            module.__class__ = original
            vars(module).pop("packed", None)
            vars(module).pop("casts", None)


def _replace_layers(model: nn.Module, casts: _Casts) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Change the classes of what is known; (module, what it was) of each."""
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    done: set[nn.Module] = set()
    for module in model.modules():
        replacement = None if module in done else _replacement(module)
        if replacement is None:
            continue
        changed.append((module, type(module)))
        if replacement is _AdaptedLinear:
            done.update(module.modules())  # the layer itself does their work
        if replacement is not _Dropout:
            layer: Any = module.base_layer if replacement is _AdaptedLinear else module
            vars(module).update(casts=casts, packed=PackedWeight(layer.weight, layer.bias))
        module.__class__ = replacement
    return changed


def _replacement(module: nn.Module) -> type[nn.Module] | None:
    """Choose the class that does the same, faster; None where there is none."""
    if type(module) is nn.Dropout:
        return _Dropout if 0 < module.p < 1 and not module.inplace else None
    if type(module) is nn.Linear:
        return _FrozenLinear if _packable(module) else None
    if type(module) is LoraLinear:
        return _AdaptedLinear if _plain_lora(module) else None
    return None


def _packable(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or layer.weight.dtype not in _PACKABLE or layer.weight.device.type != "cpu":
        return False
    same = layer.bias is None or layer.bias.dtype == layer.weight.dtype
    return same and not any(parameter.requires_grad for parameter in layer.parameters())


def _plain_lora(module: LoraLinear) -> bool:
    name = module.active_adapters[0] if len(module.active_adapters) == 1 else None
    if name is None or name not in module.lora_A or module.merged or module.disable_adapters:
        return False
    variant = bool(module.use_dora.get(name)) or bool(module.lora_variant.get(name)) or bool(module.lora_bias.get(name))
    dropping = type(module.lora_dropout[name]) in (nn.Identity, nn.Dropout, _Dropout)
    return not variant and dropping and not module.fan_in_fan_out and _packable(module.base_layer)


def _choose_attention(model: nn.Module) -> tuple[Any, str | None]:
    """Switch a model that attends through transformers' interface; (config, what it had), None where it does not."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "config", None)
    looks_back_only = any(getattr(module, "is_causal", False) for module in base.modules())
    if config is None or getattr(config, "_attn_implementation", None) != "sdpa" or looks_back_only:
        return config, None
    config._attn_implementation = ATTENTION
    return config, "sdpa"
