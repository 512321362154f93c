"""Steps of a training that PyTorch does slowly on a CPU, as functions of tensors with their own backward.

Nothing here changes what is computed: products are in the number format of the weights, as under autocast, softmax is
in fp32, random bits come from PyTorch's own generator, so that a checkpoint of its state brings them back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_STEPS = 256
_LOWEST = -(2**63)


def keep_bytes(shape: torch.Size, rate: float) -> Tensor:
    """Draw which elements a dropout keeps, eight at a time.

    `torch.bernoulli` draws a float per element, which takes longer than the matrix product beside it. A byte per
    element rounds the rate to 1/256.

    Args:
        shape: of the tensor that is dropped from.
        rate: probability of dropping, in [0, 1).

    Returns:
        bool, of that shape; True keeps.
    """
    count = math.prod(shape)
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(_LOWEST, None)
    return words.view(torch.uint8)[:count].view(shape) >= dropped_steps(rate)


def dropped_steps(rate: float) -> int:
    """Round a dropout rate to 256ths: at least one, as the caller has asked for dropout, and never all.

    Args:
        rate: probability of dropping, in [0, 1).
    """
    return min(max(round(rate * _STEPS), 1), _STEPS - 1)


def kept_scale(rate: float) -> float:
    """Give the factor that makes the mean of what is kept that of the whole.

    Args:
        rate: probability of dropping, as given to `keep_bytes`.
    """
    return _STEPS / (_STEPS - dropped_steps(rate))


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rate: float) -> Tensor:
        factor = keep_bytes(values.shape, rate).to(values.dtype).mul_(kept_scale(rate))
        ctx.save_for_backward(factor)
        return values * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


def dropout(values: Tensor, rate: float) -> Tensor:
    """Drop elements at random and scale the rest (Srivastava et al., 2014).

    Args:
        values: any shape.
        rate: probability of dropping, in [0, 1), rounded to 1/256; 0 gives `values` back.
    """
    return _Dropout.apply(values, rate) if rate > 0 else values


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, scale: float
    ) -> Tensor:
        shape, width = query.shape, key.shape[-2]
        rows = shape[0] * shape[1]
        query, key, value = (part.reshape(rows, part.shape[-2], part.shape[-1]) for part in (query, key, value))
        scores = torch.bmm(query, key.transpose(1, 2))
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores.view(shape[0], shape[1], shape[2], width).masked_fill_(~mask, lowest)
        share = torch.softmax(scores.float().mul_(scale), -1).to(value.dtype)
        del scores
        keep = keep_bytes(share.shape, rate) if rate > 0 else None
        dropped = share if keep is None else (share * keep).mul_(kept_scale(rate))
        ctx.save_for_backward(query, key, value, share, keep)
        ctx.rate, ctx.scale, ctx.shape = rate, scale, shape
        return torch.bmm(dropped, value).view(*shape[:3], value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, share, keep = ctx.saved_tensors
        gradient = gradient.reshape(share.shape[0], -1, value.shape[-1])
        dropped = share if keep is None else (share * keep).mul_(kept_scale(ctx.rate))
        by_value = torch.bmm(dropped.transpose(1, 2), gradient)
        by_share = torch.bmm(gradient, value.transpose(1, 2))
        if keep is not None:
            by_share = by_share.mul_(keep).mul_(kept_scale(ctx.rate))
        by_scores = torch._softmax_backward_data(by_share.float(), share.float(), -1, torch.float32)
        by_scores = by_scores.mul_(ctx.scale).to(query.dtype)
        by_query = torch.bmm(by_scores, key)
        by_key = torch.bmm(by_scores.transpose(1, 2), query)
        heads = ctx.shape[:2]
        query, key, value = (part.view(*heads, *part.shape[1:]) for part in (by_query, by_key, by_value))
        return query, key, value, None, None, None


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, scale: float
) -> Tensor:
    """Compute scaled dot-product attention with dropout on the shares (Vaswani et al., 2017, eq. 1).

    PyTorch's fused kernel for CPUs knows no dropout, and its fallback draws a float per share and keeps two copies.

    Args:
        query: shape (batch, heads, length, width).
        key: shape (batch, heads, keys, width).
        value: shape (batch, heads, keys, width).
        mask: bool, broadcastable to (batch, heads, length, keys), True attends; None attends to all.
        dropout: probability of dropping a share, in [0, 1).
        scale: factor of the products, usually 1/sqrt(width).

    Returns:
        Shape (batch, heads, length, width).
    """
    return _Attention.apply(query, key, value, mask, dropout, scale)


class PackedWeight:
    """A frozen linear layer's weight, laid out once as oneDNN wants it for the forward and the backward product.

    Attributes:
        forward: packed weight, or the weight itself where oneDNN is missing.
        backward: the same of its transpose.
        bias: shape (outputs,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack.

        Args:
            weight: shape (outputs, inputs), in the number format of the products; not changed while this is used.
            bias: shape (outputs,), in the same format.
        """
        self.dtype = weight.dtype
        self.bias = None if bias is None else bias.detach()
        self.forward = _pack(weight.detach())
        self.backward = _pack(weight.detach().t().contiguous())

    def product(self, rows: Tensor) -> Tensor:
        """Compute `rows @ weight.T + bias`.

        Args:
            rows: shape (..., inputs), in the weight's format.
        """
        return _multiply(rows, self.forward, self.bias)

    def product_of_gradient(self, gradient: Tensor) -> Tensor:
        """Compute `gradient @ weight`.

        Args:
            gradient: shape (..., outputs), in the weight's format.
        """
        return _multiply(gradient, self.backward, None)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.product_of_gradient(gradient), None


def frozen_linear(rows: Tensor, weight: PackedWeight) -> Tensor:
    """Apply a linear layer whose weights take no gradient.

    Args:
        rows: shape (..., inputs), in the weight's format.
        weight: packed.

    Returns:
        Shape (..., outputs).
    """
    return _FrozenLinear.apply(rows, weight)


class _AdaptedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: PackedWeight, down: Tensor, up: Tensor, scale: float, rate: float
    ) -> Tensor:
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        keep = keep_bytes(rows.shape, rate) if rate > 0 else None
        seen = rows if keep is None else rows * keep
        scale = scale if keep is None else scale * kept_scale(rate)
        hidden = torch.matmul(seen, down.t())
        result = weight.product(rows)
        width = result.shape[-1]
        # alpha scales the adapter within the product, so that no copy of it is made.
        result.view(-1, width).addmm_(hidden.view(-1, hidden.shape[-1]), up.t(), alpha=scale)
        ctx.save_for_backward(rows, keep, down, up, hidden)
        ctx.weight, ctx.scale = weight, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, keep, down, up, hidden = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        by_up = torch.mm(flat.t(), hidden.view(-1, hidden.shape[-1])).float().mul_(ctx.scale)
        by_hidden = torch.mm(flat, up).mul_(ctx.scale)
        seen = rows if keep is None else rows * keep
        by_down = torch.mm(by_hidden.t(), seen.view(-1, seen.shape[-1])).float()
        by_rows = None
        if ctx.needs_input_grad[0]:
            by_rows = ctx.weight.product_of_gradient(gradient)
            through = torch.mm(by_hidden, down).view(rows.shape)
            by_rows += through if keep is None else through.mul_(keep)
        return by_rows, None, by_down, by_up, None, None


def adapted_linear(
    rows: Tensor, weight: PackedWeight, down: Tensor, up: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """Apply a frozen linear layer with its LoRA adapter: `W x + b + scale up down dropout(x)` (Hu et al., 2021, eq. 3).

    Args:
        rows: shape (..., inputs), in the weight's format.
        weight: packed.
        down: LoRA's A, shape (rank, inputs), fp32.
        up: LoRA's B, shape (outputs, rank), fp32.
        scale: alpha over rank, or rsLoRA's.
        dropout: probability of dropping an input of the adapter, in [0, 1).

    Returns:
        Shape (..., outputs).
    """
    return _AdaptedLinear.apply(rows, weight, down, up, scale, dropout)
