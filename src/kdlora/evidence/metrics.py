"""The metrics of every kind of task, and the score that they add up to. Light: numpy alone, for every prediction.

A metric is prepared for one model and takes counts (draws, examples), how often a draw took each example: so a
bootstrap needs no rows written out. On the rows as they are, every count is 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlora.data.tags import decode
from kdlora.errors import ArtifactError
from kdlora.evidence.ranking import (
    Weighted,
    counts_from_logits,
    curve_of,
    mean_precision,
    ratio,
    recall_at,
    weighted_entities,
)

if TYPE_CHECKING:
    from kdlora.data.tasks import Task

BINS = 10
"""Bins of confidence, of equal width from 0 to 1."""
_SHIFTS = [round(0.05 * step, 2) for step in range(-80, 81)]
"""Log-odds that may be the threshold of all labels: probabilities of 0.02 to 0.98."""
_FEW_CLASSES = 64
"""Up to so many a matrix product sums by class faster than counting does."""


def compute_metrics(
    task: Task,
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | None = None,
    offsets: np.ndarray | None = None,
) -> dict[str, float]:
    """Compare a model's outputs with the labels.

    Decisions: the first of the largest logits (single-label), logit > 0 (multi-label), the value itself
    (regression). Degenerate cases are defined: a constant prediction or label gives Matthews, Pearson and
    Spearman 0; F1 without any positive is 0; macro F1 of single-label tasks is the mean over the classes that
    occur among labels or predictions, that of multi-label tasks the mean over all labels. Average precision is that of
    the second label (two classes), else the mean over the labels that occur; `cost` is 1 less the mean cost, as a share
    of the largest; recall at a precision that no threshold reaches is 0. For tokens logits and labels are those of
    words, and `offsets` say where each row's begin; entities are strict IOB2, macro F1 over the types that occur.
    """
    outputs, targets = check_arrays(task, logits, labels, offsets)

    def of(rows: Any) -> dict[str, float]:
        parts, once = (outputs[rows], targets[rows]), np.ones((1, len(outputs[rows])))
        return {name: float(weighted_metric(task, name, *parts)(once)[0]) for name in metric_names(task)}

    if groups is None:
        return of(slice(None))
    members = np.asarray(groups)
    parts = {group: of(members == group) for group in dict.fromkeys(groups)}
    result = {name: float(np.mean([part[name] for part in parts.values()])) for name in metric_names(task)}
    return result | {f"{name}_{group}": value for group, part in parts.items() for name, value in part.items()}


def score(task: Task, metrics: dict[str, float]) -> float:
    missing = [name for name in task.metrics if name not in metrics]
    if missing or not task.metrics:
        raise ValueError(f"expected the metrics {list(task.metrics)}, found {sorted(metrics)}")
    return 100.0 * float(np.mean([metrics[name] for name in task.metrics]))


def fit_shift(task: Task, logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Find above which logit a label of several is to be said, one for all labels, and the score on these rows by it.

    Of equals it is the nearest to 0, the usual one, which other tasks keep. F1 is highest below a probability of 0.5
    (Lipton et al., arXiv 1402.1892).
    """
    if task.kind != "multi-label":
        return 0.0, score(task, compute_metrics(task, logits, labels))
    outputs, targets = check_arrays(task, logits, labels)
    once, found = np.ones((1, len(outputs))), []
    for shift in sorted(_SHIFTS, key=abs):
        values = [weighted_metric(task, metric, outputs - shift, targets)(once)[0] for metric in task.metrics]
        found.append((100 * float(np.mean(values)), shift))
    best, shift = max(found, key=lambda one: round(one[0], 9))  # of equals the first
    return shift, best


def metric_names(task: Task) -> tuple[str, ...]:
    of_types = (f"{what}:{kind}" for kind in task.label_types for what in ("precision", "recall", "f1"))
    always: dict[str, tuple[str, ...]] = {
        "single-label": ("accuracy", "f1" if len(task.label_names) == 2 else "macro_f1"),
        "multi-label": ("micro_f1", "macro_f1", "subset_accuracy"),
        "regression": ("pearson", "spearman", "mse", "mae"),
        "tokens": ("entity_f1", "entity_precision", "entity_recall", "macro_entity_f1", *of_types),
    }
    return tuple(dict.fromkeys((*task.metrics, *always[task.kind])))


def predict_labels(task: Task, logits: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """Decide from logits; those of words by `offsets`, which say where each row's begin."""
    if task.kind == "tokens":
        return decode(logits, np.asarray(offsets))
    if task.kind == "regression":
        return np.asarray(logits, dtype=np.float64).reshape(len(logits), -1)[:, 0]
    if task.kind == "multi-label":
        return (np.asarray(logits) > 0).astype(np.int64)
    return np.argmax(logits, axis=1).astype(np.int64)


def check_arrays(
    task: Task, logits: np.ndarray, labels: np.ndarray, offsets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Refuse outputs and labels that no metric can be computed from; give a row an example.

    For tokens both are the example's entities by type: those right, predicted and wanted.
    """
    outputs = np.asarray(logits)
    if task.kind == "tokens":
        counts = counts_from_logits(task.label_names, outputs, np.asarray(labels), offsets)
        return counts, counts
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
    if (wrong := targets[~np.isin(targets, np.arange(top + 1))]).size:
        raise ValueError(f"expected labels from 0 to {top}, got {wrong.flat[0]}")
    return outputs, targets.astype(np.int64)


def _refuse_non_finite(values: np.ndarray, what: str, remedy: str) -> None:
    bad = ~np.isfinite(values.astype(np.float64))
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ArtifactError(f"expected finite {what}, got {values[row]} in row {row}. {remedy}")


def weighted_metric(task: Task, name: str, outputs: np.ndarray, targets: np.ndarray) -> Weighted:
    if task.kind == "tokens":
        return weighted_entities(name, outputs, task.label_types)
    decided, classes = predict_labels(task, outputs), len(task.label_names)
    base, _, label = name.partition(":")
    if label and base != "cost":
        return _of_label(task, base, task.label_names.index(label), outputs, targets)
    match task.kind, base:
        case "single-label", "accuracy" | "micro_f1":
            return _mean_of(decided == targets)
        case "single-label", "f1" | "average_precision" if classes == 2:
            return _of_label(task, base, 1, outputs, targets)
        case "single-label", "macro_f1":
            said, wanted = _by_class(decided, classes), _by_class(targets, classes)
            hits = _by_class(targets, classes, 2.0 * (decided == targets))
            return _mean_ratio(hits, lambda counts: said(counts) + wanted(counts))
        case "single-label", "matthews":
            return _matthews(1.0 * (decided == targets), _by_class(decided, classes), _by_class(targets, classes))
        case "single-label", "balanced_accuracy":
            hits = _by_class(targets, classes, 1.0 * (decided == targets))
            return _mean_ratio(hits, _by_class(targets, classes))
        case "single-label", "cost":
            costs = np.asarray(json.loads(label))
            return _mean_of(1 - costs[targets, decided] / (costs.max() or 1.0))
        case "single-label" | "multi-label", "average_precision":
            return mean_precision([curve_of(task, column, outputs, targets) for column in range(classes)])
        case "multi-label", "micro_f1" | "macro_f1":
            return _f1(decided, targets, pooled=base == "micro_f1")
        case "multi-label", "subset_accuracy":
            return _mean_of((decided == targets).all(axis=1))
        case "regression", "mse":
            return _mean_of((decided - targets) ** 2)
        case "regression", "mae":
            return _mean_of(np.abs(decided - targets))
        case "regression", "pearson":
            return _correlation(_values(decided), _values(targets))
        case "regression", "spearman":
            return _correlation(_ranks(decided), _ranks(targets))
        case "regression", "r2":
            return _r2(decided, targets)
    raise ValueError(f"the metric {name!r} is not defined for a {task.kind} task with {classes} labels")


def _mean_of(values: np.ndarray) -> Weighted:
    column = values.astype(np.float64)
    return lambda counts: (counts @ column) / counts.sum(axis=1)


def _f1(decided: np.ndarray, targets: np.ndarray, *, pooled: bool) -> Weighted:
    """F1 of columns of 0 and 1: of all together, or its mean over them."""
    both, either = 2.0 * decided * targets, 1.0 * decided + targets
    if pooled:
        both, either = both.sum(axis=1, keepdims=True), either.sum(axis=1, keepdims=True)
    return lambda counts: ratio(counts @ both, counts @ either).mean(axis=1)


def _by_class(values: np.ndarray, classes: int, worth: np.ndarray | float = 1.0) -> Weighted:
    """Sum counts, times what an example is worth, by class; for many classes without a matrix of rows by classes."""
    if classes > _FEW_CLASSES:
        return lambda counts: np.stack([np.bincount(values, one * worth, classes) for one in counts])
    marks = np.eye(classes)[values] * np.reshape(worth, (-1, 1))
    return lambda counts: np.asarray(counts @ marks)


def _mean_ratio(above: Weighted, below: Weighted) -> Weighted:
    """Mean of the columns' ratios of sums, over those that have something below."""

    def measure(counts: np.ndarray) -> np.ndarray:
        seen = below(counts)
        return np.asarray(ratio(above(counts), seen).sum(axis=1) / (seen > 0).sum(axis=1))

    return measure


def _of_label(task: Task, base: str, column: int, outputs: np.ndarray, targets: np.ndarray) -> Weighted:
    if base == "f1":
        both = (predict_labels(task, outputs), targets)
        said, wanted = (one == column if task.kind == "single-label" else one[:, column] for one in both)
        return _f1(said[:, None], wanted[:, None], pooled=False)
    curve = curve_of(task, column, outputs, targets)
    if base == "average_precision":
        return mean_precision([curve])
    return recall_at(float(base.removeprefix("recall@")), curve)


def _matthews(right: np.ndarray, predicted: Weighted, wanted: Weighted) -> Weighted:
    def measure(counts: np.ndarray) -> np.ndarray:
        hits, total, said, true = counts @ right, counts.sum(axis=1), predicted(counts), wanted(counts)
        below = (total**2 - (said**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1))
        return ratio(hits * total - (said * true).sum(axis=1), np.sqrt(below))

    return measure


def _r2(decided: np.ndarray, targets: np.ndarray) -> Weighted:
    """Share of the labels' variance that the predictions explain; 0 where the labels of a draw are constant."""
    centred = targets - targets.mean()
    error, mean, square = map(_mean_of, ((targets - decided) ** 2, centred, centred**2))
    least = 1e-14 * np.square(centred).max()

    def measure(counts: np.ndarray) -> np.ndarray:
        variance = square(counts) - mean(counts) ** 2
        valid = variance > least
        return np.where(valid, 1 - error(counts) / np.where(valid, variance, 1.0), 0.0)

    return measure


def _correlation(first: Weighted, second: Weighted) -> Weighted:
    """Correlate columns that are centred for each draw; 0 where one is constant up to rounding."""

    def measure(counts: np.ndarray) -> np.ndarray:
        one, other = first(counts), second(counts)
        pairs = ((one, other), (one, one), (other, other))
        product, *squares = (np.einsum("de,de,de->d", counts, *pair) for pair in pairs)
        valid = np.min(squares, axis=0) > 1e-14 * counts.sum(axis=1)
        below = np.sqrt(np.where(valid, squares[0] * squares[1], 1.0))
        return np.where(valid, np.clip(product / below, -1.0, 1.0), 0.0)

    return measure


def _values(values: np.ndarray) -> Weighted:
    """Give each example's value less the mean of the draw, scaled; a spread below the values' rounding is none."""
    centred = values - values.mean()
    spread = np.abs(centred).max()
    scaled = centred / spread if spread > 1e-13 * np.abs(values).max() else np.zeros_like(centred)
    mean = _mean_of(scaled)
    return lambda counts: scaled - mean(counts)[:, None]


def _ranks(values: np.ndarray) -> Weighted:
    """Give each example's average rank in the draw less their mean; tied ones share the mean of their places."""
    order = np.argsort(values, kind="stable")
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes

    def centred(counts: np.ndarray) -> np.ndarray:
        tied = np.add.reduceat(counts[:, order], starts, axis=1)
        last = np.cumsum(tied, axis=1)
        return np.asarray((last - (tied - 1) / 2 - (last[:, -1:] + 1) / 2)[:, group])

    return centred


def probabilities(logits: np.ndarray, kind: str, temperature: float = 1.0) -> np.ndarray:
    """Turn logits into probabilities: softmax, or one sigmoid a label for multi-label.

    *Source*: Guo et al., "On Calibration of Modern Neural Networks", eq. 9.
    """
    scaled = logits.astype(np.float64) / temperature
    if kind == "multi-label":
        # Two forms of one function, each where its exponential cannot overflow.
        small = np.exp(-np.abs(scaled))
        return np.asarray(np.where(scaled >= 0, 1 / (1 + small), small / (1 + small)))
    if kind not in ("single-label", "tokens"):
        raise ValueError(f"a {kind} task has no probabilities")
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Reliability:
    """How often decisions of a given confidence are right, by bins of confidence that are not empty."""

    confidence: np.ndarray  # mean of each bin
    accuracy: np.ndarray  # share of right decisions in it
    count: np.ndarray  # decisions in it
    error: float  # expected calibration error, 0 to 1: mean of |accuracy - confidence|, weighted by count


def reliability(table: np.ndarray, labels: np.ndarray, kind: str) -> Reliability:
    """Bin decisions by confidence, in ten bins of equal width from 0 to 1.

    Confidence is the largest probability (single-label), or that of the decision on each label (multi-label).
    *Source*: Guo et al., "On Calibration of Modern Neural Networks", eq. 3.
    """
    if kind == "multi-label":
        cells = table.ravel()
        confidence, right = np.maximum(cells, 1 - cells), (cells > 0.5) == (np.asarray(labels).ravel() == 1)
    else:
        confidence, right = table.max(axis=1), table.argmax(axis=1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    _, place, count = np.unique(place, return_inverse=True, return_counts=True)
    mean_confidence, accuracy = np.bincount(place, confidence) / count, np.bincount(place, right) / count
    error = float(np.sum(count * np.abs(accuracy - mean_confidence)) / count.sum())
    return Reliability(mean_confidence, accuracy, count, error)
