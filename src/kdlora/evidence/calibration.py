"""Probabilities from logits, and how far they can be believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, softmax

from kdlora.evidence.metrics import predict_labels

if TYPE_CHECKING:
    from kdlora.data.tasks import Task


def probabilities(task: Task, logits: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities.

    Args:
        task: single-label or multi-label.
        logits: (rows, labels).

    Returns:
        float64 (rows, labels): softmax over the labels, or a sigmoid for each.

    Raises:
        ValueError: a regression task.
    """
    if task.kind == "regression":
        raise ValueError("a regression task has no probabilities")
    values = np.asarray(logits, dtype=np.float64)
    return np.asarray(expit(values) if task.kind == "multi-label" else softmax(values, axis=1))


@dataclass(frozen=True)
class Reliability:
    """How often decisions of a given confidence are right.

    Attributes:
        confidence: mean confidence of each bin that is not empty.
        accuracy: share of right decisions in it.
        count: decisions in it.
        error: expected calibration error, 0 to 1: the mean of |accuracy - confidence|, weighted by count.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]
    error: float


def reliability(task: Task, logits: np.ndarray, labels: np.ndarray, *, bins: int = 10) -> Reliability:
    """Bin decisions by confidence, in bins of equal width from 0 to 1.

    Confidence is the largest probability (single-label), or that of the decision on each label (multi-label).
    *Source*: Guo et al., On Calibration of Modern Neural Networks, eq. 3.

    Args:
        task: single-label or multi-label.
        logits: (rows, labels).
        labels: int (rows,), or 0/1 (rows, labels).
        bins: number of bins.

    Returns:
        The bins that are not empty, and the expected calibration error.
    """
    chances = probabilities(task, logits)
    decided = predict_labels(task, logits)
    if task.kind == "multi-label":
        confidence = np.where(decided == 1, chances, 1 - chances).ravel()
        right = (decided == labels).ravel()
    else:
        confidence, right = chances.max(axis=1), decided == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = count > 0
    mean_confidence = np.bincount(place, confidence, bins)[filled] / count[filled]
    accuracy = np.bincount(place, right, bins)[filled] / count[filled]
    error = float(np.sum(count[filled] * np.abs(accuracy - mean_confidence)) / count.sum())
    return Reliability(tuple(mean_confidence.tolist()), tuple(accuracy.tolist()), tuple(count[filled].tolist()), error)
