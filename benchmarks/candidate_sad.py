"""A candidate: adapters that begin, and are held, in the directions in which full fine-tuning moves (SAD-LoRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from candidate_terms import with_loss
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ROWS = 1024
"""Training texts that the covariances are measured on."""
SHRINKAGE = 0.1
"""How far a covariance is moved towards a multiple of the identity; the paper says only that it is shrunk."""
_PREFIX = "base_model.model."


def spectral_basis(change: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Find the directions of the output in which a change of weights does most to the inputs that there are.

    Args:
        change: (outputs, inputs), fine-tuned minus pretrained weights.
        covariance: (inputs, inputs) of the layer's inputs.
        rank: number of directions.

    Returns:
        (outputs, rank), orthonormal: the left singular vectors of `change @ covariance ** 0.5`, largest first.

    *Source*: SAD-LoRA (arXiv 2607.04306).
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    left: Tensor = torch.linalg.svd(change.double() @ root, full_matrices=False)[0]
    return left[:, :rank].to(change.dtype)


def alignment_loss(up: Tensor, basis: Tensor) -> Tensor:
    """Measure how far the column space of an adapter's B is from the basis: 0 the same, 1 at right angles.

    Args:
        up: (outputs, rank), of full column rank.
        basis: (outputs, rank), orthonormal.

    Returns:
        A scalar, `1 - |Qᵀ basis|² / rank` with Q of the QR decomposition of B, in float32.
    """
    own = torch.linalg.qr(up.float())[0]
    return 1 - (own.T @ basis.float()).square().sum() / basis.shape[1]


def shrunk_covariance(total: Tensor, products: Tensor, count: int) -> Tensor:
    """Give the covariance of vectors, moved by `SHRINKAGE` towards its mean variance times the identity.

    Args:
        total: (inputs,) sum of the vectors.
        products: (inputs, inputs) sum of their outer products.
        count: number of vectors.
    """
    mean = total / count
    plain = products / count - torch.outer(mean, mean)
    even = torch.eye(len(mean), dtype=plain.dtype) * plain.trace() / len(mean)
    return (1 - SHRINKAGE) * plain + SHRINKAGE * even


@torch.no_grad()
def input_covariances(
    model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Measure the inputs of linear layers over all tokens of some texts.

    Args:
        model: without adapters, in evaluation mode.
        names: of the layers.
        batches: what the model takes, with `attention_mask`.

    Returns:
        (inputs, inputs) float64 by name.
    """
    sums: dict[str, list[Any]] = {}

    def note(name: str, mask: Tensor, rows: Tensor) -> None:
        tokens = rows[mask] if rows.dim() == 3 else rows  # a pooler reads one vector of each text
        tokens = tokens.double()
        found = (tokens.sum(0), tokens.T @ tokens, len(tokens))
        sums[name] = [old + new for old, new in zip(sums.get(name, (0, 0, 0)), found, strict=True)]

    for batch in batches:
        mask = batch["attention_mask"].bool()
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _module, inputs, name=name, mask=mask: note(name, mask, inputs[0])
            )
            for name in names
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    return {name: shrunk_covariance(*found) for name, found in sums.items()}


class SpectralAlignment(TrainerCallback):
    """Starts every adapter at B = its layer's basis and A = 0, and adds the alignment to a training's loss."""

    def __init__(self, bases: Mapping[str, Tensor], weight: float) -> None:
        """Prepare.

        Args:
            bases: from `spectral_basis`, by the layer's name in the plain model.
            weight: of the mean over the layers.
        """
        self.bases = bases
        self.weight = weight
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Set the adapters, and take hold of the model."""
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                basis = self.bases[name.removeprefix(_PREFIX)]
                up: Any = module.lora_B["default"].weight
                down: Any = module.lora_A["default"].weight
                up.data.copy_(basis)
                down.data.zero_()
                self.layers.append((up, basis))
        self.handle = model.register_forward_hook(self._add)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of the model."""
        if self.handle is not None:
            self.handle.remove()

    def _add(self, model: nn.Module, _inputs: Any, output: Any) -> Any:
        if model.training:
            terms = [alignment_loss(up, basis) for up, basis in self.layers]
            output.logits = with_loss(output.logits, self.weight * torch.stack(terms).mean())
        return output
