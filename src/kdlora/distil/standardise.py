"""Regression on standardised targets, and the way back to the user's scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdlora.errors import ModelError


@dataclass(frozen=True)
class TargetScale:
    """How targets are brought to mean 0 and standard deviation 1.

    A fresh head starts near 0: targets such as 2,000 ± 300 would take it most of the training to reach.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, labels: npt.NDArray[np.floating]) -> TargetScale:
        """Measure training labels; equal labels are only shifted."""
        values = np.asarray(labels, dtype=np.float64)
        std = float(values.std())
        return cls(mean=float(values.mean()), std=std if std > 0.0 else 1.0)

    def standardise(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std

    def restore(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values * self.std + self.mean, dtype=values.dtype)


@torch.no_grad()
def fold_into_head(model: nn.Module, scale: TargetScale) -> None:
    """Change the last layer so that the model predicts on the original scale, with no code around it."""
    head = _last_linear(model)
    weight, bias = head.weight.clone(), head.bias.clone()
    before = _probe(model)
    head.weight.mul_(scale.std)
    head.bias.copy_(bias * scale.std + scale.mean)
    expected = scale.restore(before)
    if not np.allclose(_probe(model), expected, rtol=1e-3, atol=1e-3 * (scale.std + abs(scale.mean))):
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        raise ModelError(
            f"{type(model).__name__}: expected the last linear layer to give the prediction, but something follows it; "
            "kdlora cannot bring this model's regression back to the original scale. Choose another encoder"
        )


def _last_linear(model: nn.Module) -> nn.Linear:
    """Find the layer that gives the prediction; of a module that PEFT keeps twice, the copy in use."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and "original_module" not in name.split(".")
    ]
    if not found or found[-1].bias is None:
        raise ModelError(
            f"{type(model).__name__}: expected a head that ends in a linear layer with one output and a bias; "
            "kdlora cannot train a regression on this model. Choose another encoder"
        )
    return found[-1]


def _probe(model: nn.Module) -> np.ndarray:
    """Predict for a few made-up inputs."""
    device = next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]], device=device)
    training = model.training
    model.eval()
    try:
        logits: np.ndarray = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu().numpy()
    finally:
        model.train(training)
    return logits
