"""What an experiment shows: arms against each other, paired by example, what the student keeps, and which ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from kdlora.config import DISTILLED_ARMS, STUDENT_ARMS
from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions
from kdlora.evidence.stats import Difference, MeanSd, PairedArms, contrast, mean_sd
from kdlora.report.shipped import read_part
from kdlora.report.wording import arm_title, signed, span
from kdlora.system.integrity import hash_json

if TYPE_CHECKING:
    from kdlora.report.collect import Experiment, Run

CONTROLS = {"kd-lora": "student-lora", "kd-fft": "student-fft"}
"""Each distilled arm's control: the arm of the same adapters, rates and steps that its gain is measured over."""
OTHER_ROWS = "not paired: the examples are not the same"
_NEAR = 0.317
"""Two-sided p of a difference of one standard error: few rows choose badly, so an arm that is better on most sets ships
within it (Breiman et al., Classification and Regression Trees, 1984)."""


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
        return f"{arm_title(self.first)} − {arm_title(self.second)}"


def compare_arms(experiment: Experiment, *, draws: int) -> list[Comparison]:
    """Hold the shipped arm against every other, its control first; then each other distilled arm against its own.

    A control stands second, so that the difference is what distillation adds.
    """
    arm = experiment.student_arm
    if arm is None:
        return []
    others = [other for other in experiment.arms if other != arm and experiment.finished(other)]
    pairs = [(other, arm) if CONTROLS.get(other) == arm else (arm, other) for other in others]
    pairs.sort(key=lambda pair: pair != (arm, CONTROLS.get(arm)))
    pairs += [pair for pair in CONTROLS.items() if arm not in pair and set(pair) <= set(others)]
    return [_pair(experiment, pair, draws) for pair in pairs]


def _pair(experiment: Experiment, arms: tuple[str, str], draws: int, *, share: bool = False) -> Comparison:
    first, second = ((arm, experiment.finished(arm)) for arm in arms)
    return pair_runs(experiment.task, experiment.split, first, second, draws=draws, share=share)


def find_gain(comparisons: Sequence[Comparison]) -> Comparison | None:
    """Find what distillation adds, a distilled arm over its control; that of the shipped arm before any other."""
    return next((one for one in comparisons if CONTROLS.get(one.first) == one.second), None)


def pair_runs(
    task: Task,
    split: str,
    first: tuple[str, Sequence[Run]],
    second: tuple[str, Sequence[Run]],
    *,
    draws: int = 2_000,
    share: bool = False,
) -> Comparison:
    """Compare two groups of runs, each with its name, seed by seed and example by example.

    With `share`, `difference` is what the first keeps of the second's score, in per cent.
    """
    plain = _mean_score(first[1], split) - _mean_score(second[1], split)
    kept = [[run for run in runs if run.predictions is not None] for _, runs in (first, second)]
    if not kept[0] or not kept[1]:
        return Comparison(first[0], second[0], None, plain, "not paired: predictions are missing")
    kept = _same_seeds(*kept)
    if not kept:
        return Comparison(first[0], second[0], None, plain, "not paired: no seed in common")
    aligned = align([run.predictions.only(split) for runs in kept for run in runs if run.predictions is not None])
    if aligned is None:
        return Comparison(first[0], second[0], None, plain, OTHER_ROWS)
    logits, cut, one = [one.decided for one in aligned], len(kept[0]), aligned[0]
    arms = PairedArms(task, one.labels, logits[:cut], logits[cut:], one.groups, offsets=one.offsets)
    difference = contrast([arms], draws=draws, share=share)
    return Comparison(first[0], second[0], difference, difference.difference)


def _mean_score(runs: Sequence[Run], split: str) -> float:
    return float(np.mean([value for run in runs if (value := run.score(split)) is not None]))


def _same_seeds(first: Sequence[Run], second: Sequence[Run]) -> list[list[Run]]:
    """Take the seeds that both have, in one order; a single teacher or baseline stands beside every seed.

    Two single runs are compared on their rows, whatever their seeds; else no seed in common leaves nothing to pair.
    """
    lone = [runs[0].record for runs in (first, second) if len(runs) == 1]
    if any(one.arm == one.teacher_arm or one.arm not in (*STUDENT_ARMS, "lora") for one in lone):
        return [list(first), list(second)]
    one, other = ({run.record.seed: run for run in runs} for runs in (first, second))
    common = [seed for seed in one if seed in other]
    if common:
        return [[runs[seed] for seed in common] for runs in (one, other)]
    return [list(first), list(second)] if len(first) == len(second) == 1 else []


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
        if one.label_names != first.label_names:
            return None
        aligned.append(one.take([rows_of[key] for key in places[0]]))
    return aligned if all(np.array_equal(one.labels, aligned[0].labels) for one in aligned) else None


def retention(experiment: Experiment, arm: str, of: str) -> MeanSd | None:
    """Give the per cent of another arm's mean score that each seed of an arm keeps; a share of nothing is None."""
    if (whole := experiment.score(of)) is None or whole.mean <= 0:
        return None
    scores = [run.score(experiment.split) for run in experiment.finished(arm)]
    return mean_sd([100 * value / whole.mean for value in scores if value is not None])


def retention_interval(experiment: Experiment, arm: str, of: str, *, draws: int) -> Difference | None:
    """Give retention with its interval over rows and seeds; None where the runs cannot be paired, or are few."""
    if retention(experiment, arm, of) is None:
        return None
    found = _pair(experiment, (arm, of), draws, share=True).difference
    return None if found is None or found.sign is None or not np.isfinite(found.high) else found


class Choice(BaseModel):
    """What ships, and why; `shipped.json` says what `student/` and `adapter/` are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    arm: str
    seed: int  # the arm's best on validation
    scores: dict[str, float | None]  # mean validation score over the seeds, by student arm
    against: str | None = None  # the arm that it was weighed against
    difference: Difference | None = None  # the shipped arm minus that one, on validation, where they could be paired
    sentence: str  # the choice and its reason
    made_of: str = ""  # hash of what the run left
    files: dict[str, str] = {}  # SHA-256 of what was shipped, by path from the experiment's folder


def read_choice(path: Path) -> Choice | None:
    return read_part(path, Choice, "")[0]


def choose_student(task: Task, runs: Sequence[Run]) -> Choice | None:
    finished = [run for run in runs if run.record.status == "finished"]
    arms: dict[str, list[Run]] = {
        arm: own for arm in STUDENT_ARMS if (own := [run for run in finished if run.record.arm == arm])
    }
    means = {arm: float(np.mean([_known(run.record.score) for run in own])) for arm, own in arms.items()}
    if not means:
        return None

    def weigh(first: str, second: str) -> Comparison | None:
        if not np.isfinite([means[first], means[second]]).all():
            return None
        return pair_runs(task, "validation", (first, arms[first]), (second, arms[second]))

    def is_near(arm: str) -> bool:
        found = None if arm == best else weigh(arm, best)
        one = None if found is None else found.difference
        return arm == best if one is None else one.p > _NEAR or one.difference > 0  # on the seeds of both

    best = max(means, key=lambda name: (round(means[name], 6), name in DISTILLED_ARMS, name == "kd-fft"))
    arm = next((name for name in ("kd-fft", "kd-lora") if name in means and is_near(name)), best)
    others = [name for name in means if name != arm]
    rivals = [name for name in others if (name in DISTILLED_ARMS) != (arm in DISTILLED_ARMS)] or others
    against = best if arm != best else max(rivals, key=lambda name: means[name], default=None)
    weighed = None if against is None else weigh(arm, against)
    run = max(arms[arm], key=lambda one: (_known(one.record.score), -one.record.seed))
    return Choice(
        arm=arm,
        seed=run.record.seed,
        scores={name: mean if np.isfinite(mean) else None for name, mean in means.items()},
        against=against,
        difference=None if weighed is None else weighed.difference,
        sentence=f"{_reason(arm, weighed, is_best=arm == best)}.",
        made_of=hash_json(run.record.files),
    )


def _known(score: float | None) -> float:
    return -np.inf if score is None else score


def _reason(arm: str, weighed: Comparison | None, *, is_best: bool) -> str:
    shipped = f"{describe(arm)} was shipped".replace("the", "The", 1)
    if weighed is None:
        return f"{shipped}: it is the only student with a score"
    found, points, other = weighed.difference, f"{abs(weighed.plain):.1f} points", describe(weighed.second)
    if found is None:
        why = f"is {points} {'below' if weighed.plain < 0 else 'above'} {other} ({weighed.reason})"
    elif not is_best and weighed.plain > 0:
        why = f"is {points} above {other}, whose own seeds have the highest mean, on those of both ({span(found)})"
    elif not is_best:
        why = f"is within one standard error of the best, {other} ({signed(weighed.plain)} points, {span(found)})"
    elif found.sign == 1:
        why = f"is better than {other} by {points} ({span(found)})"
    elif points == "0.0 points":
        why = f"scores as high as {other} ({span(found)})"
    elif weighed.plain < 0:  # arms whose seeds differ
        why = f"has the highest mean of its own seeds, {points} below {other} on those of both ({span(found)})"
    else:
        why = f"scores highest, {points} above {other} ({span(found)})"
    return f"{shipped}: on validation it {why}"


def describe(arm: str) -> str:
    """Name a student arm in a sentence: `the student without a teacher (student-lora)`."""
    return f"{'the distilled student' if arm in DISTILLED_ARMS else 'the student without a teacher'} ({arm})"


def is_teacher_given(runs: Sequence[Run]) -> bool:
    """Say whether the teacher, or what it says, was given, so that longer training is no remedy."""
    keys = ("fine_tuned", "logits", "probabilities")
    return any((run.record.config.get("teacher") or {}).get(key) for run in runs for key in keys)
