"""Probabilities from logits, and how far they can be believed. Light: numpy alone, since every prediction needs it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 10
"""Bins of confidence, of equal width from 0 to 1."""


def probabilities(logits: np.ndarray, kind: str, temperature: float = 1.0) -> np.ndarray:
    """Turn logits into probabilities: softmax, or one sigmoid a label for multi-label.

    *Source*: Guo et al., "On Calibration of Modern Neural Networks", eq. 9.
    """
    scaled = logits.astype(np.float64) / temperature
    if kind == "multi-label":
        # Two forms of one function, each where its exponential cannot overflow.
        small = np.exp(-np.abs(scaled))
        return np.asarray(np.where(scaled >= 0, 1 / (1 + small), small / (1 + small)))
    if kind != "single-label":
        raise ValueError(f"a {kind} task has no probabilities")
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


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
    count = np.bincount(place, minlength=BINS)
    filled = count > 0
    mean_confidence = np.bincount(place, confidence, BINS)[filled] / count[filled]
    accuracy = np.bincount(place, right, BINS)[filled] / count[filled]
    error = float(np.sum(count[filled] * np.abs(accuracy - mean_confidence)) / count.sum())
    return Reliability(tuple(mean_confidence.tolist()), tuple(accuracy.tolist()), tuple(count[filled].tolist()), error)
