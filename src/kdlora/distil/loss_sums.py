"""Running sums of the loss terms that stay on the device: reading them is what costs, not adding."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlora.distil.losses import LossTerms
from kdlora.errors import KdLoraError


class DivergedError(KdLoraError):
    """A loss or a gradient that is not a finite number.

    Attributes:
        step: the optimiser step, from 1; -1 where it is not known.
    """

    def __init__(self, message: str, step: int = -1) -> None:
        """Say what diverged."""
        super().__init__(message)
        self.step = step


_TOTAL, _HARD, _SOFT, _ROWS, _SOFT_ROWS, _HARD_ROWS = range(6)


class LossSums:
    """Sums of loss terms over rows, and the first step at which the loss was not a finite number."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(6, dtype=dtype, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_gradient = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, terms: LossTerms, step: int) -> None:
        """Add the rows of a micro-batch."""
        rows = terms.hard.new_full((), len(terms.hard))
        zero = torch.zeros_like(rows)
        soft, soft_rows = (zero, zero) if terms.soft is None else (terms.soft.sum(), rows)
        hard_rows = rows if terms.labelled is None else terms.labelled.sum().to(rows.dtype)
        added = torch.stack([terms.total.sum(), terms.hard.sum(), soft, rows, soft_rows, hard_rows])
        self.sums += added.to(self.sums.dtype)
        bad = ~torch.isfinite(added[_TOTAL]) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, step, self.bad_step)

    @torch.no_grad()
    def note_gradient(self, norm: Tensor | float, step: int) -> None:
        """Note a gradient that is not finite; the weights are not either once the step is taken."""
        bad = ~torch.isfinite(torch.as_tensor(norm, device=self.sums.device)) & (self.bad_gradient < 0)
        self.bad_gradient = torch.where(bad, step, self.bad_gradient)

    def check(self, learning_rate: float | None = None) -> None:
        """Stop a training that has diverged. Waits for the device."""
        for what, first in (("loss is", self.bad_step), ("gradients are", self.bad_gradient)):
            if (step := int(first)) >= 0:
                numbers = "a finite number" if what == "loss is" else "finite numbers"
                raise DivergedError(diverged(f"the {what} not {numbers} at step {step}", learning_rate), step)

    def means(self) -> dict[str, float]:
        """Give the exact means over the rows so far. Waits for the device."""
        return term_means(self.sums)

    def reset(self) -> None:
        """Start again at zero."""
        self.sums.zero_()


def term_means(sums: Tensor) -> dict[str, float]:
    """Turn sums into means."""
    total, hard, soft, rows, soft_rows, hard_rows = sums.tolist()
    if rows == 0:
        return {}
    means = {"loss": total / rows} | ({"hard_loss": hard / hard_rows} if hard_rows else {})
    return means | ({"soft_loss": soft / soft_rows} if soft_rows else {})


def diverged(what: str, learning_rate: float | None) -> str:
    """Say what to do about a training that has diverged."""
    rate = "" if learning_rate is None else f" (now {learning_rate:g})"
    return (
        f"the training diverged: {what}. Most often the learning rate{rate} is too high; else set run.precision to "
        "fp32, lower max_grad_norm, lengthen the warm-up, or look for labels or teacher logits of huge size"
    )
