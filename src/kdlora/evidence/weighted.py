"""Metrics of resampled examples, in closed form from how often each example was drawn.

Every function takes counts (draws, examples) and gives the metric of each draw, equal to the metric of the
drawn examples written out one by one. The degenerate cases are those of `metrics.compute_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kdlora.evidence.metrics import predict_labels

if TYPE_CHECKING:
    from kdlora.data.tasks import Task

Weighted = Callable[[np.ndarray], np.ndarray]


def weighted_metric(task: Task, name: str, outputs: np.ndarray, targets: np.ndarray) -> Weighted:
    """Prepare one metric of one model."""
    decided = predict_labels(task, outputs)
    if task.kind == "regression":
        return _regression(name, decided, targets)
    if task.kind == "multi-label":
        return _multi_label(name, decided, targets)
    return _single_label(name, decided, targets, len(task.label_names))


def _single_label(name: str, decided: np.ndarray, targets: np.ndarray, classes: int) -> Weighted:
    """Accuracy, F1 and Matthews from counts of hits, predictions and labels of each class."""
    if name in ("accuracy", "micro_f1"):
        return _mean_of(decided == targets)
    if name == "f1" and classes == 2:
        return _pooled_f1(decided[:, None], targets[:, None])
    if name not in ("macro_f1", "matthews"):
        raise ValueError(f"the metric {name!r} is not defined for a single-label task with {classes} labels")
    predicted = _one_hot(decided, classes)
    wanted = _one_hot(targets, classes)
    if name == "macro_f1":
        return _macro_f1(predicted, wanted, occurring_only=True)
    hits = (decided == targets).astype(np.float64)

    def matthews(counts: np.ndarray) -> np.ndarray:
        total = counts.sum(axis=1)
        said, true = counts @ predicted, counts @ wanted
        above = (counts @ hits) * total - (said * true).sum(axis=1)
        below = (total**2 - (said**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1))
        return _ratio(above, np.sqrt(below))

    return matthews


def _multi_label(name: str, decided: np.ndarray, targets: np.ndarray) -> Weighted:
    """F1 over cells or labels, and the share of rows that are right in every label."""
    if name == "micro_f1":
        return _pooled_f1(decided, targets)
    if name == "macro_f1":
        return _macro_f1(decided.astype(np.float64), targets.astype(np.float64), occurring_only=False)
    if name == "subset_accuracy":
        return _mean_of((decided == targets).all(axis=1))
    raise ValueError(f"the metric {name!r} is not defined for a multi-label task")


def _regression(name: str, decided: np.ndarray, targets: np.ndarray) -> Weighted:
    """Errors and correlations."""
    if name == "mse":
        return _mean_of((decided - targets) ** 2)
    if name == "mae":
        return _mean_of(np.abs(decided - targets))
    if name == "pearson":
        return _pearson(decided, targets)
    if name == "spearman":
        return _spearman(decided, targets)
    raise ValueError(f"the metric {name!r} is not defined for a regression task")


def _mean_of(values: np.ndarray) -> Weighted:
    """Mean over the drawn examples."""
    column = values.astype(np.float64)
    return lambda counts: (counts @ column) / counts.sum(axis=1)


def _pooled_f1(decided: np.ndarray, targets: np.ndarray) -> Weighted:
    """F1 over all cells of the given columns."""
    hits = (decided * targets).sum(axis=1).astype(np.float64)
    marked = (decided + targets).sum(axis=1).astype(np.float64)
    return lambda counts: _ratio(2.0 * (counts @ hits), counts @ marked)


def _macro_f1(predicted: np.ndarray, wanted: np.ndarray, *, occurring_only: bool) -> Weighted:
    """Mean of each column's F1, over all columns or over those that occur in the draw."""
    hits = predicted * wanted
    marked = predicted + wanted

    def measure(counts: np.ndarray) -> np.ndarray:
        seen = counts @ marked
        scores = _ratio(2.0 * (counts @ hits), seen)
        if not occurring_only:
            return np.asarray(scores.mean(axis=1))
        return np.asarray(scores.sum(axis=1) / (seen > 0).sum(axis=1))

    return measure


def _pearson(decided: np.ndarray, targets: np.ndarray) -> Weighted:
    """Pearson from weighted moments; centred first, because sums of squares of raw values lose digits."""
    first, second = _standardise(decided), _standardise(targets)
    columns = np.stack([first, second, first * first, second * second, first * second], axis=1)

    def measure(counts: np.ndarray) -> np.ndarray:
        moments = (counts @ columns) / counts.sum(axis=1, keepdims=True)
        mean_first, mean_second, square_first, square_second, product = moments.T
        return _correlation(
            product - mean_first * mean_second,
            square_first - mean_first**2,
            square_second - mean_second**2,
        )

    return measure


def _spearman(decided: np.ndarray, targets: np.ndarray) -> Weighted:
    """Pearson of the average ranks among the drawn examples, ties included."""
    first, second = _Ranks(decided), _Ranks(targets)

    def measure(counts: np.ndarray) -> np.ndarray:
        one, other = first.centred(counts), second.centred(counts)
        product = np.einsum("de,de,de->d", counts, one, other)
        square_one = np.einsum("de,de,de->d", counts, one, one)
        square_other = np.einsum("de,de,de->d", counts, other, other)
        return _correlation(product, square_one, square_other)

    return measure


class _Ranks:
    """Average ranks of one column under any counts, from a single sort."""

    def __init__(self, values: np.ndarray) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        starts = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        self.starts = np.flatnonzero(starts)
        self.group = np.empty(len(values), dtype=np.int64)
        self.group[self.order] = np.cumsum(starts) - 1

    def centred(self, counts: np.ndarray) -> np.ndarray:
        """Give each example's average rank in each draw, less the mean rank."""
        tied = np.add.reduceat(counts[:, self.order], self.starts, axis=1)
        last = np.cumsum(tied, axis=1)
        # Tied examples share the mean of the places from last - tied + 1 to last.
        ranks = last - (tied - 1) / 2 - (last[:, -1:] + 1) / 2
        return np.take(ranks, self.group, axis=1)


def _standardise(values: np.ndarray) -> np.ndarray:
    """Centre and scale; a correlation does not change by it."""
    centred = values - values.mean()
    spread = np.abs(centred).max()
    return centred / spread if spread > 1e-13 * np.abs(values).max() else np.zeros_like(centred)


def _correlation(product: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Divide a covariance by two variances; 0 where either vanishes up to rounding."""
    valid = (first > 1e-14) & (second > 1e-14)
    below = np.sqrt(np.where(valid, first * second, 1.0))
    return np.where(valid, np.clip(product / below, -1.0, 1.0), 0.0)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide, with 0 where there is nothing to divide by."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), 0.0)


def _one_hot(values: np.ndarray, classes: int) -> np.ndarray:
    """Write label indices as 0/1 columns."""
    return np.eye(classes)[values]
