"""The answer in one sentence, the key figures, and what a reader must know before believing them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdlora.evidence.blocks import Inline, Paragraph, Strong, Tile, Tiles
from kdlora.evidence.collect import Experiment, Run
from kdlora.evidence.findings import Comparison, control_of, mean_cost, retention, saving
from kdlora.evidence.metrics import predict_labels
from kdlora.evidence.stats import MeanSd
from kdlora.evidence.wording import (
    arm_title,
    change,
    count,
    interval,
    milliseconds,
    model_title,
    plus_minus,
    score_title,
    seeds,
    signed,
    size,
)

_NOTABLE = 1.0
"""Points by which a teacher may be below another arm without a word."""


def total_parameters(run: Run) -> float | None:
    """Read the size of the model as it is shipped."""
    return run.record.total_parameters


def time_of_one(run: Run) -> float | None:
    """Read the latency at batch 1, milliseconds."""
    return run.latency_ms(1)


def training_memory(run: Run) -> float | None:
    """Read the peak memory of training, bytes."""
    return run.record.peak_memory_bytes


def answer(experiment: Experiment, comparisons: Sequence[Comparison]) -> tuple[Inline, ...]:
    """Say in one sentence what the student keeps, what it saves and what distillation adds.

    Args:
        experiment: the runs.
        comparisons: of the shipped arm with the others.

    Returns:
        Running text; it says what is missing where arms are missing or failed.
    """
    arm = experiment.student_arm
    if arm is None:
        return _without_student(experiment)
    score = experiment.score(arm)
    assert score is not None
    parts = [*_kept(experiment, arm, score), *_saved(experiment, arm), *_gain(experiment, arm, comparisons)]
    if score.n == 1:
        return (*parts, "; all of this from one seed, which is an anecdote.")
    return (*parts, ".")


def _without_student(experiment: Experiment) -> tuple[Inline, ...]:
    """Say that there is no answer yet."""
    teacher = experiment.score("fft")
    rest = "" if teacher is None else f" (the teacher scores {plus_minus(teacher)})"
    return ("There is ", Strong("no answer yet"), f": no student run of {experiment.name} has finished{rest}.")


def _kept(experiment: Experiment, arm: str, score: MeanSd) -> list[Inline]:
    """Give the student's share of the teacher's score, or its score alone."""
    scored = f"{score_title(experiment.task.metrics)} on {experiment.split}, {seeds(score.n)}"
    teacher, kept = experiment.score("fft"), retention(experiment, arm, "fft")
    if teacher is None:
        why = "whose own score is not available" if _is_taught(arm) else "whose teacher was not run"
        return ["The student, ", why, ", scores ", Strong(plus_minus(score)), f" ({scored})"]
    name = model_title(experiment.finished("fft")[0].record.model)
    if kept is None:
        reached = f" against {plus_minus(teacher)} of {name} ({scored})"
        return ["The student scores ", Strong(plus_minus(score)), reached]
    return [
        "The student keeps ",
        Strong(plus_minus(kept, unit="%")),
        f" of {name}’s score ({plus_minus(score)} of {plus_minus(teacher)}; {scored})",
    ]


def _saved(experiment: Experiment, arm: str) -> list[Inline]:
    """Say what the student saves against the teacher."""
    found: list[Inline] = []
    parameters = saving(experiment, total_parameters, arm=arm, than="fft")
    time = saving(experiment, time_of_one, arm=arm, than="fft")
    if parameters is not None:
        found.append(Strong(f"{abs(parameters):.0f}% {'fewer' if parameters >= 0 else 'more'} parameters"))
    if time is not None:
        found.append(Strong(f"{abs(time):.0f}% {'less' if time >= 0 else 'more'} time per text"))
    if not found:
        return []
    return [" with ", found[0], *((" and ", found[1]) if len(found) == 2 else ())]


def _gain(experiment: Experiment, arm: str, comparisons: Sequence[Comparison]) -> list[Inline]:
    """Say what distillation adds over the same student without a teacher."""
    if not _is_taught(arm):
        return ["; it was trained without a teacher"]
    control = control_of(arm)
    found = next((one for one in comparisons if one.second == control), None)
    if found is None:
        return ["; what distillation adds is not known, for lack of a student without a teacher"]
    if found.difference is None:
        return ["; distillation changes the score by ", Strong(_points(found.plain)), f" ({found.reason})"]
    one = found.difference
    span = f"95% interval {interval(one)}, {seeds(min(one.n_seeds))}"
    same = " over the same student without a teacher "
    # What rounds to zero is not claimed as a gain.
    if round(one.low, 1) > 0:
        return ["; distillation adds ", Strong(_points(one.difference)), f"{same}({span})"]
    if round(one.high, 1) < 0:
        return ["; distillation costs ", Strong(_points(-one.difference, plus=False)), f"{same}({span})"]
    return [
        "; distillation makes a difference of ",
        Strong(_points(one.difference)),
        f"{same}({span}: it includes zero, so no gain is shown)",
    ]


def _points(value: float, *, plus: bool = True) -> str:
    """Write a difference of scores."""
    return f"{signed(value, plus=plus)} points"


def _is_taught(arm: str) -> bool:
    """Say whether an arm learns from a teacher."""
    return control_of(arm) is not None


def key_figures(experiment: Experiment, comparisons: Sequence[Comparison], anchor: str) -> Tiles | None:
    """Collect the figures that decide, each beside what it is compared with.

    Args:
        experiment: the runs.
        comparisons: of the shipped arm with the others.
        anchor: of the section that lists the runs.

    Returns:
        The tiles; None without a student.
    """
    arm = experiment.student_arm
    if arm is None:
        return None
    tiles = [_score_tile(experiment, arm, anchor)]
    for label, read, write in (
        ("Parameters", total_parameters, count),
        ("Time per text", time_of_one, milliseconds),
        ("Training memory", training_memory, size),
    ):
        one, teacher = (mean_cost(experiment.finished(name), read) for name in (arm, "fft"))
        if one is not None:
            detail = "no teacher to compare with"
            if teacher is not None and teacher.mean > 0:
                less = "fewer" if read is total_parameters else "less"
                detail = f"{change(teacher.mean, one.mean, less)} than the teacher’s {write(teacher.mean)}"
            tiles.append(Tile(label, write(one.mean), detail, f"#{anchor}"))
    found = next((one for one in comparisons if one.second == control_of(arm)), None)
    if found is not None:
        detail = found.reason if found.difference is None else f"95% interval {interval(found.difference)} points"
        value = found.plain if found.difference is None else found.difference.difference
        tiles.append(Tile("Gain by distillation", signed(value), detail, f"#{anchor}"))
    return Tiles(tuple(tiles))


def _score_tile(experiment: Experiment, arm: str, anchor: str) -> Tile:
    """Show what the student keeps, or its score where there is nothing to keep of."""
    score, teacher, kept = experiment.score(arm), experiment.score("fft"), retention(experiment, arm, "fft")
    if kept is None:
        return Tile("Score", plus_minus(score), score_title(experiment.task.metrics), f"#{anchor}")
    return Tile("Score kept", plus_minus(kept, unit="%"), f"{plus_minus(score)} of {plus_minus(teacher)}", f"#{anchor}")


def cautions(experiment: Experiment, comparisons: Sequence[Comparison]) -> list[Paragraph]:
    """List what limits the answer: failed runs, one seed, selection, what the interval does not cover.

    Args:
        experiment: the runs.
        comparisons: of the shipped arm with the others.

    Returns:
        Warnings first, then notes.
    """
    found = [
        Paragraph((Strong(f"{arm_title(run.record.arm)}, seed {run.record.seed}"), f" {_state(run)}"), "warning")
        for run in experiment.unfinished()
    ]
    found += [
        Paragraph((f"{fault}. The parts that need them leave that run out.",), "warning") for fault in experiment.faults
    ]
    found += _constant_decisions(experiment) + _weak_teacher(experiment)
    numbers = [len(experiment.finished(arm)) for arm in experiment.arms if experiment.finished(arm)]
    if numbers and max(numbers) == 1:
        text = "One seed is an anecdote: another seed may well turn the order of the arms around. Set run.seeds."
        found.append(Paragraph((text,), "warning"))
    if experiment.split == "test":
        text = (
            "Scores are on the test split. Checkpoints, early stopping and the shipped seed were chosen on validation."
        )
    else:
        text = (
            "There is no test split: scores are on the validation split, which also chooses the shipped seed (and the "
            "epoch, with select: best), so the shipped student’s own score is a little too good. Set data.test."
        )
    found.append(Paragraph((text,), "note"))
    if any(one.difference for one in comparisons):
        text = (
            "Intervals come from a paired bootstrap over examples, drawn jointly for both arms and all seeds. They are "
            "conditional on these seeds: the spread over seeds stands beside them as ±, the sample standard deviation."
        )
        found.append(Paragraph((text,), "note"))
    return found


def _state(run: Run) -> str:
    """Say what became of a run that has not finished."""
    if run.record.status == "failed":
        return f"failed: {run.record.error or 'no reason was recorded'}"
    return "has not finished; the same command continues it"


def _weak_teacher(experiment: Experiment) -> list[Paragraph]:
    """Warn where a teacher that was trained here is worse than what it teaches, or than itself with adapters."""
    teacher = experiment.score("fft")
    given = any((run.record.config.get("teacher") or {}).get("fine_tuned") for run in experiment.runs)
    if teacher is None or given:
        return []
    for arm in ("lora", experiment.student_arm):
        other = experiment.score(arm) if arm else None
        if arm and other is not None and other.mean > teacher.mean + _NOTABLE:
            text = (
                f"The teacher scores {teacher.mean:.1f}, below {arm_title(arm)} with {other.mean:.1f}: it may be half "
                "trained, and what it teaches is then of little use. Raise teacher.train.learning_rate or "
                "teacher.train.epochs."
            )
            return [Paragraph((text,), "warning")]
    return []


def _constant_decisions(experiment: Experiment) -> list[Paragraph]:
    """Warn where the shipped arm says the same of every example, which accuracy alone can hide."""
    arm, task = experiment.student_arm, experiment.task
    if arm is None or task.kind == "multi-label":
        return []
    constant = []
    for run in experiment.finished(arm):
        logits = None if run.predictions is None else run.predictions.only(experiment.split).logits
        if logits is not None and len(logits) > 1 and np.ptp(predict_labels(task, logits)) == 0:
            constant.append(str(run.record.seed))
    if not constant:
        return []
    which = f"seed{'s' if len(constant) > 1 else ''} {', '.join(constant)}"
    text = f" ({which}) predicts the same for every example: it has learnt nothing that tells texts apart."
    return [Paragraph((Strong(arm_title(arm)), text), "warning")]
