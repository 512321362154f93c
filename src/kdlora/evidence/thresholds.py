"""Above which probability a label is said: fitted on labelled rows, for a metric or for a wanted precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlora.errors import DataError
from kdlora.evidence.ranking import ratio

Goal = str | float
"""A metric of one label, or the precision that is wanted with the highest recall."""

_LEAST = 1e-9


@dataclass(frozen=True)
class Threshold:
    """One label's threshold, and what it does on labelled rows."""

    label: str  # its name
    goal: str  # the metric that is highest there, or `precision 0.9`
    threshold: float  # the label is said where its probability is above this
    rows: int  # labelled rows that it is judged on
    positive: int  # of them, those that have the label
    said: int  # those of which the model says it
    right: int  # those of which it says so rightly
    precision: float  # right of said, with its 95% interval (Clopper and Pearson), 0..1
    precision_low: float
    precision_high: float
    recall: float  # right of positive, likewise
    recall_low: float
    recall_high: float
    before: float  # the goal's metric at 0.5
    after: float  # the same at the threshold


@dataclass(frozen=True)
class FittedModel:
    """One file that ships: its thresholds, and the score of its task with and without them, 0..100."""

    name: str
    score_before: float
    score_after: float
    labels: tuple[Threshold, ...]


@dataclass(frozen=True)
class Thresholds:
    """What `kdlora thresholds` found."""

    rows: int  # validation rows that the thresholds were fitted on
    judged: int  # rows that the figures are of
    source: str  # where these come from; "validation" where there are no others, so that the figures are too good
    models: tuple[FittedModel, ...]  # what ships
    notes: tuple[str, ...] = ()  # labels that keep 0.5, and what else is to be known


class NoThresholdError(DataError):
    """No threshold does what is wanted; the message says how near one comes."""


def _f1(right: Any, said: Any, positive: int, rows: int) -> Any:
    return ratio(2 * right, said + positive)


def _macro_f1(right: Any, said: Any, positive: int, rows: int) -> Any:
    absent = _absent(right, said, positive, rows)
    return (_f1(right, said, positive, rows) + _f1(absent, rows - said, rows - positive, rows)) / 2


def _accuracy(right: Any, said: Any, positive: int, rows: int) -> Any:
    return (right + _absent(right, said, positive, rows)) / rows


def _balanced_accuracy(right: Any, said: Any, positive: int, rows: int) -> Any:
    return (ratio(right, positive) + ratio(_absent(right, said, positive, rows), rows - positive)) / 2


def _matthews(right: Any, said: Any, positive: int, rows: int) -> Any:
    below = np.sqrt(np.asarray(said, dtype=np.float64) * positive * (rows - said) * (rows - positive))
    above = np.asarray(right, dtype=np.float64) * rows - np.asarray(said, dtype=np.float64) * positive
    return ratio(above, below)


def _absent(right: Any, said: Any, positive: int, rows: int) -> Any:
    """Count the rows that rightly do not get the label."""
    return rows - said - positive + right


METRICS: dict[str, Callable[[Any, Any, int, int], Any]] = {
    "f1": _f1,
    "macro_f1": _macro_f1,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "matthews": _matthews,
}
"""Of one label, from the rows that get it rightly, that get it, that have it, and all; `macro_f1`: of yes and no."""


def log_odds(logits: np.ndarray, kind: str, column: int, temperature: float = 1.0) -> np.ndarray:
    """Give the logarithm of the odds of a label: of a multi-label model, or of one with two labels."""
    values = logits.astype(np.float64) / temperature
    return np.asarray(values[:, column] if kind == "multi-label" else values[:, column] - values[:, 1 - column])


def shift_logits(
    logits: np.ndarray, names: Sequence[str], thresholds: Mapping[str, float], temperature: float = 1.0
) -> np.ndarray:
    """Move logits so that the usual decision, the largest one or each above 0, is the one by thresholds."""
    offsets = np.zeros(logits.shape[1])
    for name, threshold in thresholds.items():
        offsets[list(names).index(name)] = temperature * np.log(threshold / (1 - threshold))
    return np.asarray(logits - offsets) if thresholds else logits


def fit_threshold(odds: np.ndarray, labels: np.ndarray, goal: Goal) -> float:
    """Find the probability above which a label is to be said; 0.5 where that is as good as any.

    A wanted precision is kept with one wrong row more than was seen, for rows at the edge promise little.
    """
    positive, rows = int(labels.sum()), len(labels)
    if positive in (0, rows):
        raise NoThresholdError(
            f"{'all' if positive else 'none'} of {rows} rows have the label, so nothing can be fitted"
        )
    order = np.argsort(-odds, kind="stable")
    last = np.append(np.diff(odds[order]) != 0, True)  # rows of the same odds go together
    edges, right, said = odds[order][last], np.cumsum(labels[order])[last], np.arange(1, rows + 1)[last]
    below = np.append(edges[1:], edges[-1] - 1.0)
    cuts = np.where((below <= 0) & (edges > 0), 0.0, (edges + below) / 2)
    if isinstance(goal, str):
        values = METRICS[goal](right, said, positive, rows)
        best = np.flatnonzero(values >= values.max() - 1e-12)
        place = best[np.argmin(np.abs(cuts[best]))]
    else:
        careful = right / (said + 1)
        place = int(np.argmax(np.where(careful >= goal, right, -1)))
        if careful[place] < goal:
            raise NoThresholdError(
                f"no threshold reaches a precision of {goal:g} on {rows} rows, {positive} of which have it; with one "
                f"wrong row more than was seen, the highest is {careful.max():.3f}. Want less, or give more rows"
            )
    return float(np.clip(1 / (1 + np.exp(-cuts[place])), _LEAST, 1 - _LEAST))


def judge_threshold(label: str, goal: Goal, threshold: float, odds: np.ndarray, labels: np.ndarray) -> Threshold:
    def count(at: float) -> tuple[int, int]:
        chosen = odds > np.log(at / (1 - at))
        return int((chosen & (labels == 1)).sum()), int(chosen.sum())

    (right, said), positive, rows = count(threshold), int(labels.sum()), len(labels)
    metric = METRICS.get(str(goal), lambda right, said, *_: ratio(right, said))
    precision, recall = _share(right, said), _share(right, positive)
    told = goal if isinstance(goal, str) else f"precision {goal:g}"
    values = [float(metric(*found, positive, rows)) for found in (count(0.5), (right, said))]
    return Threshold(label, told, threshold, rows, positive, said, right, *precision, *recall, *values)


def _share(part: int, whole: int) -> tuple[float, float, float]:
    """Give a share and its exact 95% interval. *Source*: Clopper and Pearson, Biometrika 26(4), 1934."""
    from scipy.stats import beta  # here: whoever only predicts does without it

    low = float(beta.ppf(0.025, part, whole - part + 1)) if part else 0.0
    high = float(beta.ppf(0.975, part + 1, whole - part)) if part < whole else 1.0
    return (part / whole if whole else 0.0), low, high
