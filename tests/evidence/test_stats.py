from __future__ import annotations

import numpy as np
import pytest
from fabricate import BINARY, MNLI, PAIRS, SIMILARITY, TAGS, TOPICS, make_labels, make_logits
from scipy.stats import bootstrap

from kdlora.data.tasks import Task
from kdlora.evidence.metrics import check_arrays, compute_metrics, score
from kdlora.evidence.stats import PairedArms, mean_paired_bootstrap, mean_sd, paired_bootstrap
from kdlora.evidence.weighted import weighted_metric

COLA = Task("single-label", ("text",), ("label",), ("unacceptable", "acceptable"), ("matthews",), "cola")
MANY_TAGS = Task("multi-label", ("text",), ("tags",), ("a", "b", "c", "d"), ("macro_f1", "subset_accuracy"))
ERRORS = Task("regression", ("text",), ("label",), ("stars",), ("mse", "mae"))
TOPICS_MATTHEWS = Task("single-label", ("text",), ("label",), ("a", "b", "c"), ("matthews", "micro_f1"))


@pytest.mark.parametrize(
    "task", [BINARY, PAIRS, COLA, TOPICS, TOPICS_MATTHEWS, SIMILARITY, ERRORS, TAGS, MANY_TAGS], ids=lambda t: t.metrics
)
def test_closed_forms_equal_the_metric_of_the_drawn_rows(task):
    """A closed form that is off by a little gives intervals that are off by a little, and nobody would see it."""
    rows = 30
    labels = make_labels(task, rows)
    logits = make_logits(task, labels, 0.7, seed=1)
    drawn = np.random.default_rng(0).integers(0, rows, (40, rows))
    drawn[0] = 3  # one example only: every degenerate case at once
    counts = np.stack([np.bincount(draw, minlength=rows) for draw in drawn]).astype(float)
    outputs, targets = check_arrays(task, logits, labels)
    for name in task.metrics:
        fast = weighted_metric(task, name, outputs, targets)(counts)
        slow = [compute_metrics(task, logits[draw], labels[draw])[name] for draw in drawn]
        assert fast == pytest.approx(slow, abs=1e-9)


def test_interval_is_that_of_scipy():
    """Accuracy is a mean over examples, so SciPy's percentile bootstrap has to give the same interval."""
    labels = make_labels(BINARY, 300)
    first, second = (make_logits(BINARY, labels, noise, seed=5) for noise in (0.5, 0.7))
    found = paired_bootstrap(BINARY, labels, [first], [second])
    hits = [(logits.argmax(axis=1) == labels).astype(float) for logits in (first, second)]
    other = bootstrap(
        hits,
        lambda a, b, axis: 100 * (a.mean(axis=axis) - b.mean(axis=axis)),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.low == pytest.approx(other.low, abs=0.35)
    assert found.high == pytest.approx(other.high, abs=0.35)


def test_seeds_are_averaged_after_the_metric():
    """F1 of pooled rows is not the mean of the seeds' F1."""
    labels = make_labels(PAIRS, 200)
    arms = [[make_logits(PAIRS, labels, noise, seed=seed) for seed in range(3)] for noise in (0.5, 0.9)]
    found = paired_bootstrap(PAIRS, labels, *arms, draws=500)
    means = [np.mean([score(PAIRS, compute_metrics(PAIRS, one, labels)) for one in arm]) for arm in arms]
    assert found.difference == pytest.approx(means[0] - means[1])
    assert (found.n_examples, found.n_seeds, found.draws) == (200, (3, 3), 500)
    assert found.low < found.difference < found.high


def test_pairing_narrows_the_interval():
    """Drawing each arm on its own would throw away that hard examples are hard for both."""
    labels = make_labels(BINARY, 400)
    first = make_logits(BINARY, labels, 0.6, seed=1)
    second = first + np.float32(0.05) * make_logits(BINARY, labels, 0.6, seed=2)
    paired = paired_bootstrap(BINARY, labels, [first], [second], draws=2000)
    assert paired.high - paired.low < 3.0  # independent draws: 100 * 2 * 1.96 * sqrt(2 * 0.2 * 0.8 / 400) = 11
    same = paired_bootstrap(BINARY, labels, [first], [first], draws=2000)
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_interval_covers_the_true_difference_as_often_as_it_says():
    """An interval that is too narrow would declare noise a gain."""
    random = np.random.default_rng(3)
    truth, covered, trials = 4.0, 0, 200
    for trial in range(trials):
        first, second = random.random(250) < 0.84, random.random(250) < 0.80
        logits = [np.stack([~hits, hits], axis=1).astype(float) for hits in (first, second)]
        found = paired_bootstrap(BINARY, np.ones(250, dtype=int), logits[:1], logits[1:], draws=400, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / trials <= 0.985


def test_p_is_small_for_a_gain_and_never_zero():
    """P = 0 claims more than a finite number of draws can know."""
    labels = make_labels(BINARY, 400)
    good, bad = (make_logits(BINARY, labels, noise, seed=1) for noise in (0.2, 1.5))
    found = paired_bootstrap(BINARY, labels, [good], [bad], draws=1000)
    assert found.p == pytest.approx(2 / 1001)
    assert paired_bootstrap(BINARY, labels, [bad], [good], draws=1000).difference == -found.difference


def test_same_seed_gives_the_same_interval_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch):
    """A report that changes when it is made again cannot be believed."""
    labels = make_labels(SIMILARITY, 120)
    arms = [[make_logits(SIMILARITY, labels, noise, seed=1)] for noise in (0.5, 0.6)]
    first = paired_bootstrap(SIMILARITY, labels, *arms, draws=300)
    assert paired_bootstrap(SIMILARITY, labels, *arms, draws=300) == first
    assert paired_bootstrap(SIMILARITY, labels, *arms, draws=300, seed=1) != first
    monkeypatch.setattr("kdlora.evidence.stats._CELLS", 120 * 7)
    chunked = paired_bootstrap(SIMILARITY, labels, *arms, draws=300)
    assert (chunked.low, chunked.high) == pytest.approx((first.low, first.high), rel=1e-12)


def test_groups_keep_their_sizes_and_weigh_alike():
    """MNLI's score of a draw is the mean of two accuracies, as it is in the table."""
    labels = make_labels(MNLI, 200)
    groups = ["matched"] * 150 + ["mismatched"] * 50
    arms = [[make_logits(MNLI, labels, noise, seed=1)] for noise in (0.5, 0.9)]
    found = paired_bootstrap(MNLI, labels, *arms, groups=groups, draws=500)
    scores = [score(MNLI, compute_metrics(MNLI, arm[0], labels, groups)) for arm in arms]
    assert found.difference == pytest.approx(scores[0] - scores[1])
    assert found.low < found.difference < found.high


def test_impossible_requests_are_refused():
    """An empty arm would average to NaN."""
    labels = make_labels(BINARY, 10)
    logits = make_logits(BINARY, labels, 0.5, seed=1)
    with pytest.raises(ValueError, match="at least one seed"):
        paired_bootstrap(BINARY, labels, [], [logits])
    with pytest.raises(ValueError, match="draws"):
        paired_bootstrap(BINARY, labels, [logits], [logits], draws=0)
    with pytest.raises(ValueError, match="expected labels of shape"):
        paired_bootstrap(BINARY, labels[:5], [logits], [logits])


def test_one_seed_has_no_spread():
    """A spread of 0.0 for one seed would look like perfect stability."""
    assert mean_sd([90.0]).sd is None
    assert mean_sd([90.0, 92.0]).sd == pytest.approx(np.sqrt(2))
    with pytest.raises(ValueError, match="at least one"):
        mean_sd([])


def test_the_mean_over_tasks_weighs_tasks_alike_and_narrows():
    """A pooled difference would let the task with most rows speak for all."""
    sizes, pairs = (100, 400), []
    for place, rows in enumerate(sizes):
        labels = make_labels(BINARY, rows)
        arms = [[make_logits(BINARY, labels, noise, seed=place + seed) for seed in range(2)] for noise in (0.4, 0.7)]
        pairs.append(PairedArms(BINARY, labels, *arms))
    each = [paired_bootstrap(pair.task, pair.labels, pair.first, pair.second, draws=4000) for pair in pairs]
    mean = mean_paired_bootstrap(pairs, draws=4000)
    assert mean.difference == pytest.approx((each[0].difference + each[1].difference) / 2)
    widths = [one.high - one.low for one in each]
    assert mean.high - mean.low == pytest.approx(np.hypot(*widths) / 2, rel=0.1)  # independent tasks
    assert (mean.n_examples, mean.n_seeds) == (500, (2, 2))
    wide = mean_paired_bootstrap(pairs, draws=4000, level=0.99)
    assert wide.high - wide.low == pytest.approx((mean.high - mean.low) * 2.576 / 1.96, rel=0.1)


def test_no_task_has_no_mean():
    """An interval of nothing would be a number all the same."""
    with pytest.raises(ValueError, match="at least one task"):
        mean_paired_bootstrap([])
