"""Mean and spread over seeds, and the paired bootstrap between two arms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdlora.evidence.metrics import check_arrays, compute_metrics, score
from kdlora.evidence.weighted import weighted_metric

if TYPE_CHECKING:
    from kdlora.data.tasks import Task

# Cells of one matrix of counts: 32 MB of float64, small enough to stay near the caches.
_CELLS = 4_000_000


@dataclass(frozen=True)
class MeanSd:
    """Mean and sample standard deviation; `sd` is None for a single value, which has no spread."""

    mean: float
    sd: float | None
    n: int


def mean_sd(values: Sequence[float]) -> MeanSd:
    """Summarise the values of several seeds.

    Args:
        values: one figure a seed, at least one.

    Returns:
        Mean, sample standard deviation (divisor n - 1) and count.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("expected at least one value")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return MeanSd(float(np.mean(values)), spread, len(values))


@dataclass(frozen=True)
class Difference:
    """The difference of two arms' scores, in points (0 to 100), with its paired bootstrap.

    Attributes:
        difference: first minus second, on the examples as they are.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided; the share of draws on the far side of 0, doubled.
        n_examples: examples that were drawn from.
        n_seeds: seeds of the first and of the second arm.
        draws: bootstrap draws.
        level: coverage of the interval, 0.95.
    """

    difference: float
    low: float
    high: float
    p: float
    n_examples: int
    n_seeds: tuple[int, int]
    draws: int
    level: float


def paired_bootstrap(
    task: Task,
    labels: np.ndarray,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    groups: Sequence[str] | None = None,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Estimate how far the difference of two arms' scores depends on the examples at hand.

    Each draw takes examples with replacement, the same ones for both arms and all their seeds; the score is
    recomputed for every seed (F1, Matthews and correlations are not means over examples; Spearman's ranks
    are those of the drawn examples), averaged over the seeds of each arm, and the averages are subtracted.
    The interval is the percentile interval. It is conditional on these seeds: it says nothing about what
    another seed would give, so the spread over seeds belongs beside it. With groups (MNLI) examples are drawn
    within each group, whose sizes are fixed by design.

    Args:
        task: its kind and score metrics.
        labels: as in `compute_metrics`, one for each example.
        first: one array of logits for each seed of the first arm, rows in the order of `labels`.
        second: the same for the second arm; the number of seeds may differ.
        groups: the group of each example, or None.
        draws: number of bootstrap draws.
        level: coverage of the interval, between 0 and 1.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        Difference, interval and p, in points.

    Raises:
        ArtifactError: logits or labels that are not finite.
        ValueError: shapes that do not fit, or an arm without seeds.
    """
    pair = PairedArms(task, labels, tuple(first), tuple(second), groups)
    return mean_paired_bootstrap([pair], draws=draws, level=level, seed=seed)


@dataclass(frozen=True, eq=False)
class PairedArms:
    """Two arms' logits on the examples of one task.

    Attributes:
        task: its kind and score metrics.
        labels: as in `compute_metrics`, one for each example.
        first: one array of logits for each seed of the first arm, rows in the order of `labels`.
        second: the same for the second arm.
        groups: the group of each example, or None.
    """

    task: Task
    labels: np.ndarray
    first: Sequence[np.ndarray]
    second: Sequence[np.ndarray]
    groups: Sequence[str] | None = None


def mean_paired_bootstrap(
    pairs: Sequence[PairedArms], *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Estimate the mean, over tasks, of the difference of two arms' scores.

    Each draw takes examples of every task anew, as `paired_bootstrap` does, and averages the differences of the
    tasks, each with the same weight. The interval holds for these tasks and seeds.

    Args:
        pairs: the two arms on each task, at least one.
        draws: number of bootstrap draws.
        level: coverage of the interval, between 0 and 1; 1 - 0.05 / m corrects for m comparisons (Bonferroni).
        seed: of the draws.

    Returns:
        Difference, interval and p, in points; examples are summed, seeds are those of the task with the fewest.

    Raises:
        ArtifactError: logits or labels that are not finite.
        ValueError: shapes that do not fit, no task, or an arm without seeds.
    """
    if not pairs or not all(pair.first and pair.second for pair in pairs):
        raise ValueError("expected at least one task, and at least one seed in each arm")
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"expected draws >= 1 and 0 < level < 1, got {draws} and {level}")
    observed = [
        _observed_score(pair.task, pair.first, pair.labels, pair.groups)
        - _observed_score(pair.task, pair.second, pair.labels, pair.groups)
        for pair in pairs
    ]
    drawn = [_drawn_differences(pair, draws, [seed, place] if place else seed) for place, pair in enumerate(pairs)]
    differences = np.mean(drawn, axis=0)
    tail = (1 - level) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return Difference(
        difference=float(np.mean(observed)),
        low=float(low),
        high=float(high),
        p=_two_sided(differences),
        n_examples=sum(len(pair.labels) for pair in pairs),
        n_seeds=(min(len(pair.first) for pair in pairs), min(len(pair.second) for pair in pairs)),
        draws=draws,
        level=level,
    )


_Scorer = Callable[[np.ndarray], np.ndarray]


def _observed_score(task: Task, arm: Sequence[np.ndarray], labels: np.ndarray, groups: Sequence[str] | None) -> float:
    """Average the score over an arm's seeds, on the examples as they are."""
    return float(np.mean([score(task, compute_metrics(task, logits, labels, groups)) for logits in arm]))


def _drawn_differences(pair: PairedArms, draws: int, seed: int | Sequence[int]) -> np.ndarray:
    """Give the difference of the arms' mean scores for each draw, both arms on the same drawn examples."""
    rows = _group_rows(len(pair.labels), pair.groups)
    one, other = (
        [_seed_scorer(pair.task, logits, pair.labels, rows) for logits in arm] for arm in (pair.first, pair.second)
    )
    chunks = _draw_counts(rows, draws, seed)
    return np.concatenate([_mean_score(one, counts) - _mean_score(other, counts) for counts in chunks])


def _group_rows(rows: int, groups: Sequence[str] | None) -> list[np.ndarray]:
    """List the row numbers of each group; one group of all rows where there are none."""
    if groups is None:
        return [np.arange(rows)]
    members = np.asarray(groups)
    return [np.flatnonzero(members == name) for name in dict.fromkeys(groups)]


def _seed_scorer(task: Task, logits: np.ndarray, labels: np.ndarray, rows: list[np.ndarray]) -> _Scorer:
    """Make the function from counts (draws, examples) to one seed's score on each draw."""
    outputs, targets = check_arrays(task, logits, labels)
    parts = [
        (members, weighted_metric(task, name, outputs[members], targets[members]))
        for name in task.metrics
        for members in rows
    ]
    whole = len(rows) == 1

    def measure(counts: np.ndarray) -> np.ndarray:
        values = [part(counts if whole else counts[:, members]) for members, part in parts]
        return 100.0 * np.mean(values, axis=0)

    return measure


def _mean_score(scorers: Sequence[_Scorer], counts: np.ndarray) -> np.ndarray:
    """Average the score over an arm's seeds, draw by draw."""
    return np.asarray(np.mean([scorer(counts) for scorer in scorers], axis=0))


def _draw_counts(rows: list[np.ndarray], draws: int, seed: int | Sequence[int]) -> Iterator[np.ndarray]:
    """Yield matrices (some draws, examples): how often each draw took each example."""
    generator = np.random.default_rng(seed)
    examples = sum(len(members) for members in rows)
    step = max(1, min(draws, _CELLS // examples))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        counts = np.empty((size, examples))
        for members in rows:
            drawn = generator.integers(0, len(members), (size, len(members)), dtype=np.int64)
            drawn += np.arange(size)[:, None] * len(members)
            counts[:, members] = np.bincount(drawn.ravel(), minlength=size * len(members)).reshape(size, -1)
        yield counts


def _two_sided(differences: np.ndarray) -> float:
    """Double the smaller tail beyond 0; one is added so that a finite number of draws never claims p = 0."""
    below = int((differences <= 0).sum())
    above = int((differences >= 0).sum())
    return min(1.0, 2.0 * (1 + min(below, above)) / (1 + len(differences)))
