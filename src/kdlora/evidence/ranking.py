"""Metrics from counts: of a label by how sure a model is of it, and of spans, by row and type. Light: numpy alone.

As all metrics, they are prepared for one model and take counts (draws, examples).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlora.data.tags import Integers, decode, entity_bounds, tag_types
from kdlora.errors import ArtifactError

if TYPE_CHECKING:
    from kdlora.data.tasks import Task

Weighted = Callable[[np.ndarray], np.ndarray]
"""From counts (draws, examples) to a figure of each draw."""

Curve = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From counts to the rows above each threshold, from the surest down: those that have the label, and all."""


def curve_of(task: Task, column: int, outputs: np.ndarray, targets: np.ndarray) -> Curve:
    """Prepare the curve of one label; rows of equal sureness stand together."""
    has_label = targets == column if task.kind == "single-label" else targets[:, column]
    logits = outputs.astype(np.float64)
    sureness = logits[:, column]
    if task.kind != "multi-label":  # the log-odds, which order rows as probabilities do
        others = np.delete(logits, column, axis=1)
        top = others.max(axis=1)
        odds = sureness - top - np.log(np.exp(others - top[:, None]).sum(axis=1))
        sureness = np.round(odds, 9)  # what differs by rounding alone is equal
    order = np.argsort(-sureness, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(sureness[order]), -1.0))
    marks = has_label[order].astype(np.float64)

    def measure(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ordered = counts[:, order]
        return np.cumsum(ordered * marks, axis=1)[:, ends], np.cumsum(ordered, axis=1)[:, ends]

    return measure


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


def counts_from_logits(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray, offsets: np.ndarray | None
) -> Integers:
    """Count the entities of each row and type: (rows, types, 3), of right, predicted and wanted ones.

    Strict: an entity is right where its first word, its last word and its type are. Words without a label (-100) are
    left out of both. A word that has no logits was not seen: see `decode`.
    """
    words = np.zeros(1, np.int64) if offsets is None else np.asarray(offsets, np.int64)
    if logits.shape != (words[-1], len(names)) or labels.shape != (words[-1],):
        raise ValueError(f"expected {words[-1]} words x {len(names)} labels, got {logits.shape} and {labels.shape}")
    unseen = np.isnan(logits).all(axis=1)
    if unseen.all() or not np.isfinite(logits[~unseen]).all():
        raise ArtifactError(
            "expected finite logits, got nan or inf. The training diverged: lower the learning rate, or use fp32 "
            "or bf16."
        )
    kept = labels >= 0
    edges = np.concatenate(([0], np.cumsum(kept)))[words]
    found = []
    for tags in (decode(logits, words)[kept], labels[kept]):
        starts, ends = entity_bounds(tags, edges)
        found.append(np.stack([starts, ends, (tags[starts] - 1) // 2], axis=1))
    ends_of = np.full((int(kept.sum()), 2), -1)
    ends_of[found[0][:, 0]] = found[0][:, 1:]
    right = found[1][(ends_of[found[1][:, 0]] == found[1][:, 1:]).all(axis=1)]
    counts = np.zeros((len(words) - 1, len(tag_types(names)), 3), np.int64)
    for column, entities in enumerate((right, *found)):
        rows = np.searchsorted(edges, entities[:, 0], side="right") - 1
        np.add.at(counts, (rows, entities[:, 2], column), 1)
    return counts


def entity_rates(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give precision, recall and F1 of summed counts (..., 3); 0 where there is nothing to divide by."""
    right, predicted, wanted = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    return ratio(right, predicted), ratio(right, wanted), ratio(2 * right, predicted + wanted)


def weighted_entities(name: str, counts: Integers, types: Sequence[str]) -> Weighted:
    """Prepare a metric of spans: of all entities, the mean over the types that occur in a draw, or of one type."""
    base, _, of = name.partition(":")
    place = {"precision": 0, "recall": 1, "f1": 2}[base.removeprefix("macro_").removeprefix("entity_")]
    if of:
        counts = counts[:, [types.index(of)]]
    elif not base.startswith("macro_"):
        counts = counts.sum(axis=1, keepdims=True)
    columns, (rows, width, _) = counts.astype(np.float64), counts.shape

    def measure(draws: np.ndarray) -> np.ndarray:
        sums = (draws @ columns.reshape(rows, -1)).reshape(-1, width, 3)
        return ratio(entity_rates(sums)[place].sum(axis=1), (sums[..., 1:].sum(axis=2) > 0).sum(axis=1))

    return measure
