"""Which answers may be acted on: how sure a model is, the error rate that can be promised, thresholds of labels.

A threshold is promised by a test on rows that chose nothing else. The wrong ones among the answered are binomial; "more
than `error` of the answers are wrong" is rejected where so few wrong ones would be too unlikely. Thresholds are tested
in an order that other rows fixed, from the one that looks safest there to those that answer more. The first one that is
not rejected ends the sequence. Where that is the very first, a second sequence begins at about half as many answers.
The two share the allowed risk, so the promise holds with the stated confidence for whichever threshold is chosen.

*Source*: Angelopoulos et al., "Learn then Test", Annals of Applied Statistics 19(2), 2025, section 3 (fixed sequence);
for answers and their error rate, Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NIPS 2017.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from kdlora.errors import ConfigError, DataError, did_you_mean
from kdlora.evidence.metrics import probabilities, weighted_metric
from kdlora.evidence.ranking import ratio

if TYPE_CHECKING:
    from kdlora.data.tasks import Task

Sureness = Literal["probability", "margin", "energy"]
SURENESS: tuple[Sureness, ...] = get_args(Sureness)

EVERYTHING = -sys.float_info.max
"""The threshold that answers every text; a number, so that JSON can hold it."""

POINTS = np.arange(1, 101) / 100
"""Coverages at which a curve is kept."""

_COVERAGES = np.arange(1, 201) / 200
_MOST_ROWS = 10_000_000
_RISKS = (0.95, 0.05)
"""Shares of the allowed risk: for the sequence from the favoured threshold on, and for the one from half as many on."""

Goal = str | float
"""A metric of one label, or the precision that is wanted with the highest recall."""

_LEAST = 1e-15


@dataclass(frozen=True)
class Promise:
    """An error rate that holds for the answered texts, with a stated confidence."""

    error: float  # the share of wrong answers that is not exceeded, 0..1
    confidence: float  # how sure that is, 0..1, over the draw of the rows that it was tested on
    sureness: Sureness  # what is compared with the threshold
    threshold: float  # a text is answered where its sureness is at least this
    rows: int  # labelled rows of the test
    answered: int  # of them, those at or above the threshold
    wrong: int  # of the answered, the wrong ones

    def __post_init__(self) -> None:
        if not 0 <= self.wrong <= self.answered <= self.rows or not self.rows:
            raise ValueError(f"{self.wrong} wrong of {self.answered} answered of {self.rows} rows cannot be")

    @property
    def coverage(self) -> float:
        """The share of the rows that is answered, 0..1."""
        return self.answered / self.rows


@dataclass(frozen=True)
class Unknown:
    """What one kind of sureness does with texts of no known class."""

    sureness: Sureness  # what is compared with a threshold
    told_apart: float  # how often a known text is surer than an unknown one, 0..1 (the area under the ROC curve)
    coverage: float | None = None  # share of the known texts that is answered at the promised threshold
    deferred: float | None = None  # share of the unknown texts that is not answered there


@dataclass(frozen=True)
class Deferring:
    """How one model does where it may defer."""

    name: str  # the model: what ships and its exports, the teacher, or an arm of the experiment
    area: float  # mean error rate over all coverages, 0..1; mean over seeds
    risk: tuple[float, ...]  # error rate where the surest 1%, 2%, ... 100% of the texts are answered; likewise
    promise: Promise | None = None  # what may be promised; None for arms that do not ship, and where nothing can be
    reason: str = ""  # why nothing can be promised; empty elsewhere
    unknown: tuple[Unknown, ...] = ()  # texts of no known class, by each kind of sureness; empty without them

    def __post_init__(self) -> None:
        if len(self.risk) != len(POINTS):
            raise ValueError(f"expected {len(POINTS)} error rates, got {len(self.risk)}")


@dataclass(frozen=True)
class Deferral:
    """What `kdlora defer` found."""

    error: float  # the promised rate, 0..1
    confidence: float  # of the promise, 0..1
    sureness: Sureness  # what was compared with the thresholds
    rows: int  # labelled rows of the test
    known: int  # rows that were left out, because their texts are in the training or validation split, too
    source: str  # where they come from
    models: tuple[Deferring, ...]  # what ships first, then the others on the same rows
    unknown: int = 0  # texts of no known class that were given

    @property
    def promises(self) -> bool:
        return any(model.promise for model in self.models)


class NoPromiseError(DataError):
    """The rows do not allow the promise; the message says how many would, or that no number does."""


def measure_sureness(logits: np.ndarray, how: Sureness = "probability", temperature: float = 1.0) -> np.ndarray:
    """Say how sure a model is of each text; energy: Liu et al., "Energy-based Out-of-distribution Detection", eq. 4."""
    check_sureness(how)
    if how == "energy":
        return np.asarray(temperature * np.logaddexp.reduce(logits.astype(np.float64) / temperature, axis=1))
    ordered = np.sort(probabilities(logits, "single-label", temperature), axis=1)
    if how == "probability":
        return np.asarray(ordered[:, -1])
    return np.asarray(ordered[:, -1] - ordered[:, -2])


def check_promise(error: float, confidence: float, how: Sureness) -> None:
    """Refuse rates that are no rates, and a sureness that nobody knows."""
    rates: dict[str, object] = {"error": error, "confidence": confidence}
    for name, value in rates.items():
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise DataError(f"{name} must be above 0 and below 1, got {value!r:.80}.")
    check_sureness(how)


def check_sureness(how: Sureness) -> None:
    if how not in SURENESS:
        raise DataError(f"sureness is one of {', '.join(SURENESS)}; got {how!r:.80}.")


def risk_coverage(sureness: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give coverage and error rate, the surest texts first; texts that are equally sure make one point."""
    order = np.argsort(-sureness, kind="stable")
    answered, mistakes = np.arange(1, len(order) + 1), np.cumsum(wrong[order])
    last = np.append(np.diff(sureness[order]) != 0, True)
    return answered[last] / len(order), mistakes[last] / answered[last]


def area_under_risk(sureness: np.ndarray, wrong: np.ndarray) -> float:
    """Give the mean error rate over all coverages, 0..1: what deferring is worth at no threshold in particular."""
    coverage, risk = risk_coverage(sureness, wrong)
    return float(np.sum(risk * np.diff(coverage, prepend=0.0)))


def promise_error(
    sureness: np.ndarray,
    wrong: np.ndarray,
    *,
    other: tuple[np.ndarray, np.ndarray],
    error: float = 0.02,
    confidence: float = 0.95,
    how: Sureness = "probability",
) -> Promise:
    """Find the lowest threshold whose answers are wrong in at most `error` of the cases, with `confidence`.

    The rows chose neither the model nor anything else; the `other` ones, such as validation, order the thresholds.
    """
    check_promise(error, confidence, how)
    found = None
    for risk, thresholds in zip(_RISKS, order_thresholds(*other, len(sureness), error), strict=True):
        for threshold in thresholds if found is None else ():
            chosen = sureness >= threshold
            answered, mistakes = int(chosen.sum()), int(wrong[chosen].sum())
            if rarity(answered, mistakes, error) > risk * (1 - confidence):
                break
            found = Promise(error, confidence, how, float(threshold), len(sureness), answered, mistakes)
    if found is None:
        raise NoPromiseError(_refuse(sureness, wrong, error, confidence))
    return found


def order_thresholds(sureness: np.ndarray, wrong: np.ndarray, rows: int, error: float) -> list[list[float]]:
    """Give thresholds at 0.5%, 1%, ... of these rows, from the one that `rows` others favour, and from half as many."""
    thresholds = np.unique(np.quantile(sureness, 1 - _COVERAGES, method="lower"))[::-1]
    thresholds[-1] = EVERYTHING
    chosen = sureness >= thresholds[:, None]
    share, mistakes = chosen.mean(axis=1), (chosen & wrong).mean(axis=1)
    # One mistake more than was seen, spread over these rows: that none was seen among few of them says little.
    expected = np.ceil((mistakes + 1 / len(sureness)) * rows)
    best = int(np.argmin(rarity(np.floor(share * rows), expected, error)))
    return [list(map(float, thresholds[start:])) for start in (best, best // 2)]


def rarity(answered: Any, wrong: Any, error: float) -> Any:
    """Give the probability of so few wrong answers, or fewer, where the share `error` is wrong."""
    from scipy.stats import binom  # here: whoever only predicts does without it

    return binom.cdf(wrong, answered, error)


def stated(share: float, digits: int) -> str:
    """Write a rate that is promised, never rounded to one that is not."""
    exact = round(100 * share, 10)
    return f"{exact:.{digits}f}%" if round(exact, digits) == exact else f"{exact:.10g}%"


def _refuse(sureness: np.ndarray, wrong: np.ndarray, error: float, confidence: float) -> str:
    """Say what is missing: rows, or a better model."""
    said = f"an error of at most {stated(error, 1)} cannot be promised with {stated(confidence, 0)} confidence on "
    said += f"{len(sureness)} rows"
    coverage, risk = risk_coverage(sureness, wrong)
    places = np.unique(np.searchsorted(coverage, np.arange(0.05, 1.0, 0.05)).clip(max=len(coverage) - 1))
    coverage, seen = coverage[places], risk[places]
    risk = seen + 1 / (coverage * len(sureness))  # one mistake more, as in `order_thresholds`
    for rows in np.unique(np.geomspace(10, _MOST_ROWS, 200).astype(int)):
        answered = np.floor(coverage * rows)
        if (rarity(answered, np.ceil(risk * answered), error) <= _RISKS[0] * (1 - confidence)).any():
            if rows > len(sureness):
                return f"{said}; about {rows:,} labelled rows would probably do."
            said += ": the validation rows let the test begin where these rows do not show it"
            return f"{said}. Allow a larger error, or give more rows of either kind."
    if seen.min() < error:
        return f"{said}, too few to say how many would do. Allow a larger error, or give several times as many."
    return f"{said}, nor on more: of the surest rows {seen.min():.1%} are wrong. Allow a larger error."


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


METRICS = ("f1", "macro_f1", "accuracy", "balanced_accuracy", "matthews")
"""Metrics of one label, which a row has or not; `macro_f1`: of yes and no."""


def _measure(metric: str, right: np.ndarray, said: np.ndarray, positive: int, rows: int) -> np.ndarray:
    """Give a metric of one label, from the rows that get it rightly, that get it, that have it, and all."""
    from kdlora.data.tasks import Task  # here: whoever only predicts does without it

    task = Task("single-label", ("text",), ("label",), ("no", "yes"), (metric,))
    decided, labels = np.eye(2)[[1, 1, 0, 0]], np.array([1, 0, 1, 0])
    counts = (right, said - right, positive - right, rows - said - positive + right)
    return weighted_metric(task, metric, decided, labels)(np.stack(counts, axis=1).astype(np.float64))


def settle_goals(task: Task, goal: Goal | Mapping[str, Goal | None] | None) -> dict[str, Goal]:
    binary = task.kind == "single-label" and task.num_labels == 2
    if not binary and task.kind != "multi-label":
        labels = f" with {task.num_labels} labels" if task.kind == "single-label" else ""
        raise DataError(
            f"thresholds: expected a multi-label task, or one with two labels, got {task.kind}{labels}; "
            + ("a value has no threshold" if task.kind == "regression" else "there the most probable label is said")
        )
    of_labels = dict(filter(None, map(_goal_of, task.metrics)))
    names = tuple(of_labels or task.label_names[1:]) if binary else task.label_names
    goals = dict(goal) if isinstance(goal, Mapping) else dict.fromkeys(names, goal)
    if unknown := [name for name in goals if name not in task.label_names]:
        known, hint = ", ".join(task.label_names), did_you_mean(unknown[0], task.label_names)
        raise DataError(f"thresholds: no label {unknown[0]!r:.80}; there are {known:.200}.{hint}")
    if not goals:
        raise DataError("thresholds: a mapping of goals names no label; name some, or leave it out, for all labels")
    if binary and len(goals) != 1:
        raise DataError(f"thresholds: of two labels one is the positive one, got {', '.join(goals)}")
    own = next((name for name in task.metrics if binary and name in METRICS), "f1")
    return {name: check_goal(of_labels.get(name, own) if one is None else one) for name, one in goals.items()}


def _goal_of(metric: str) -> tuple[str, Goal] | None:
    """Read the label that a metric is of, and what for: `recall@0.9:spam` is the recall at a precision of 0.9."""
    name, _, label = metric.partition(":")
    if name in ("f1", "average_precision") and label:  # the latter sets no threshold, but says which label is meant
        return label, "f1"
    return (label, float(name.removeprefix("recall@"))) if name.startswith("recall@") else None


def check_goal(goal: Goal) -> Goal:
    if isinstance(goal, str):
        if goal not in METRICS:
            expected = f"{', '.join(METRICS)}, or a precision.{did_you_mean(goal, METRICS)}"
            raise ConfigError(f"thresholds: unknown metric {goal!r:.80}; expected {expected}")
    elif not 0 < goal < 1:
        raise ConfigError(f"thresholds: a precision must be above 0 and below 1, got {goal:g}")
    return goal


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
    edges = np.unique(odds)[::-1]  # rows of the same odds go together
    above, below = np.append(max(edges[0], 0) + 2, edges), np.append(edges, edges[-1] - 1.0)
    cuts = np.where((below <= 0) & (above > 0), 0.0, (above + below) / 2)  # the first one says it of no row
    with np.errstate(over="ignore"):
        thresholds = np.clip(1 / (1 + np.exp(-cuts)), _LEAST, 1 - _LEAST)
    cuts = np.log(thresholds / (1 - thresholds))  # what is counted is what the probability, once rounded, does
    said = rows - np.searchsorted(np.sort(odds), cuts, side="right")
    right = np.append(0, np.cumsum(labels[np.argsort(-odds, kind="stable")]))[said]
    if isinstance(goal, str):
        values = _measure(goal, right, said, positive, rows)
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
    return float(thresholds[place])


def judge_threshold(label: str, goal: Goal, threshold: float, odds: np.ndarray, labels: np.ndarray) -> Threshold:
    def count(at: float) -> tuple[int, int]:
        chosen = odds > np.log(at / (1 - at))
        return int((chosen & (labels == 1)).sum()), int(chosen.sum())

    (right, said), positive, rows = count(threshold), int(labels.sum()), len(labels)
    precision, recall = _share(right, said), _share(right, positive)
    rightly, given = np.array([count(0.5), (right, said)]).T
    told = goal if isinstance(goal, str) else f"precision {goal:g}"
    values = _measure(told, rightly, given, positive, rows) if told in METRICS else ratio(rightly, given)
    return Threshold(label, told, threshold, rows, positive, said, right, *precision, *recall, *values.tolist())


def _share(part: int, whole: int) -> tuple[float, float, float]:
    """Give a share and its exact 95% interval. *Source*: Clopper and Pearson, Biometrika 26(4), 1934."""
    from scipy.stats import beta  # here: whoever only predicts does without it

    low = float(beta.ppf(0.025, part, whole - part + 1)) if part else 0.0
    high = float(beta.ppf(0.975, part + 1, whole - part)) if part < whole else 1.0
    return (part / whole if whole else 0.0), low, high
