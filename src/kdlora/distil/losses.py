"""Losses as pure tensor functions, a value a row, the sums that give their exact means; standardised targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdlora.config import Kind
from kdlora.data.tasks import Task
from kdlora.data.windows import Pool
from kdlora.distil.precision import evaluating
from kdlora.errors import ConfigError, DataError, KdLoraError, ModelError

SOFT_LOSSES = ("kl", "mse")


@dataclass(frozen=True)
class LossTerms:
    """The loss of every row, `total = alpha * hard + (1 - alpha) * soft`; `hard` is 0 where it is not `labelled`."""

    total: Tensor
    hard: Tensor
    soft: Tensor | None  # None without a teacher: `total` is `hard`
    labelled: Tensor | None = None  # None where all rows are


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    *,
    kind: Kind,
    alpha: float = 0.5,
    temperature: float = 2.0,
    loss: str = "kl",
    labelled: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> LossTerms:
    """Weigh the loss against the labels and the loss against the teacher.

    A row without label has the teacher's term alone, with the weight that it has everywhere: the loss of a batch is
    `(alpha * sum of hard over the labelled rows + (1 - alpha) * sum of soft over all rows) / rows`.

    Class weights multiply the hard loss of a row (for multi-label, of a label that the row has) and nothing else. The
    mean is over rows, not over weights. The teacher's term counts every row alike.

    For regression the soft loss is always the squared error against the teacher's value: a single number has no
    distribution to soften.

    Args:
        logits: (rows, labels) of the student, any float type; the loss is computed in float32 at least.
        labels: (rows,) class indices; (rows,) values for regression; (rows, labels) of 0 and 1 for multi-label. A row
            of tokens is a word, whose label may be -100 where it is not `labelled`.
        teacher_logits: (rows, labels), columns in the student's order; None trains on the labels alone.
        kind: kind of the task.
        alpha: weight of the hard loss, 0 to 1.
        temperature: softening of both distributions, finite and above 0; used by `kl` alone.
        loss: `kl` or `mse` (Kim et al., arXiv 2105.08919).
        labelled: (rows,) bool, false where the label only fills its place; None: every row has one.
        class_weights: (labels,) factors above 0; None: all alike. A regression has none.

    Returns:
        The terms, each (rows,).

    Raises:
        ConfigError: alpha, temperature, kind or the loss's name is out of range, or a regression has class weights.
        ModelError: student and teacher logits differ in shape.
        DataError: labels whose shape does not fit the logits.

    *Source*: KD-LoRA (arXiv 2410.20777), eq. 3.

    Examples:
        >>> student, teacher = torch.zeros(4, 2), torch.tensor([[2.0, -2.0]]).expand(4, 2)
        >>> terms = distillation_loss(student, torch.tensor([0, 0, 1, 0]), teacher, kind="single-label")
        >>> terms.total.shape
        torch.Size([4])
    """
    _check_settings(kind, alpha, loss, class_weights)
    # Half types lose the small differences that a softened distribution teaches by.
    student = logits if logits.dtype == torch.float64 else logits.float()
    hard = _hard_loss(kind, student, labels, class_weights)
    if labelled is not None:
        hard = torch.where(labelled, hard, torch.zeros_like(hard))
    if teacher_logits is None:
        return LossTerms(total=hard, hard=hard, soft=None, labelled=labelled)
    soft = _soft_loss(kind, student, teacher_logits, loss, temperature)
    return LossTerms(total=alpha * hard + (1.0 - alpha) * soft, hard=hard, soft=soft, labelled=labelled)


def _check_settings(kind: Kind, alpha: float, loss: str, class_weights: Tensor | None) -> None:
    if kind not in get_args(Kind):
        raise ConfigError(f"kind is one of {', '.join(get_args(Kind))}; got {kind!r}")
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"distil.alpha is the weight of the hard loss and lies in 0 to 1; got {alpha!r}")
    if loss not in SOFT_LOSSES:
        raise ConfigError(f"distil.loss is one of {', '.join(SOFT_LOSSES)}; got {loss!r}")
    if class_weights is not None and kind == "regression":
        raise ConfigError("train.class_weights: a regression has no classes; leave it out")


def _soft_loss(kind: Kind, student: Tensor, teacher: Tensor, loss: str, temperature: float) -> Tensor:
    if kind == "regression":
        student, teacher = student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)
    if student.shape != teacher.shape:
        # Broadcasting would teach every row the same, without a word.
        raise ModelError(
            f"student logits of shape {tuple(student.shape)} and teacher logits of shape "
            f"{tuple(teacher.shape)} differ; expected the same rows and the same labels in both"
        )
    teacher = teacher.detach().to(device=student.device, dtype=student.dtype)
    if loss == "mse" or kind == "regression":
        return (student - teacher).square().mean(dim=-1)
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ConfigError(f"distil.temperature must be finite and above 0; got {temperature!r}")
    return (binary_kl if kind == "multi-label" else softened_kl)(student, teacher, float(temperature))


def pool_windows(logits: Tensor, texts: Tensor, rows: int, pool: Pool) -> Tensor:
    """Make one row for each text of the logits of its windows; `texts` says which text a window is of."""
    pooled, how = logits.new_zeros((rows, logits.shape[1])), "mean" if pool == "mean" else "amax"
    return pooled.scatter_reduce(0, texts[:, None].expand_as(logits), logits, how, include_self=False)


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Measure KL(teacher || student), times T² by which softening divides gradients (arXiv 1503.02531, section 2)."""
    log_student = functional.log_softmax(student / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1) * temperature**2


def binary_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Measure the KL of the softened yes and no of each label, which do not compete as under a softmax, times T²."""
    student, teacher = student / temperature, teacher / temperature
    yes = torch.sigmoid(teacher) * (functional.logsigmoid(teacher) - functional.logsigmoid(student))
    no = torch.sigmoid(-teacher) * (functional.logsigmoid(-teacher) - functional.logsigmoid(-student))
    return (yes + no).mean(dim=-1) * temperature**2


def _hard_loss(kind: Kind, outputs: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    weights = None if weights is None else weights.to(outputs)
    rows = len(outputs)
    fits = {
        "regression": outputs.numel() == labels.numel() == rows,
        "multi-label": outputs.shape == labels.shape,
    }
    if not fits.get(kind, outputs.dim() == 2 and labels.shape == outputs.shape[:1]):
        raise DataError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(outputs.shape)} "
            f"in a {kind} task; expected {'(rows, labels)' if kind == 'multi-label' else '(rows,)'}"
        )
    if kind in ("single-label", "tokens"):
        return functional.cross_entropy(outputs, labels, weight=weights, reduction="none")
    targets = labels.to(outputs.dtype)
    if kind == "regression":
        return (outputs.reshape(-1) - targets.reshape(-1)).square()
    losses = functional.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weights, reduction="none")
    return losses.mean(dim=-1)


class DivergedError(KdLoraError):
    """A loss or a gradient that is not a finite number, at an optimiser step from 1; -1 where it is not known."""

    def __init__(self, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.step = step


class LossSums:
    """Sums of loss terms over rows, on the device: reading them is what costs, not adding."""

    def __init__(self, device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # Apple's has no float64
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, terms: LossTerms, step: int) -> None:
        rows = terms.hard.new_full((), len(terms.hard))
        zero = torch.zeros_like(rows)
        soft, soft_rows = (zero, zero) if terms.soft is None else (terms.soft.sum(), rows)
        hard_rows = rows if terms.labelled is None else terms.labelled.sum().to(rows.dtype)
        added = torch.stack([terms.total.sum(), terms.hard.sum(), soft, rows, soft_rows, hard_rows])
        added = added.to(self.sums.device).to(self.sums.dtype)
        self.sums += added
        self.note(added[0], step)

    @torch.no_grad()
    def note(self, value: Tensor | float, step: int) -> None:
        """Note the first step at which a loss, or the norm of its gradients, is not finite."""
        bad = ~torch.isfinite(torch.as_tensor(value, device=self.sums.device)) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)

    def check(self, learning_rate: float) -> None:
        """Stop a training that has diverged. Waits for the device."""
        if (step := int(self.first_bad)) >= 0:
            told = f"the loss or its gradients are not finite numbers at step {step}"
            raise DivergedError(diverged(told, learning_rate), step)


def term_means(sums: Tensor) -> dict[str, float]:
    """Turn sums into the exact means over their own rows. Waits for the device."""
    total, hard, soft, rows, soft_rows, hard_rows = sums.tolist()
    means = {"loss": (total, rows), "hard_loss": (hard, hard_rows), "soft_loss": (soft, soft_rows)}
    return {name: value / count for name, (value, count) in means.items() if count}


def diverged(what: str, learning_rate: float) -> str:
    return (
        f"the training diverged: {what}. Most often the learning rate (now {learning_rate:g}) is too high; else set "
        "run.precision to fp32, lower max_grad_norm, lengthen the warm-up, or look for labels or teacher logits of "
        "huge size"
    )


@dataclass(frozen=True)
class TargetScale:
    """How targets are brought to mean 0 and deviation 1: a fresh head would take most of a training to reach 2,000."""

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

    def restore(self, values: Any) -> Any:
        return values * self.std + self.mean


@torch.no_grad()
def fold_into_head(model: nn.Module, scale: TargetScale) -> None:
    """Change the last layer so that the model predicts on the original scale, with no code around it."""
    if (head := last_linear(model, 1)) is not None:
        weight, bias = head.weight.clone(), head.bias.clone()
        expected = scale.restore(_probe(model))
        head.weight.mul_(scale.std)
        head.bias.copy_(scale.restore(bias))
        if np.allclose(_probe(model), expected, rtol=1e-3, atol=1e-3 * (scale.std + abs(scale.mean))):
            return
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    raise ModelError(
        f"{type(model).__name__}: expected a head whose last layer is linear, has one output and a bias, and gives the "
        "prediction; kdlora cannot bring this model's regression back to the original scale. Choose another encoder"
    )


@torch.no_grad()
def start_at_shares(model: nn.Module, task: Task, labels: np.ndarray, weights: Tensor | None = None) -> None:
    """Begin a fresh head at the labels' shares, by its bias, or rare ones are learnt late (arXiv 1708.02002, 3.3)."""
    if task.kind == "multi-label":
        having = labels.sum(axis=0)
        odds = (1.0 + having) / (1.0 + len(labels) - having)
    else:
        odds = 1.0 + np.bincount(labels, minlength=task.num_labels)
    bias = np.log(odds if weights is None else odds * weights.numpy())
    if (head := last_linear(model, task.num_labels)) is not None:
        head.bias.copy_(torch.from_numpy(bias if task.kind == "multi-label" else bias - bias.mean()))


def last_linear(model: nn.Module, outputs: int, *, biased: bool = True) -> nn.Linear | None:
    """Find the layer that gives the prediction, if it has a bias; of one that PEFT keeps twice, the copy in use."""
    # RoBERTa's kind names its head before the encoder, a layer of which may have as many outputs.
    whole = getattr(model, "get_base_model", lambda: model)()  # without PEFT's names
    body = getattr(whole, str(getattr(whole, "base_model_prefix", "")), None)
    inner = {id(module) for module in body.modules()} if isinstance(body, nn.Module) else set()
    found = [
        module
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and id(module) not in inner
        if {"original_module", "lora_A", "lora_B"}.isdisjoint(name.split("."))
    ]
    return found[-1] if found and not (biased and found[-1].bias is None) else None


def _probe(model: nn.Module) -> np.ndarray:
    device = next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]], device=device)
    with evaluating(model):
        logits: np.ndarray = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu().numpy()
    return logits
