import numpy as np
import pytest
from scipy.stats import bootstrap, norm, t

from fabricate import BINARY, MNLI, PAIRS, SIMILARITY, make_labels, make_logits
from kdlora.data.tasks import Task
from kdlora.evidence.metrics import check_arrays, compute_metrics, score, weighted_metric
from kdlora.evidence.stats import Difference, PairedArms, contrast, mean_sd

BY_LABEL = ("average_precision", "f1:b", "average_precision:a", "recall@0.6:b")
SEVERAL = ("macro_f1", "matthews", "micro_f1", "balanced_accuracy", "cost:[[0,1,2],[3,0,1],[1,1,0]]")


@pytest.mark.parametrize(
    ("kind", "names", "metrics"),
    [
        ("single-label", ("a", "b"), ("accuracy", "f1", "matthews", *BY_LABEL)),
        ("single-label", ("a", "b", "c"), (*SEVERAL, *BY_LABEL)),
        ("multi-label", ("a", "b", "c"), ("micro_f1", "macro_f1", "subset_accuracy", *BY_LABEL)),
        ("regression", ("stars",), ("pearson", "spearman", "mse", "mae", "r2")),
    ],
)
def test_closed_forms_equal_the_metric_of_the_drawn_rows(kind, names, metrics):
    """A closed form that is off by a little gives intervals that are off by a little, and nobody would see it."""
    task, rows = Task(kind, ("text",), ("label",), names, metrics), 30
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


def hits(right: np.ndarray) -> np.ndarray:
    """Logits of a binary task whose labels are all 1, right or wrong as told."""
    return np.stack([~right, right], axis=1).astype(float)


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_seeds_do_not_vary_it_is_the_plain_paired_bootstrap(seeds):
    """Seeds that change nothing must not widen the interval, and three copies of a model must not narrow it."""
    labels = make_labels(BINARY, 300)
    first, second = (make_logits(BINARY, labels, noise, seed=5) for noise in (0.5, 0.7))
    found = contrast([PairedArms(BINARY, labels, [first] * seeds, [second] * seeds)])
    plain = bootstrap(
        [(logits.argmax(axis=1) == labels).astype(float) for logits in (first, second)],
        lambda a, b, axis: 100 * (a.mean(axis=axis) - b.mean(axis=axis)),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.35)
    swapped = contrast([PairedArms(BINARY, labels, [second] * seeds, [first] * seeds)])
    assert swapped.difference == -found.difference
    same = contrast([PairedArms(BINARY, labels, [first] * seeds, [first] * seeds)])
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_it_covers_the_true_difference_where_rows_and_seeds_vary():
    """An interval over rows alone, as it was, holds the truth in less than three of four cases."""
    random, trials, covered, narrow, rows, seeds = np.random.default_rng(3), 150, 0, 0, 300, 5
    own, spread = 0.5, 0.1  # what a seed changes on single rows, and on all of them; rows themselves differ by 1
    means = (1.1, 0.9)
    truth = 100 * np.subtract(*norm.cdf(np.divide(means, np.sqrt(1 + own**2 + spread**2))))
    for trial in range(trials):
        hard = random.normal(size=rows)  # a hard example is hard for every model
        sure = [
            [mean + spread * random.normal() + own * random.normal(size=rows) for _ in range(seeds)] for mean in means
        ]
        first, second = ([hits(one + hard > 0) for one in arm] for arm in sure)
        labels = np.ones(rows, dtype=int)
        found = contrast([PairedArms(BINARY, labels, first, second)], draws=100, seed=trial)
        covered += found.low <= truth <= found.high
        found = contrast([PairedArms(BINARY, labels, first[:1], second[:1])], draws=100, seed=trial)
        narrow += found.low <= truth <= found.high
    assert 0.91 <= covered / trials <= 0.99
    assert narrow / trials < 0.75


def test_the_interval_is_that_of_the_formula():
    """Variances that are weighed wrongly, or other degrees of freedom, still give an interval that looks right."""
    rows, scores = 1000, [90.0, 86.0, 88.5]
    first = [hits(np.arange(rows) < 10 * score) for score in scores]
    found = contrast([PairedArms(BINARY, np.ones(rows, dtype=int), first, [hits(np.arange(rows) < 850)])], draws=4000)
    of_rows = np.mean([np.arange(rows) < 10 * score for score in scores], axis=0) - (np.arange(rows) < 850)
    parts = [100**2 * of_rows.var() / rows, np.var(scores, ddof=1) / 3]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (rows - 1) + parts[1] ** 2 / 2)
    reach = t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    assert found.difference == pytest.approx(np.mean(scores) - 85)
    assert (found.low, found.high) == pytest.approx((found.difference - reach, found.difference + reach), rel=0.05)
    assert found.p == pytest.approx(2 * t.sf(found.difference / np.sqrt(sum(parts)), freedom), rel=0.1)
    assert found.n_seeds == 3  # one model of the second arm stands beside every seed of the first


def test_a_share_has_the_interval_of_a_ratio():
    """What is kept of a teacher was printed without one; a difference's, divided, takes the teacher for certain."""
    rows, own, whole = np.arange(1000), [81.0, 78.0, 79.5], [90.0, 88.0, 89.0]
    first, second = ([hits(rows < 10 * score) for score in arm] for arm in (own, whole))
    found = contrast([PairedArms(BINARY, np.ones(1000, dtype=int), first, second)], draws=4000, share=True)
    kept = np.sum(own) / np.sum(whole)
    of_rows = np.mean([rows < 10 * score for score in own], axis=0) - kept * np.mean(
        [rows < 10 * score for score in whole], axis=0
    )
    of_seeds = np.var(np.subtract(own, kept * np.array(whole)), ddof=1) / 3
    parts = np.array([100**2 * of_rows.var() / 1000, of_seeds]) / np.mean(whole) ** 2 * 100**2
    freedom = parts.sum() ** 2 / (parts[0] ** 2 / 999 + parts[1] ** 2 / 2)
    reach = t.ppf(0.975, freedom) * np.sqrt(parts.sum())
    assert found.difference == pytest.approx(100 * kept)
    assert found.high - found.difference == pytest.approx(reach, rel=0.05)
    single = [PairedArms(BINARY, np.ones(1000, dtype=int), first, second[:1])]
    assert contrast(single, share=True).difference == pytest.approx(100 * np.mean(own) / 90)
    assert contrast([*single, *single], share=True).difference == pytest.approx(100 * np.mean(own) / 90)


def test_runs_of_one_seed_are_averaged_first():
    """Ten configurations with one seed are not ten seeds."""
    labels = make_labels(BINARY, 200)
    arms = [[make_logits(BINARY, labels, noise, seed=seed) for seed in range(4)] for noise in (0.5, 0.7)]
    assert contrast([PairedArms(BINARY, labels, *arms, seeds=[0, 0, 0, 0])]).n_seeds == 1
    found = contrast([PairedArms(BINARY, labels, *arms, seeds=[0, 1, 0, 1])])
    assert found.n_seeds == 2
    assert found.difference == pytest.approx(contrast([PairedArms(BINARY, labels, *arms)]).difference)

    # A spread of 0.0 for one seed would look like perfect stability.
    assert mean_sd([90.0]).sd is None
    assert mean_sd([90.0, None, 92.0]).sd == pytest.approx(np.sqrt(2))
    assert mean_sd([None]) is None


@pytest.mark.parametrize(
    ("low", "high", "seeds", "rows", "sign"),
    [
        (0.2, 2.0, 3, 100, 1),
        (-2.0, -0.2, 3, 10, -1),
        (-0.4, 2.0, 3, 100, 0),
        (0.04, 2.0, 3, 100, 0),
        (0.2, 2.0, 1, 100, None),
        (100.0, 100.0, 3, 9, None),
    ],
)
def test_one_seed_or_a_handful_of_rows_gives_no_verdict(low, high, seeds, rows, sign):
    """A gain that another seed, or other rows, would take back is none; neither is one that rounds to zero."""
    assert Difference(1.0, low, high, 0.01, rows, seeds, 1000, 0.95).sign is sign


def test_seeds_are_averaged_after_the_metric():
    """F1 of pooled rows is not the mean of the seeds' F1."""
    labels = make_labels(PAIRS, 200)
    arms = [[make_logits(PAIRS, labels, noise, seed=seed) for seed in range(3)] for noise in (0.5, 0.9)]
    found = contrast([PairedArms(PAIRS, labels, *arms)], draws=500)
    means = [np.mean([score(PAIRS, compute_metrics(PAIRS, one, labels)) for one in arm]) for arm in arms]
    assert found.difference == pytest.approx(means[0] - means[1])
    assert (found.n_examples, found.n_seeds, found.draws) == (200, 3, 500)
    assert found.low < found.difference < found.high

    # MNLI's score of a draw is the mean of two accuracies, as it is in the table.
    labels = make_labels(MNLI, 200)
    groups = ["matched"] * 150 + ["mismatched"] * 50
    arms = [[make_logits(MNLI, labels, noise, seed=1)] for noise in (0.5, 0.9)]
    found = contrast([PairedArms(MNLI, labels, *arms, groups)], draws=500)
    scores = [score(MNLI, compute_metrics(MNLI, arm[0], labels, groups)) for arm in arms]
    assert found.difference == pytest.approx(scores[0] - scores[1])
    assert found.low < found.difference < found.high


def test_same_seed_gives_the_same_interval_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch):
    """A report that changes when it is made again cannot be believed."""
    labels = make_labels(SIMILARITY, 120)
    arms = [[make_logits(SIMILARITY, labels, noise, seed=1)] for noise in (0.5, 0.6)]
    first = contrast([PairedArms(SIMILARITY, labels, *arms)], draws=300)
    assert contrast([PairedArms(SIMILARITY, labels, *arms)], draws=300) == first
    assert contrast([PairedArms(SIMILARITY, labels, *arms)], draws=300, seed=1) != first
    monkeypatch.setattr("kdlora.evidence.stats._CELLS", 120 * 7)
    chunked = contrast([PairedArms(SIMILARITY, labels, *arms)], draws=300)
    assert (chunked.low, chunked.high) == pytest.approx((first.low, first.high), rel=1e-12)


def test_the_mean_over_tasks_weighs_tasks_alike_and_narrows():
    """A pooled difference would let the task with most rows speak for all."""
    sizes, pairs = (100, 400), []
    for place, rows in enumerate(sizes):
        labels = make_labels(BINARY, rows)
        arms = [[make_logits(BINARY, labels, noise, seed=place + seed) for seed in range(2)] for noise in (0.4, 0.7)]
        pairs.append(PairedArms(BINARY, labels, *arms))
    each = [contrast([pair], draws=4000) for pair in pairs]
    mean = contrast(pairs, draws=4000)
    assert mean.difference == pytest.approx((each[0].difference + each[1].difference) / 2)
    widths = [one.high - one.low for one in each]
    assert mean.high - mean.low == pytest.approx(np.hypot(*widths) / 2, rel=0.1)  # independent tasks
    assert (mean.n_examples, mean.n_seeds) == (500, 2)
    wide = contrast(pairs, draws=4000, level=0.99)
    assert wide.high - wide.low == pytest.approx((mean.high - mean.low) * 2.576 / 1.96, rel=0.1)
