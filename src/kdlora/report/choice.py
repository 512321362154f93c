"""Which student ships, and why: the best on validation, or the distilled one where it is within the interval of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kdlora.config import DISTILLED_ARMS, STUDENT_ARMS
from kdlora.data.tasks import Task
from kdlora.evidence.stats import Difference
from kdlora.report.findings import Comparison, pair_runs
from kdlora.report.wording import signed, span
from kdlora.system.integrity import hash_json
from kdlora.system.storage import write_json_atomic

if TYPE_CHECKING:
    from kdlora.report.collect import Run

NOTABLE = 1.0
"""Points by which a teacher may be below its student without being called half trained."""


class Choice(BaseModel):
    """What ships, and why; `shipped.json` says what `student/` and `adapter/` are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    arm: str
    seed: int  # the arm's best on validation
    scores: dict[str, float | None]  # mean validation score over the seeds, by student arm
    against: str | None = None  # the arm that it was weighed against
    difference: Difference | None = None  # the shipped arm minus that one, on validation, where they could be paired
    sentence: str  # the choice and its reason, and the teacher where it is below a student
    made_of: str = ""  # hash of what the run left
    files: dict[str, str] = {}  # SHA-256 of what was shipped, by path from the experiment's folder


def read_choice(path: Path) -> Choice | None:
    """Read the experiment's `shipped.json`; None where nothing was shipped, or the file cannot be read."""
    try:
        return Choice.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_choice(path: Path, choice: Choice) -> None:
    """Write the experiment's `shipped.json`, atomically."""
    write_json_atomic(path, choice.model_dump(mode="json"))


def choose_student(task: Task, runs: Sequence[Run]) -> Choice | None:
    """Choose among the student arms with a finished run; the choice does not name its files yet."""
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

    def holds(arm: str) -> bool:
        """Whether an arm may be as good as the best, by the interval of their difference."""
        found = None if arm == best else weigh(arm, best)
        return arm == best or (found is not None and found.difference is not None and found.difference.high >= 0)

    best = max(means, key=lambda name: means[name])  # of equal ones the first
    arm = next((name for name in means if name in DISTILLED_ARMS and holds(name)), best)
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
        sentence=f"{_reason(arm, weighed, is_best=arm == best)}{_teacher(finished)}.",
        made_of=hash_json(run.record.files),
    )


def _known(score: float | None) -> float:
    """Put a score that is not defined below every other."""
    return -np.inf if score is None else score


def _reason(arm: str, weighed: Comparison | None, *, is_best: bool) -> str:
    shipped = f"{describe(arm)} was shipped".replace("the", "The", 1)
    if weighed is None:
        return f"{shipped}: it is the only student with a score"
    found, points, other = weighed.difference, f"{abs(weighed.plain):.1f} points", describe(weighed.second)
    if found is None:
        why = f"is {points} above {other} ({weighed.reason})"
    elif not is_best:
        why = f"is within the interval of the best, {other} ({signed(weighed.plain)} points, {span(found)})"
    elif found.sign == 1:
        why = f"is better than {other} by {points} ({span(found)})"
    else:
        why = f"scores highest, {points} above {other} ({span(found)})"
    return f"{shipped}: on validation it {why}"


def describe(arm: str) -> str:
    """Name a student arm in a sentence: `the student without a teacher (student-lora)`."""
    return f"{'the distilled student' if arm in DISTILLED_ARMS else 'the student without a teacher'} ({arm})"


def _teacher(finished: Sequence[Run]) -> str:
    """Say by how much the teacher is below its best student, on the split of the headline."""
    split = "test" if all(run.record.test_score is not None for run in finished) else "validation"
    own = ((run.record.arm, run.score(split)) for run in finished)
    known = [(arm, score) for arm, score in own if score is not None]
    means = {name: float(np.mean([score for arm, score in known if arm == name])) for name in dict(known)}
    best = max((arm for arm in means if arm in STUDENT_ARMS), key=lambda arm: means[arm], default=None)
    if "fft" not in means or best is None or (gap := means[best] - means["fft"]) < 0.05:
        return ""
    below = f"; on {split} the teacher is {gap:.1f} points below {best}"
    return (
        below
        if gap < NOTABLE or is_teacher_given(finished)
        else f"{below}: it needs longer training, see docs/recipes.md"
    )


def is_teacher_given(runs: Sequence[Run]) -> bool:
    """Say whether the teacher came fine-tuned, so that longer training is no remedy."""
    return any((run.record.config.get("teacher") or {}).get("fine_tuned") for run in runs)
