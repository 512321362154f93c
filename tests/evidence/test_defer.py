"""Sureness, the curve of error against coverage, and the promise of an error rate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from kdlora.errors import DataError
from kdlora.evidence.defer import (
    EVERYTHING,
    NoPromiseError,
    area_under_risk,
    measure_sureness,
    promise_error,
    risk_coverage,
)


def draw(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw texts whose error rate falls with the sureness: 40% where it is 0, none where it is 1."""
    sureness = generator.uniform(0, 1, rows)
    return sureness, generator.uniform(0, 1, rows) < 0.4 * (1 - sureness) ** 2


def true_error(threshold: float) -> float:
    """Integrate the error rate of the texts at or above a threshold."""
    return 0.4 * (1 - max(threshold, 0.0)) ** 2 / 3


def test_sureness_is_what_its_name_says() -> None:
    """A margin of logits where one of probabilities is meant would order many-class answers differently."""
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.49, 0.01]]))
    assert measure_sureness(logits) == pytest.approx([0.7, 0.5])
    assert measure_sureness(logits, "margin") == pytest.approx([0.5, 0.01])
    assert measure_sureness(logits + 3, "energy") == pytest.approx([3.0, 3.0])
    assert measure_sureness(logits * 2, temperature=2.0) == pytest.approx([0.7, 0.5])
    with pytest.raises(ValueError, match="probability, margin, energy"):
        measure_sureness(logits, "entropy")  # type: ignore[arg-type]


def test_the_curve_counts_equal_sureness_as_one_point() -> None:
    """Within a tie the order of rows is an accident; no threshold cuts through it."""
    coverage, risk = risk_coverage(np.array([0.9, 0.5, 0.5, 0.1]), np.array([False, True, False, True]))
    assert coverage.tolist() == [0.25, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0.0, 1 / 3, 0.5])
    assert area_under_risk(np.array([0.9, 0.1]), np.array([False, True])) == pytest.approx(0.25)


@pytest.mark.parametrize(("rows", "error"), [(1_000, 0.05), (4_000, 0.03)])
def test_the_promise_is_kept_over_a_thousand_draws(rows: int, error: float) -> None:
    """A threshold chosen on the rows that it is judged by would break the promise far more often than it says."""
    generator, broken, given = np.random.default_rng(rows), 0, 0
    for _ in range(1_000):
        sureness, wrong = draw(generator, rows)
        try:
            promise = promise_error(sureness, wrong, other=draw(generator, 300), error=error)
        except NoPromiseError:
            continue
        given += 1
        broken += true_error(promise.threshold) > error
    assert given > 500
    assert broken <= binom.ppf(0.999, 1_000, 0.05)


def test_the_largest_set_that_can_be_promised_is_answered() -> None:
    """A bound that is too careful would hand on texts for nothing."""
    sureness, wrong = draw(np.random.default_rng(1), 200_000)
    promise = promise_error(sureness, wrong, other=draw(np.random.default_rng(2), 1_000))
    best = 1 - (1 - np.sqrt(0.02 * 3 / 0.4))
    assert promise.coverage == pytest.approx(best, abs=0.02)
    everything = promise_error(sureness, np.zeros_like(wrong), other=(sureness[:100], wrong[:100]))
    assert everything.coverage == 1.0
    assert everything.threshold == EVERYTHING


def test_what_cannot_be_promised_says_how_many_rows_would_do() -> None:
    """Without the number nobody knows whether to label ten more rows or to give up."""
    sure, right = np.full(100, 0.9), np.zeros(100, dtype=bool)
    with pytest.raises(NoPromiseError, match=r"2.0% .* 95% confidence on 100 rows; about 149 "):
        promise_error(sure, right, other=(sure, right))
    assert promise_error(np.full(149, 0.9), np.zeros(149, dtype=bool), other=(sure, right)).answered == 149
    wrong = np.arange(1_000) % 10 == 0
    with pytest.raises(NoPromiseError, match=r"nor on more: of the surest rows 10.0% are wrong"):
        promise_error(np.full(1_000, 0.9), wrong, other=(sure, right))


def test_rates_and_rows_are_checked() -> None:
    """An error rate of 2 for 2% would promise nothing, in silence."""
    rows = np.full(200, 0.9), np.zeros(200, dtype=bool)
    with pytest.raises(DataError, match="error must be above 0 and below 1, got 2"):
        promise_error(*rows, other=rows, error=2)
    with pytest.raises(DataError, match="confidence must be above 0"):
        promise_error(*rows, other=rows, confidence=1.0)
    with pytest.raises(DataError, match="labelled rows on both sides"):
        promise_error(rows[0][:0], rows[1][:0], other=rows)
