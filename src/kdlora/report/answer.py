"""The answer in one sentence, the key figures, and what a reader must know before believing them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdlora.config import STUDENT_ARMS
from kdlora.evidence.metrics import predict_labels
from kdlora.evidence.stats import MeanSd
from kdlora.report.blocks import Inline, Paragraph, Strong, Tile, Tiles
from kdlora.report.choice import NOTABLE
from kdlora.report.collect import Experiment, Run
from kdlora.report.findings import Comparison, control_of, find_gain, mean_cost, retention, saving
from kdlora.report.wording import (
    INTERVALS,
    arm_title,
    change,
    count,
    milliseconds,
    model_title,
    plus_minus,
    score_title,
    seeds,
    signed,
    size,
    span,
)


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
    """Say what ships and why, then what it keeps of the teacher, what it saves and what distillation adds.

    Args:
        experiment: the runs.
        comparisons: of the shipped arm with the others.

    Returns:
        Running text; it says what is missing where arms are missing or failed.
    """
    if experiment.choice is None:
        return _without_student(experiment)
    arm = experiment.choice.arm
    score = experiment.score(arm)
    assert score is not None
    subject, verb, rest = experiment.choice.sentence.partition(" was shipped")
    told = Strong(f"{subject}{verb}"), f"{rest} "
    return (*told, *_kept(experiment, arm, score), *_saved(experiment, arm), *_gain(arm, comparisons), ".")


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
        why = "its teacher’s own score is not available" if _is_taught(arm) else "its teacher was not run"
        return ["It scores ", Strong(plus_minus(score)), f" ({scored}; {why})"]
    name = model_title(experiment.finished("fft")[0].record.model)
    if kept is None or kept.mean > 100:  # more than all of it is no share
        return ["It scores ", Strong(plus_minus(score)), f" against {plus_minus(teacher)} of {name} ({scored})"]
    return [
        "It keeps ",
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


def _gain(arm: str, comparisons: Sequence[Comparison]) -> list[Inline]:
    """Say what distillation adds over the same student without a teacher."""
    found = find_gain(comparisons)
    if found is None:
        taught = "what distillation adds is not known, for lack of a student without a teacher"
        return [f"; {taught if _is_taught(arm) else 'no distilled student was run beside it'}"]
    if found.difference is None:
        return ["; distillation changes the score by ", Strong(_points(found.plain)), f" ({found.reason})"]
    one = found.difference
    told = f" over the same student without a teacher ({span(one)}"
    if one.sign == 1:
        return ["; distillation adds ", Strong(_points(one.difference)), f"{told})"]
    if one.sign == -1:
        return ["; distillation costs ", Strong(_points(-one.difference, plus=False)), f"{told})"]
    zero = "" if one.sign is None else ": it includes zero, so no gain is shown"
    return ["; distillation makes a difference of ", Strong(_points(one.difference)), f"{told}{zero})"]


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
    if (found := find_gain(comparisons)) is not None:
        detail = found.reason if found.difference is None else span(found.difference)
        tiles.append(Tile("Gain by distillation", signed(found.plain), detail, f"#{anchor}"))
    return Tiles(tuple(tiles))


def _score_tile(experiment: Experiment, arm: str, anchor: str) -> Tile:
    """Show what the student keeps, or its score where there is nothing to keep of."""
    score, teacher, kept = experiment.score(arm), experiment.score("fft"), retention(experiment, arm, "fft")
    if kept is None or kept.mean > 100:
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
    found += _constant_decisions(experiment) + _weak_teacher(experiment) + _good_words(experiment)
    numbers = [len(experiment.finished(arm)) for arm in experiment.arms if experiment.finished(arm)]
    if numbers and max(numbers) == 1:
        text = "One seed: no verdict. Another seed may well turn the order of the arms around. Set run.seeds."
        found.append(Paragraph((text,), "warning"))
    if experiment.split == "test":
        text = (
            "Scores are on the test split. Checkpoints, early stopping, and the arm and seed that shipped, were chosen "
            "on validation."
        )
    else:
        text = (
            "There is no test split: scores are on the validation split, which also chooses what ships (and the "
            "epoch, with select: best), so the shipped student’s own score is a little too good. Set data.test."
        )
    found.append(Paragraph((text,), "note"))
    if any(one.difference for one in comparisons):
        found.append(Paragraph((INTERVALS,), "note"))
    return found


def _state(run: Run) -> str:
    """Say what became of a run that has not finished."""
    if run.record.status == "failed":
        return f"failed: {run.record.error or 'no reason was recorded'}"
    return "has not finished; the same command continues it"


def _weak_teacher(experiment: Experiment) -> list[Paragraph]:
    """Warn where the teacher is worse than a student, or than itself with adapters."""
    teacher = experiment.score("fft")
    others = {arm: score.mean for arm in ("lora", *STUDENT_ARMS) if (score := experiment.score(arm)) is not None}
    best = max(others, key=lambda arm: others[arm], default=None)
    if teacher is None or best is None or others[best] <= teacher.mean + NOTABLE:
        return []
    text = f"The teacher scores {teacher.mean:.1f}, below {arm_title(best)} with {others[best]:.1f}: what it "
    text += "teaches is of little use. "
    if any((run.record.config.get("teacher") or {}).get("fine_tuned") for run in experiment.runs):
        text += "Give a better one, or ship a student without a teacher."
    else:
        text += "It may be half trained: raise teacher.train.epochs or teacher.train.learning_rate (docs/recipes.md)."
    return [Paragraph((text,), "warning")]


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


_ENOUGH = 1.0
"""Points by which a bag of words may be below the student and still be told of as good."""


def _good_words(experiment: Experiment) -> list[Paragraph]:
    """Warn where a bag of words is about as good as the student, or better: then no transformer is needed."""
    words = experiment.score("words")
    student = experiment.score(experiment.student_arm) if experiment.student_arm else None
    if words is None or student is None or words.mean <= student.mean - _ENOUGH:
        return []
    text = (
        f"A bag of words scores {words.mean:.1f}, the student {student.mean:.1f}: this task may need no transformer, "
        "or these have not learnt it."
    )
    return [Paragraph((text,), "warning")]
