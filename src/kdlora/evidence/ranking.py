"""Metrics of a label by how sure a model is of it: average precision, and recall at a precision. Light: numpy alone.

As all metrics, they are prepared for one model and take counts (draws, examples).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kdlora.data.tasks import Task

Weighted = Callable[[np.ndarray], np.ndarray]
"""From counts (draws, examples) to a figure of each draw."""

Curve = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From counts to the rows above each threshold, from the surest down: those that have the label, and all."""


def curve_of(task: Task, column: int, outputs: np.ndarray, targets: np.ndarray) -> Curve:
    """Prepare the curve of one label; rows of equal sureness stand together."""
    has_label = targets == column if task.kind == "single-label" else targets[:, column]
    sureness = _sureness(task, column, outputs.astype(np.float64))
    order = np.argsort(-sureness, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(sureness[order]), -1.0))
    marks = has_label[order].astype(np.float64)

    def measure(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ordered = counts[:, order]
        return np.cumsum(ordered * marks, axis=1)[:, ends], np.cumsum(ordered, axis=1)[:, ends]

    return measure


def _sureness(task: Task, column: int, logits: np.ndarray) -> np.ndarray:
    """Give the log-odds of a label, which order rows as probabilities do; what differs by rounding alone is equal."""
    if task.kind == "multi-label":
        return logits[:, column]
    others = np.delete(logits, column, axis=1)
    top = others.max(axis=1)
    return np.round(logits[:, column] - top - np.log(np.exp(others - top[:, None]).sum(axis=1)), 9)


def mean_precision(curves: Sequence[Curve]) -> Weighted:
    """Average precision, each threshold's precision weighted by the recall it adds; mean over the labels that occur."""

    def measure(counts: np.ndarray) -> np.ndarray:
        found, occurring = np.zeros(len(counts)), np.zeros(len(counts))
        for curve in curves:
            hits, said = curve(counts)
            gained = np.diff(hits, axis=1, prepend=0.0)
            found += ratio((gained * ratio(hits, said)).sum(axis=1), hits[:, -1])
            occurring += hits[:, -1] > 0
        return ratio(found, occurring)

    return measure


def recall_at(precision: float, curve: Curve) -> Weighted:
    """Give the largest recall of all thresholds that hold a precision; 0 where none does."""

    def measure(counts: np.ndarray) -> np.ndarray:
        hits, said = curve(counts)
        return ratio(np.where(ratio(hits, said) >= precision, hits, 0.0).max(axis=1), hits[:, -1])

    return measure


def ratio(above: Any, below: Any) -> np.ndarray:
    """Divide, with 0 where there is nothing to divide by."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), 0.0)
