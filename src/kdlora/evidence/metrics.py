"""The metrics of every kind of task, and the score that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from kdlora.errors import ArtifactError

if TYPE_CHECKING:
    from kdlora.data.tasks import Task


def compute_metrics(
    task: Task, logits: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None = None
) -> dict[str, float]:
    """Compare a model's outputs with the labels.

    Decisions: the first of the largest logits (single-label), logit > 0 (multi-label), the value itself
    (regression). Degenerate cases are defined: a constant prediction or label gives Matthews, Pearson and
    Spearman 0; F1 without any positive is 0; macro F1 of single-label tasks is the mean over the classes that
    occur among labels or predictions, that of multi-label tasks the mean over all labels.
    """
    outputs, targets = check_arrays(task, logits, labels)
    if groups is None:
        return _metrics_of(task, outputs, targets)
    if len(groups) != len(outputs):
        raise ValueError(f"expected {len(outputs)} groups, got {len(groups)}")
    members = np.asarray(groups)
    names = list(dict.fromkeys(groups))
    parts = {name: _metrics_of(task, outputs[members == name], targets[members == name]) for name in names}
    result = {metric: float(np.mean([part[metric] for part in parts.values()])) for metric in parts[names[0]]}
    for name, part in parts.items():
        result |= {f"{metric}_{name}": value for metric, value in part.items()}
    return result


def score(task: Task, metrics: dict[str, float]) -> float:
    """Condense a task's metrics into its main figure."""
    missing = [name for name in task.metrics if name not in metrics]
    if missing or not task.metrics:
        raise ValueError(f"expected the metrics {list(task.metrics)}, found {sorted(metrics)}")
    return 100.0 * float(np.mean([metrics[name] for name in task.metrics]))


def metric_names(task: Task) -> tuple[str, ...]:
    """List the metrics that are computed for a task: its score metrics, then those of its kind."""
    always: tuple[str, ...]
    if task.kind == "regression":
        always = ("pearson", "spearman", "mse", "mae")
    elif task.kind == "multi-label":
        always = ("micro_f1", "macro_f1", "subset_accuracy")
    else:
        always = ("accuracy", "f1" if len(task.label_names) == 2 else "macro_f1")
    return tuple(dict.fromkeys((*task.metrics, *always)))


def predict_labels(task: Task, logits: np.ndarray) -> np.ndarray:
    """Decide from logits."""
    if task.kind == "regression":
        return np.asarray(logits, dtype=np.float64).reshape(len(logits), -1)[:, 0]
    if task.kind == "multi-label":
        return (np.asarray(logits) > 0).astype(np.int64)
    return np.argmax(logits, axis=1).astype(np.int64)


def check_arrays(task: Task, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Refuse outputs and labels that no metric can be computed from."""
    outputs = np.asarray(logits)
    if task.kind == "regression" and outputs.ndim == 1:
        outputs = outputs[:, None]
    width = 1 if task.kind == "regression" else len(task.label_names)
    if outputs.ndim != 2 or outputs.shape[1] != width or len(outputs) == 0:
        raise ValueError(f"expected logits of shape (rows > 0, {width}), got {np.shape(logits)}")
    _refuse_non_finite(outputs, "logits", "The training diverged: lower the learning rate, or use fp32 or bf16.")
    targets = np.asarray(labels)
    wanted = outputs.shape if task.kind == "multi-label" else (len(outputs),)
    if targets.shape != wanted:
        raise ValueError(f"expected labels of shape {wanted}, got {targets.shape}")
    _refuse_non_finite(targets, "labels", "Remove the rows without a label, or give them one.")
    if task.kind == "regression":
        return outputs, targets.astype(np.float64)
    top = 1 if task.kind == "multi-label" else width - 1
    if not np.isin(targets, np.arange(top + 1)).all():
        wrong = targets[~np.isin(targets, np.arange(top + 1))].flat[0]
        raise ValueError(f"expected labels from 0 to {top}, got {wrong}")
    return outputs, targets.astype(np.int64)


def _refuse_non_finite(values: np.ndarray, what: str, remedy: str) -> None:
    """Name the first row that holds NaN or an infinity."""
    bad = ~np.isfinite(values.astype(np.float64))
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ArtifactError(f"expected finite {what}, got {values[row]} in row {row}. {remedy}")


def _metrics_of(task: Task, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Compute every metric of one set of rows."""
    decided = predict_labels(task, outputs)
    result = {}
    for name in metric_names(task):
        measure = _MEASURES.get((task.kind, name))
        if measure is None or (name == "f1" and len(task.label_names) != 2):
            raise ValueError(f"the metric {name!r} is not defined for this {task.kind} task")
        result[name] = float(measure(targets, decided))
    return result


def _matthews(targets: np.ndarray, decided: np.ndarray) -> float:
    """Matthews correlation; 0 where labels or predictions are constant."""
    if np.ptp(targets) == 0 or np.ptp(decided) == 0:
        return 0.0
    return float(sk.matthews_corrcoef(targets, decided))


def _pearson(targets: np.ndarray, decided: np.ndarray) -> float:
    """Pearson correlation; 0 where labels or predictions are constant."""
    first = decided - decided.mean()
    second = targets - targets.mean()
    # A spread below the rounding of the values themselves is no spread.
    if _is_constant(decided, first) or _is_constant(targets, second):
        return 0.0
    first = first / np.abs(first).max()
    second = second / np.abs(second).max()
    return float(np.clip(first @ second / np.sqrt((first @ first) * (second @ second)), -1.0, 1.0))


def _is_constant(values: np.ndarray, centred: np.ndarray) -> bool:
    """Say whether values differ by no more than rounding."""
    return bool(np.abs(centred).max() <= 1e-13 * np.abs(values).max())


def _spearman(targets: np.ndarray, decided: np.ndarray) -> float:
    """Spearman correlation: Pearson of the average ranks."""
    return _pearson(stats.rankdata(targets), stats.rankdata(decided))


def _binary_f1(targets: np.ndarray, decided: np.ndarray) -> float:
    """F1 of label index 1; 0 where nothing is positive."""
    return float(sk.f1_score(targets, decided, pos_label=1, average="binary", zero_division=0))


def _f1(average: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """Make an averaged F1."""
    return lambda targets, decided: float(sk.f1_score(targets, decided, average=average, zero_division=0))


def _multi_label_micro_f1(targets: np.ndarray, decided: np.ndarray) -> float:
    """F1 over all cells; scikit-learn would read a single label column as a binary task and give accuracy."""
    marked = int(targets.sum() + decided.sum())
    return 2.0 * int((targets * decided).sum()) / marked if marked else 0.0


def _multi_label_macro_f1(targets: np.ndarray, decided: np.ndarray) -> float:
    """Mean over the labels of each label's F1."""
    marked = targets.sum(axis=0) + decided.sum(axis=0)
    return float(np.mean(2.0 * (targets * decided).sum(axis=0) / np.maximum(marked, 1)))


_MEASURES: dict[tuple[str, str], Callable[[np.ndarray, np.ndarray], float]] = {
    ("single-label", "accuracy"): lambda targets, decided: float(np.mean(targets == decided)),
    ("single-label", "f1"): _binary_f1,
    ("single-label", "macro_f1"): _f1("macro"),
    ("single-label", "micro_f1"): _f1("micro"),
    ("single-label", "matthews"): _matthews,
    ("regression", "pearson"): _pearson,
    ("regression", "spearman"): _spearman,
    ("regression", "mse"): lambda targets, decided: float(np.mean((targets - decided) ** 2)),
    ("regression", "mae"): lambda targets, decided: float(np.mean(np.abs(targets - decided))),
    ("multi-label", "micro_f1"): _multi_label_micro_f1,
    ("multi-label", "macro_f1"): _multi_label_macro_f1,
    ("multi-label", "subset_accuracy"): lambda targets, decided: float(np.mean((targets == decided).all(axis=1))),
}
