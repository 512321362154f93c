"""What may be acted on: thresholds of labels by counting every cut, sureness, and the promise of an error rate."""

import re
from contextlib import suppress

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from sklearn import metrics

from kdlora.errors import DataError
from kdlora.evidence.defer import (
    EVERYTHING,
    METRICS,
    NoPromiseError,
    NoThresholdError,
    area_under_risk,
    fit_threshold,
    judge_threshold,
    log_odds,
    measure_sureness,
    promise_error,
    risk_coverage,
    shift_logits,
)
from kdlora.evidence.metrics import probabilities

REFERENCES = {
    "f1": metrics.f1_score,
    "macro_f1": lambda labels, said: metrics.f1_score(labels, said, average="macro"),
    "accuracy": metrics.accuracy_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "matthews": metrics.matthews_corrcoef,
}


def draw_odds(seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Draw odds, some of them equal, and labels that follow them a little."""
    random = np.random.default_rng(seed)
    odds = np.round(random.normal(size=rows) * 2, 1) - 1.5
    return odds, (odds + random.normal(size=rows) * 2 > -0.5).astype(int)


@pytest.mark.parametrize("metric", METRICS)
def test_no_other_threshold_is_better(metric: str) -> None:
    """A threshold between rows of equal probability, or one row off, would be kept as the best."""
    for seed in range(5):
        odds, labels = draw_odds(seed)
        judged = judge_threshold("a", metric, fit_threshold(odds, labels, metric), odds, labels)
        cuts = [*np.unique(odds), odds.min() - 1]
        best = max(REFERENCES[metric](labels, odds > cut) for cut in cuts)
        assert judged.after == pytest.approx(best)
        assert judged.before == pytest.approx(REFERENCES[metric](labels, odds > 0))
    assert fit_threshold(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]), metric) == 0.5
    rare = np.linspace(-9, -1, 10), (np.arange(10) == 4).astype(int)
    assert judge_threshold("a", metric, fit_threshold(*rare, metric), *rare).after >= REFERENCES[metric](
        rare[1], rare[0] > 0
    )


def test_a_wanted_precision_costs_no_more_recall_than_it_must() -> None:
    """A precision that a single lucky row reaches is none, and a threshold too high loses what could be had."""
    for seed in range(5):
        odds, labels = draw_odds(seed, rows=200)
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
    with pytest.raises(NoThresholdError, match=r"the highest is 0\.400"):  # the cut between 39 and 36 is no probability
        fit_threshold(np.array([40.0, 39.0, 36.0, 35.0, -3.0]), np.array([1, 1, 0, 0, 0]), 0.6)
    with pytest.raises(NoThresholdError, match="all of 2 rows"):  # they know nothing of the label
        fit_threshold(np.array([0.1, 0.2]), np.array([1, 1]), "f1")


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


def draw(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw texts whose error rate falls with the sureness: 40% where it is 0, none where it is 1."""
    sureness = generator.uniform(0, 1, rows)
    return sureness, generator.uniform(0, 1, rows) < 0.4 * (1 - sureness) ** 2


def test_sureness_is_what_its_name_says():
    """A margin of logits where one of probabilities is meant would order many-class answers differently."""
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.49, 0.01]]))
    assert measure_sureness(logits) == pytest.approx([0.7, 0.5])
    assert measure_sureness(logits, "margin") == pytest.approx([0.5, 0.01])
    assert measure_sureness(logits + 3, "energy") == pytest.approx([3.0, 3.0])
    assert measure_sureness(logits * 2, temperature=2.0) == pytest.approx([0.7, 0.5])
    with pytest.raises(DataError, match="probability, margin, energy"):
        measure_sureness(logits, "entropy")  # type: ignore[arg-type]

    # Within a tie the order of rows is an accident; no threshold cuts through it.
    coverage, risk = risk_coverage(np.array([0.9, 0.5, 0.5, 0.1]), np.array([False, True, False, True]))
    assert coverage.tolist() == [0.25, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0.0, 1 / 3, 0.5])
    assert area_under_risk(np.array([0.9, 0.1]), np.array([False, True])) == pytest.approx(0.25)


def test_the_promise_is_kept_over_many_draws() -> None:
    """A threshold chosen on the rows that it is judged by would break the promise far more often than it says."""
    rows, error, broken, given = 1_000, 0.05, 0, 0
    generator = np.random.default_rng(rows)
    for _ in range(400):
        sureness, wrong = draw(generator, rows)
        try:
            promise = promise_error(sureness, wrong, other=draw(generator, 300), error=error)
        except NoPromiseError:
            continue
        given += 1
        broken += 0.4 * (1 - max(promise.threshold, 0.0)) ** 2 / 3 > error  # the integral of the error rate above it
    assert given > 200
    assert broken <= binom.ppf(0.999, 400, 0.05)


def test_few_validation_rows_without_a_mistake_do_not_end_the_test():
    """All of thousands of rows were refused where validation let the one sequence begin just beyond what is right.

    Of all answers 2.05% are wrong, so the first sequence alone breaks the promise nearly as often as it may.
    """
    generator, broken = np.random.default_rng(0), 0
    tenths, right = np.arange(150) // 15 / 10, np.zeros(150, dtype=bool)
    for _ in range(400):
        sureness = generator.integers(0, 10, 4_000) / 10
        wrong = (sureness == 0) & (generator.uniform(0, 1, 4_000) < 0.205)
        broken += promise_error(sureness, wrong, other=(tenths, right)).threshold < 0.1
    assert 0 < broken <= binom.ppf(0.999, 400, 0.05)

    sureness, wrong = np.arange(2_000) // 200 / 10, np.arange(2_000) < 200
    wrong[-10:] = True  # of the surer half 1%: enough for 95% confidence, and not for the second sequence
    with pytest.raises(NoPromiseError, match="2000 rows: the validation rows let the test begin where these rows do"):
        promise_error(sureness, wrong, other=(tenths, right))


def test_the_largest_set_that_can_be_promised_is_answered():
    """A bound that is too careful would hand on texts for nothing."""
    sureness, wrong = draw(np.random.default_rng(1), 200_000)
    promise = promise_error(sureness, wrong, other=draw(np.random.default_rng(2), 1_000))
    best = 1 - (1 - np.sqrt(0.02 * 3 / 0.4))
    assert promise.coverage == pytest.approx(best, abs=0.02)
    everything = promise_error(sureness, np.zeros_like(wrong), other=(sureness[:100], wrong[:100]))
    assert everything.coverage == 1.0
    assert everything.threshold == EVERYTHING

    # Without the number nobody knows whether to label ten more rows or to give up.
    sure, right = np.full(100, 0.9), np.zeros(100, dtype=bool)
    with pytest.raises(NoPromiseError, match=r"2.0% .* 95% confidence on 100 rows; about 690 "):
        promise_error(sure, right, other=(sure, right))
    assert promise_error(np.full(151, 0.9), np.zeros(151, dtype=bool), other=(sure, right)).answered == 151
    with pytest.raises(DataError, match="error must be above 0 and below 1, got 2"):  # 2 for 2% would promise nothing
        promise_error(sure, right, other=(sure, right), error=2)
    wrong = np.arange(1_000) % 10 == 0
    with pytest.raises(NoPromiseError, match=r"nor on more: of the surest rows 10.0% are wrong"):
        promise_error(np.full(1_000, 0.9), wrong, other=(sure, right))


def test_as_many_rows_as_are_told_are_mostly_enough():
    """The luckiest of twenty shares was believed: who labelled as many rows as were told was refused once more."""
    promised = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        tested, other = draw(generator, 300), draw(generator, 300)
        try:
            promise_error(*tested, other=other, error=0.05)
        except NoPromiseError as refusal:
            told = re.search(r"about ([\d,]+) labelled rows", str(refusal))
            if told and (rows := int(told[1].replace(",", ""))) < 20_000:
                with suppress(NoPromiseError):
                    promised.append(promise_error(*draw(generator, rows), other=other, error=0.05))
                    continue
                promised.append(None)
    assert len(promised) > 15
    assert sum(one is not None for one in promised) >= 0.7 * len(promised)
