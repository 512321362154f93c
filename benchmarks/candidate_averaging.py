"""A candidate: averaged weights in place of the last ones, over the ends of the last epochs or over all steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdlora.distil.checkpoints import load_trained_tensors, trained_tensors


class LastEpochs(TrainerCallback):
    """Puts the mean of the weights at the ends of the last epochs into the model when the training ends.

    It remembers nothing across an interruption: a training that has it starts anew.

    *Source*: the mean of the last checkpoints, Vaswani et al. (arXiv 1706.03762), section 6.1; SWA (arXiv 1803.05407).
    """

    def __init__(self, count: int) -> None:
        """Collect nothing yet.

        Args:
            count: epochs to take the mean over; where there were fewer, all of them.
        """
        self.count = count
        self.ends: list[dict[str, Tensor]] = []

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Copy the weights of now."""
        self.ends.append({name: value.detach().clone() for name, value in trained_tensors(model).items()})
        del self.ends[: -self.count]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Load the mean."""
        names = self.ends[0].keys()
        load_trained_tensors(model, {name: torch.stack([one[name] for one in self.ends]).mean(0) for name in names})


class MovingAverage(TrainerCallback):
    """Puts the exponential moving average of the weights into the model when the training ends.

    Of step s of n the weight is `decay ** (n - s)`, divided by the sum of all, so that the initial weights, which
    a short training would still remember, do not count. It starts anew after an interruption, as `LastEpochs` does.

    *Source*: Polyak and Juditsky (1992), as in Mean Teacher (arXiv 1703.01780); the division is Adam's (1412.6980).
    """

    def __init__(self, decay: float) -> None:
        """Collect nothing yet.

        Args:
            decay: from 0, the last step's weights alone, to below 1.
        """
        self.decay = decay
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Add the weights of now."""
        self.steps += 1
        for name, value in trained_tensors(model).items():
            total = self.sums.setdefault(name, torch.zeros_like(value, requires_grad=False))
            total.lerp_(value.detach(), 1 - self.decay)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Load the average."""
        weight = 1 - self.decay**self.steps
        load_trained_tensors(model, {name: total / weight for name, total in self.sums.items()})
