"""Thresholds of labels: the best there is, by counting every cut."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics

from kdlora.evidence.metrics import probabilities
from kdlora.evidence.thresholds import (
    METRICS,
    NoThresholdError,
    fit_threshold,
    judge_threshold,
    log_odds,
    shift_logits,
)

REFERENCES = {
    "f1": metrics.f1_score,
    "macro_f1": lambda labels, said: metrics.f1_score(labels, said, average="macro"),
    "accuracy": metrics.accuracy_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "matthews": metrics.matthews_corrcoef,
}


def draw(seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Draw odds, some of them equal, and labels that follow them a little."""
    random = np.random.default_rng(seed)
    odds = np.round(random.normal(size=rows) * 2, 1) - 1.5
    return odds, (odds + random.normal(size=rows) * 2 > -0.5).astype(int)


@pytest.mark.parametrize("metric", METRICS)
def test_no_other_threshold_is_better(metric: str) -> None:
    """A threshold between rows of equal probability, or one row off, would be kept as the best."""
    for seed in range(5):
        odds, labels = draw(seed)
        judged = judge_threshold("a", metric, fit_threshold(odds, labels, metric), odds, labels)
        cuts = [*np.unique(odds), odds.min() - 1]
        best = max(REFERENCES[metric](labels, odds > cut) for cut in cuts if (odds > cut).any())
        assert judged.after == pytest.approx(best)
        assert judged.before == pytest.approx(REFERENCES[metric](labels, odds > 0))
    assert fit_threshold(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]), metric) == 0.5


def test_a_wanted_precision_costs_no_more_recall_than_it_must() -> None:
    """A precision that a single lucky row reaches is none, and a threshold too high loses what could be had."""
    for seed in range(5):
        odds, labels = draw(seed, rows=200)
        judged = judge_threshold("a", 0.65, fit_threshold(odds, labels, 0.65), odds, labels)
        able = [
            int(labels[said].sum())
            for cut in [*np.unique(odds), odds.min() - 1]
            if (said := odds > cut).any() and labels[said].sum() / (said.sum() + 1) >= 0.65
        ]
        assert judged.right == max(able)
        assert judged.precision >= 0.65
        exact = binomtest(judged.right, judged.positive).proportion_ci(0.95, method="exact")
        assert (judged.recall_low, judged.recall_high) == pytest.approx((exact.low, exact.high))
    with pytest.raises(NoThresholdError, match=r"no threshold reaches a precision of 0\.9 on 4 rows, 2 of which"):
        fit_threshold(np.array([3.0, 2.0, 1.0, 0.0]), np.array([1, 1, 0, 0]), 0.9)


@pytest.mark.parametrize(("labels", "told"), [([0, 0], "none of 2 rows"), ([1, 1], "all of 2 rows")])
def test_labels_of_one_class_fit_nothing(labels: list[int], told: str) -> None:
    """A threshold that says a label never, or always, would come out of rows that know nothing of it."""
    with pytest.raises(NoThresholdError, match=told):
        fit_threshold(np.array([0.1, 0.2]), np.array(labels), "f1")


@pytest.mark.parametrize(("kind", "names"), [("multi-label", ("a", "b", "c")), ("single-label", ("no", "yes"))])
def test_shifted_logits_decide_by_the_threshold(kind: str, names: tuple[str, ...]) -> None:
    """A shift against the temperature, or the wrong sign, moves every answer."""
    logits = np.random.default_rng(0).normal(size=(300, len(names))).astype(np.float32) * 3
    shifted = shift_logits(logits, names, {names[1]: 0.8}, 1.7)
    said = shifted[:, 1] > 0 if kind == "multi-label" else shifted.argmax(axis=1) == 1
    assert (said == (probabilities(logits, kind, 1.7)[:, 1] > 0.8)).all()
    odds = log_odds(logits, kind, 1, 1.7)
    assert 1 / (1 + np.exp(-odds)) == pytest.approx(probabilities(logits, kind, 1.7)[:, 1])
    assert (shifted[:, 0] == logits[:, 0]).all()
