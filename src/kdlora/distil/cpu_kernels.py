"""Steps of a training that PyTorch does slowly on a CPU, and a model's own layers on them while a training runs.

Nothing here changes what is computed: products are in the number format of the weights, as under autocast, softmax is
in fp32, random bits come from PyTorch's own generator, so that a checkpoint of its state brings them back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kdlora.distil.precision import frozen_in_half

ATTENTION = "kdlora_cpu"
_STEPS = 256
_LOWEST = -(2**63)
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
_MOST_PACKED = 2**29
"""Weights of a model that may lie in memory twice while it reads."""
_CACHED = 2**19
"""Scores of one part of an attention."""


def keep_mask(shape: torch.Size, rate: float) -> Tensor:
    """Draw which elements a dropout keeps, by a byte each: a float each takes longer than the product beside it."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(_LOWEST, None)
    first_kept = dropped_steps(rate) - _STEPS // 2
    kept = words.view(torch.int8)[:count].view(shape).clamp_(first_kept - 1, first_kept).sub_(first_kept - 1)
    return kept.neg_()


def masked(values: Tensor, mask: Tensor) -> Tensor:
    bits = _BITS[values.dtype]
    return values.view(bits).bitwise_and(mask.to(bits)).view(values.dtype)


def dropped_steps(rate: float) -> int:
    """Round a dropout rate to 256ths: at least one, as the caller has asked for dropout, and never all."""
    return min(max(round(rate * _STEPS), 1), _STEPS - 1)


def kept_scale(rate: float) -> float:
    """Give the factor that makes the mean of what is kept that of the whole."""
    return _STEPS / (_STEPS - dropped_steps(rate))


class Dropout(Function):
    """Drops elements at random and scales the rest (Srivastava et al., 2014)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rate: float) -> Tensor:
        mask = keep_mask(values.shape, rate)
        ctx.save_for_backward(mask)
        ctx.scale = kept_scale(rate)
        return masked(values, mask).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return masked(gradient, mask).mul_(ctx.scale), None


class _Attention(Function):
    """Goes through the heads in parts whose scores fit the processor's cache; long texts have gigabytes of them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        share = query.new_empty(*query.shape[:3], key.shape[2])
        keep = keep_mask(share.shape, rate) if rate > 0 else None
        bias = None
        if mask is not None:  # the lowest number hides a key: a row without any key then attends to all alike
            hidden = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
            bias = hidden.expand(share.shape)
        mixed = query.new_empty(*query.shape[:3], value.shape[3])
        for part in _parts(share.shape):
            scores = _product(query[part], key[part].transpose(-1, -2), scale)
            if bias is not None:
                scores += bias[part]
            share[part] = torch._softmax(scores, -1, False)
            dropped = share[part] if keep is None else masked(share[part], keep[part])
            mixed[part] = _product(dropped, value[part], 1.0 if keep is None else kept_scale(rate))
        ctx.save_for_backward(query, key, value, share, keep)
        ctx.rate, ctx.scale = rate, scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, share, keep = ctx.saved_tensors
        by_query, by_key, by_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        gradient = gradient.contiguous()
        kept = 1.0 if keep is None else kept_scale(ctx.rate)
        for part in _parts(share.shape):
            dropped = share[part] if keep is None else masked(share[part], keep[part])
            by_value[part] = _product(dropped.transpose(-1, -2), gradient[part], kept)
            by_share = _product(gradient[part], value[part].transpose(-1, -2), kept)
            if keep is not None:
                by_share = masked(by_share, keep[part])
            by_scores = torch._softmax_backward_data(by_share, share[part], -1, by_share.dtype)
            by_query[part] = _product(by_scores, key[part], ctx.scale)
            by_key[part] = _product(by_scores.transpose(-1, -2), query[part], ctx.scale)
        return by_query, by_key, by_value, None, None, None


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Multiply (rows, heads, n, k) by (rows, heads, k, m), times a factor that is applied before the sum is rounded."""
    shape = (*left.shape[:3], right.shape[3])
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=factor).view(shape)


def _parts(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, heads, length, keys) into whole rows of the batch, or into heads of one where a row is too large."""
    batch, heads, size = shape[0], shape[1], shape[2] * shape[3]
    rows = max(1, _CACHED // (heads * size))
    few = heads if rows > 1 else min(heads, max(1, _CACHED // size))
    for row in range(0, batch, rows):
        for head in range(0, heads, few):
            yield slice(row, row + rows), slice(head, head + few)


class _Packed:
    """A frozen linear layer's weight, laid out once as oneDNN wants it for the forward and the backward product."""

    def __init__(self, layer: Any) -> None:
        weight = layer.weight.detach()
        self.weight, self.dtype = weight, weight.dtype
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.forward = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    @cached_property
    def backward(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.t().contiguous(), None)

    def product(self, rows: Tensor) -> Tensor:
        made = torch.ops.mkldnn._linear_pointwise(rows, self.forward, self.bias, "none", [], "")
        return torch.ops.aten._unsafe_view(made, made.shape)  # else a view, which no model may change in place

    def product_of_gradient(self, gradient: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(gradient, self.backward, None, "none", [], "")


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: _Packed) -> Tensor:
        ctx.weight = weight
        return weight.product(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.product_of_gradient(gradient), None


class _AdaptedLinear(Function):
    """A frozen linear layer with its LoRA adapter: `W x + b + scale up down dropout(x)` (Hu et al., eq. 3)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: _Packed, down: Tensor, up: Tensor, scale: float, rate: float) -> Tensor:
        rows, down, up = rows.contiguous(), down.to(rows.dtype), up.to(rows.dtype)
        keep = keep_mask(rows.shape, rate) if rate > 0 else None
        seen = rows if keep is None else masked(rows, keep)
        scale = scale if keep is None else scale * kept_scale(rate)
        hidden = torch.matmul(seen, down.t())
        result = weight.product(rows)
        width = result.shape[-1]
        result.view(-1, width).addmm_(hidden.view(-1, hidden.shape[-1]), up.t(), alpha=scale)
        ctx.save_for_backward(rows, keep, down, up, hidden)
        ctx.weight, ctx.scale = weight, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, keep, down, up, hidden = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        by_up = torch.mm(hidden.view(-1, hidden.shape[-1]).t(), flat).t().float().mul_(ctx.scale)
        by_hidden = torch.mm(flat, up).mul_(ctx.scale)
        seen = rows if keep is None else masked(rows, keep)
        by_down = torch.mm(by_hidden.t(), seen.view(-1, seen.shape[-1])).float()
        by_rows = None
        if ctx.needs_input_grad[0]:
            by_rows = ctx.weight.product_of_gradient(gradient)
            if keep is None:
                by_rows.view(-1, rows.shape[-1]).addmm_(by_hidden, down)
            else:
                by_rows += masked(torch.mm(by_hidden, down).view(rows.shape), keep)
        return by_rows, None, by_down, by_up, None, None


class _DropoutLayer(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in PyTorch
        return Dropout.apply(input, self.p) if self.training else input


class _FrozenLayer(nn.Linear):
    packed: _Packed
    casts: _Casts

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.packed.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):  # under DoRA it is not in half
            return super().forward(input)
        return _FrozenLinear.apply(self.casts.to(input, self.packed.dtype), self.packed)


class _AdaptedLayer(LoraLinear):
    packed: _Packed
    casts: _Casts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (name,) = self.active_adapters
        rate = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        rows, down, up = self.casts.to(x, self.packed.dtype), self.lora_A[name].weight, self.lora_B[name].weight
        return _AdaptedLinear.apply(rows, self.packed, down, up, self.scaling[name], rate)


class _Casts:
    """Remembers the last cast, for query, key and value read the same rows."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, tuple[Any, ...], Tensor] | None = None  # the rows, their state, the cast

    def to(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if rows.dtype == dtype or rows.is_inference():  # inference tensors count no versions
            return rows.to(dtype)
        state = (rows._version, torch.is_grad_enabled(), dtype)
        if self.last is None or self.last[0] is not rows or self.last[1] != state:
            self.last = rows, state, rows.to(dtype)
        return self.last[2]

    def forget(self) -> None:
        self.last = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers asks of an attention implementation; PyTorch's fused kernel for CPUs drops nothing."""
    if (shared := query.shape[1] // key.shape[1]) > 1:  # heads of queries that share keys and values
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    learns_in_half = torch.is_grad_enabled() and value.dtype == torch.bfloat16
    if dropout == 0.0 and not learns_in_half:  # its backward in bf16 can take half of a whole step
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Rotary positions leave queries and keys in fp32 under autocast, beside values in bf16.
        query, key = query.to(value.dtype), key.to(value.dtype)
        mixed = _Attention.apply(query, key, value, attention_mask, dropout, scale)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def fast_on_cpu(model: nn.Module, device: torch.device) -> Iterator[int]:
    """Run frozen linear layers, plain LoRA, dropout and attention on our own kernels; on exit all is as it was."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        yield 0
        return
    casts = _Casts()
    changed = _replace_layers(model, casts)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    looks_back_only = any(getattr(module, "is_causal", False) for module in base.modules())
    ours = base.config._attn_implementation == "sdpa" and not looks_back_only
    if ours:
        base.config._attn_implementation = ATTENTION
    handle = model.register_forward_hook(lambda *_: casts.forget())
    try:
        yield len(changed)
    finally:
        handle.remove()
        if ours:
            base.config._attn_implementation = "sdpa"
        for module, original in changed:
            module.__class__ = original
            vars(module).pop("packed", None)
            vars(module).pop("casts", None)


@contextmanager
def fast_reading(model: nn.Module, precision: str = "fp32", *, exact: nn.Module | None = None) -> Iterator[None]:
    """Let a model that learns nothing meanwhile read on a CPU as a training does, but for a layer that stays `exact`.

    It takes less time. A large model, whose weights would lie in memory twice, is left as it is.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = before[0][0].device
    if device.type != "cpu" or sum(parameter.numel() for parameter, _ in before) > _MOST_PACKED:
        yield
        return
    kept = set() if exact is None else set(exact.parameters())
    for parameter, _ in before:
        parameter.requires_grad_(parameter in kept)
    try:
        with frozen_in_half(model, precision), fast_on_cpu(model, device):
            yield
    finally:
        for parameter, learns in before:
            parameter.requires_grad_(learns)


def _replace_layers(model: nn.Module, casts: _Casts) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give layers of a class that is known exactly one that does the same, faster: no DoRA, no subclass."""
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    done: set[nn.Module] = set()
    replacement: type[nn.Module]
    for module in model.modules():
        if module in done:
            continue
        if type(module) is nn.Dropout and 0 < module.p < 1 and not module.inplace:
            replacement = _DropoutLayer
        elif _packable(module):
            replacement = _FrozenLayer
            vars(module).update(casts=casts, packed=_Packed(module))
        elif type(module) is LoraLinear and not module.lora_variant and _packable(module.base_layer):
            replacement = _AdaptedLayer
            vars(module).update(casts=casts, packed=_Packed(module.base_layer))
            done.update(module.modules())  # the adapted layer itself does their work
        else:
            continue
        changed.append((module, type(module)))
        module.__class__ = replacement
    return changed


def _packable(layer: Any) -> bool:
    if type(layer) is not nn.Linear:
        return False
    if any(parameter.requires_grad or parameter.device.type != "cpu" for parameter in layer.parameters()):
        return False
    # Where bf16 is not supported packing raises; PyTorch's own product only is slow.
    return layer.weight.dtype == torch.float32 or (
        layer.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
