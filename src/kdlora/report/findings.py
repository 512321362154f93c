"""What an experiment shows: arms against each other, paired by example, and what the student keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kdlora.config import STUDENT_ARMS
from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions
from kdlora.evidence.stats import Difference, MeanSd, PairedArms, contrast, mean_sd
from kdlora.report.wording import arm_title

if TYPE_CHECKING:
    from kdlora.report.collect import Experiment, Run

CONTROLS = {"kd-lora": "student-lora", "kd-fft": "student-fft"}
"""Each distilled arm's control: the arm of the same adapters, rates and steps that its gain is measured over."""


@dataclass(frozen=True)
class Comparison:
    """Two arms, paired by example where that was possible.

    `difference` is None where they cannot be paired, for the `reason`; `plain` is that of the mean scores, in points.
    """

    first: str
    second: str
    difference: Difference | None
    plain: float
    reason: str = ""

    @property
    def title(self) -> str:
        """Name it as a subtraction."""
        return f"{arm_title(self.first)} − {arm_title(self.second)}"

    @property
    def turned(self) -> Comparison:
        """The second arm minus the first."""
        one = self.difference
        if one is not None:
            one = replace(one, difference=-one.difference, low=-one.high, high=-one.low)
        return Comparison(self.second, self.first, one, -self.plain, self.reason)


def compare_arms(experiment: Experiment, *, draws: int = 2_000) -> list[Comparison]:
    """Hold the shipped arm against every other, its control first; then each other distilled arm against its own."""
    arm = experiment.student_arm
    if arm is None:
        return []
    order = [CONTROLS.get(arm), *STUDENT_ARMS, "lora", "fft"]
    others = {other for other in experiment.arms if other != arm and experiment.finished(other)}
    opponents = sorted(others, key=lambda other: (order.index(other) if other in order else len(order), other))
    pairs = [(arm, other) for other in opponents]
    pairs += [pair for pair in CONTROLS.items() if arm not in pair and others.issuperset(pair)]
    return [
        pair_runs(experiment.task, experiment.split, *((name, experiment.finished(name)) for name in pair), draws=draws)
        for pair in pairs
    ]


def find_gain(comparisons: Sequence[Comparison]) -> Comparison | None:
    """Find what distillation adds, a distilled arm over its control; that of the shipped arm before any other."""
    for one in comparisons:
        if CONTROLS.get(one.first) == one.second:
            return one
        if CONTROLS.get(one.second) == one.first:
            return one.turned
    return None


def pair_runs(
    task: Task, split: str, first: tuple[str, Sequence[Run]], second: tuple[str, Sequence[Run]], *, draws: int = 2_000
) -> Comparison:
    """Compare two groups of runs, each with its name, seed by seed and example by example."""
    plain = _mean_score(first[1], split) - _mean_score(second[1], split)
    kept = [[run for run in runs if run.predictions is not None] for _, runs in (first, second)]
    if not kept[0] or not kept[1]:
        return Comparison(first[0], second[0], None, plain, "not paired: predictions are missing")
    kept = _same_seeds(*kept)
    aligned = align([run.predictions.only(split) for runs in kept for run in runs if run.predictions is not None])
    if aligned is None:
        return Comparison(first[0], second[0], None, plain, "not paired: the examples are not the same")
    labels = aligned[0].labels
    if labels is None:
        return Comparison(first[0], second[0], None, plain, "not paired: the examples have no labels")
    logits, cut = [one.logits for one in aligned], len(kept[0])
    difference = contrast([PairedArms(task, labels, logits[:cut], logits[cut:], aligned[0].groups)], draws=draws)
    return Comparison(first[0], second[0], difference, difference.difference)


def _mean_score(runs: Sequence[Run], split: str) -> float:
    return float(np.mean([value for run in runs if (value := run.score(split)) is not None]))


def _same_seeds(first: Sequence[Run], second: Sequence[Run]) -> list[list[Run]]:
    """Take the seeds that both have, in one order; a single teacher or baseline stands beside every seed.

    Runs without a seed in common are independent, so they are paired in their order.
    """
    if any(len(runs) == 1 and runs[0].record.arm not in (*STUDENT_ARMS, "lora") for runs in (first, second)):
        return [list(first), list(second)]
    one, other = ({run.record.seed: run for run in runs} for runs in (first, second))
    common = [seed for seed in one if seed in other]
    if common:
        return [[runs[seed] for seed in common] for runs in (one, other)]
    count = min(len(first), len(second))
    return [list(first[:count]), list(second[:count])]


def align(predictions: Sequence[Predictions]) -> list[Predictions] | None:
    """Bring predictions into the order of the first; None where ids, labels or label names are not the same."""
    if not predictions or not predictions[0].ids:
        return None
    first, aligned = predictions[0], []
    places = [
        {key: row for row, key in enumerate(zip(one.groups or ("",) * len(one.ids), one.ids, strict=True))}
        for one in predictions
    ]
    for one, rows_of in zip(predictions, places, strict=True):
        if len(one.ids) != len(rows_of) or rows_of.keys() != places[0].keys():
            return None
        if set(one.label_names) != set(first.label_names):
            return None
        columns = [one.label_names.index(name) for name in first.label_names]
        aligned.append(_reorder(one, [rows_of[key] for key in places[0]], columns))
    labels = [np.asarray(one.labels) for one in aligned]  # None where there are none
    return aligned if all(np.array_equal(one, labels[0]) for one in labels) else None


def _reorder(one: Predictions, rows: list[int], columns: list[int]) -> Predictions:
    """Take rows and columns in a given order; label indices follow the columns."""
    labels = None if one.labels is None else one.labels[rows]
    if labels is not None and labels.ndim == 2:
        labels = labels[:, columns]
    elif labels is not None and np.issubdtype(labels.dtype, np.integer):
        labels = np.argsort(columns)[labels]
    ids, split, groups = (
        None if values is None else tuple(values[row] for row in rows) for values in (one.ids, one.split, one.groups)
    )
    names = tuple(one.label_names[column] for column in columns)
    return Predictions(ids or (), split or (), one.logits[rows][:, columns], names, labels, groups)


def retention(experiment: Experiment, arm: str, of: str) -> MeanSd | None:
    """Give the per cent of another arm's mean score that each seed of an arm keeps; a share of nothing is None."""
    whole, runs = experiment.score(of), experiment.finished(arm)
    if whole is None or whole.mean <= 0 or not runs:
        return None
    scores = [run.score(experiment.split) for run in runs]
    return mean_sd([100 * value / whole.mean for value in scores if value is not None])
