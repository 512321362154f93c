"""Mean and spread over seeds, and the contrast of two arms with its interval over rows and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtr, stdtrit

from kdlora.evidence.metrics import check_arrays, weighted_metric
from kdlora.evidence.ranking import Weighted

if TYPE_CHECKING:
    from kdlora.data.tasks import Task

# Cells of one matrix of counts: 32 MB of float64, small enough to stay near the caches.
_CELLS = 4_000_000
_FEW = 10
"""Of fewer examples every draw may be alike, so that the interval is a point."""


@dataclass(frozen=True)
class MeanSd:
    """Mean and sample standard deviation; `sd` is None for a single value, which has no spread."""

    mean: float
    sd: float | None


def mean_sd(values: Iterable[float | None]) -> MeanSd | None:
    known = [value for value in values if value is not None]
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return MeanSd(float(np.mean(known)), spread) if known else None


@dataclass(frozen=True)
class Difference:
    """The difference of two arms' scores, in points (0 to 100), with its interval."""

    difference: float  # first minus second, on the examples as they are
    low: float
    high: float
    p: float  # two-sided, of the same t distribution
    n_examples: int  # that were drawn from
    n_seeds: int  # seed-paired differences; with 1 the interval speaks of rows alone
    draws: int
    level: float  # coverage of the interval

    @property
    def sign(self) -> int | None:
        """1 or -1 where the interval is above or below 0 to one decimal, else 0; None for one seed or few examples."""
        if self.n_seeds < 2 or self.n_examples < _FEW:
            return None
        return 1 if round(self.low, 1) > 0 else -1 if round(self.high, 1) < 0 else 0


@dataclass(frozen=True, eq=False)
class PairedArms:
    """Two arms' logits on the examples of one task, rows in the order of `labels`.

    An arm has one array for each run, seed by seed as the other; one array alone is one model for all seeds.
    """

    task: Task
    labels: np.ndarray
    first: Sequence[np.ndarray]
    second: Sequence[np.ndarray]
    groups: Sequence[str] | None = None  # of each example (MNLI); examples are drawn within each group
    seeds: Sequence[int] | None = None  # of each pair of arrays, where a seed has several
    offsets: np.ndarray | None = None  # where each example's words begin, in a task of tokens

    @property
    def examples(self) -> int:
        return len(self.labels) if self.offsets is None else len(self.offsets) - 1


def contrast(
    pairs: Sequence[PairedArms], *, draws: int = 2_000, level: float = 0.95, seed: int = 0, share: bool = False
) -> Difference:
    """Estimate the difference of two arms' scores, its mean over tasks, with an interval over rows and seeds.

    Rows: a paired bootstrap. Each draw takes examples with replacement, the same ones for both arms and all seeds;
    the score is computed anew for every run (F1, Matthews and correlations are no means over examples), and the
    difference averaged over seeds and tasks. V_r is the variance over the draws, with f_r = examples - tasks degrees
    of freedom. Seeds: V_s = s² / n with f_s = n - 1, s² being the variance of a task's n seed-paired differences.
    With T tasks every V_s is divided by T². The interval is d ± t(f) · sqrt(V_r + ΣV_s), with the degrees of freedom
    of Satterthwaite (Biometrics Bulletin 2(6), 1946): f = (V_r + ΣV_s)² / (V_r² / f_r + ΣV_s² / f_s).

    With one seed there is no V_s, and the interval speaks of rows alone; few seeds know their variance badly
    (docs/concepts/retention.md). For m contrasts take a level of 1 - 0.05 / m (Bonferroni).

    With `share` it is what the first arm keeps of the second, in per cent, instead of their difference: the ratio R of
    the mean scores on each draw, and for V_s each seed's R + (100 · first - R · second) / mean of the second (Cochran,
    Sampling Techniques, 3rd ed., 1977, chapter 6). It is no number where a draw's second arm has a score of 0.
    """
    if draws < 2 or not 0 < level < 1:
        raise ValueError(f"expected draws >= 2 and 0 < level < 1, got {draws} and {level}")
    found = [_differences(pair, draws, [seed, place] if place else seed, share) for place, pair in enumerate(pairs)]
    return estimate(found, sum(pair.examples for pair in pairs), level)


def estimate(found: Sequence[tuple[np.ndarray, np.ndarray]], examples: int, level: float) -> Difference:
    """Join the variances of rows and seeds as `contrast` says, from each task's differences by seed and by draw."""
    observed, drawn = [one for one, _ in found], [one for _, one in found]
    seeds, draws = min(map(len, observed)), len(drawn[0])
    parts = [(float(np.var(np.mean(drawn, axis=0), ddof=1)), max(1, examples - len(found)))]
    if seeds > 1:
        parts += [(float(np.var(one, ddof=1)) / len(one) / len(found) ** 2, len(one) - 1) for one in observed]
    difference = float(np.mean([one.mean() for one in observed]))
    variance = sum(part for part, _ in parts)
    if not variance:  # the same on every draw and seed
        return Difference(difference, difference, difference, float(not difference), examples, seeds, draws, level)
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    error = float(np.sqrt(variance))
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    p = float(2 * stdtr(freedom, -abs(difference) / error))
    return Difference(difference, difference - reach, difference + reach, p, examples, seeds, draws, level)


def _differences(
    pair: PairedArms, draws: int, seed: int | Sequence[int], share: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Give each seed's difference, or share, on the examples as they are, and its mean over seeds on each draw."""
    count = max(len(pair.first), len(pair.second))
    first, second = (list(arm) * count if len(arm) == 1 else list(arm) for arm in (pair.first, pair.second))
    runs = list(zip(first, second, strict=True))
    members = np.asarray(pair.groups if pair.groups is not None else [""] * pair.examples)
    rows = [np.flatnonzero(members == name) for name in dict.fromkeys(members.tolist())]  # of each group
    scorers = {id(logits): _scorer(pair, logits, rows) for arms in runs for logits in arms}

    def measure(counts: np.ndarray) -> np.ndarray:
        scores = {name: scorer(counts) for name, scorer in scorers.items()}
        values = np.stack([[scores[id(one)] for one in arms] for arms in runs])  # (runs, 2, draws)
        seeds = np.arange(len(runs)) if pair.seeds is None else np.asarray(pair.seeds)
        own, other = np.stack([values[seeds == one].mean(axis=0) for one in dict.fromkeys(seeds.tolist())], axis=1)
        if not share:
            return own - other
        whole = other.mean(axis=0)
        ratio = 100 * own.mean(axis=0) / whole
        return ratio + (100 * own - ratio * other) / whole

    drawn = [measure(counts).mean(axis=0) for counts in _draw_counts(rows, draws, seed)]
    return measure(np.ones((1, pair.examples)))[:, 0], np.concatenate(drawn)


def _scorer(pair: PairedArms, logits: np.ndarray, rows: list[np.ndarray]) -> Weighted:
    """Make the function from counts (draws, examples) to one seed's score on each draw."""
    outputs, targets = check_arrays(pair.task, logits, pair.labels, pair.offsets)
    parts = [
        (members, weighted_metric(pair.task, name, outputs[members], targets[members]))
        for name in pair.task.metrics
        for members in rows
    ]
    whole = len(rows) == 1

    def measure(counts: np.ndarray) -> np.ndarray:
        values = [part(counts if whole else counts[:, members]) for members, part in parts]
        return 100.0 * np.mean(values, axis=0)

    return measure


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
