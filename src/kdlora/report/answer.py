"""The answer in one sentence, the key figures, and what a reader must know before believing them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdlora.config import STUDENT_ARMS
from kdlora.evidence.metrics import predict_labels
from kdlora.evidence.stats import MeanSd
from kdlora.report.blocks import Inline, Paragraph, Strong, Text, Tile, Tiles, note, warning
from kdlora.report.choice import NOTABLE
from kdlora.report.collect import Experiment
from kdlora.report.costs import MEMORY, PARAMETERS, TIME, saving
from kdlora.report.findings import CONTROLS, Comparison, find_gain, retention
from kdlora.report.wording import (
    INTERVALS,
    arm_title,
    change,
    model_title,
    plus_minus,
    score_title,
    seeds,
    signed,
    span,
)

_ENOUGH = 1.0
"""Points by which a bag of words may be below the student and still be told of as good."""


def answer(experiment: Experiment, comparisons: Sequence[Comparison]) -> Text:
    """Say what ships and why, then what it keeps of the teacher, what it saves and what distillation adds."""
    if experiment.choice is None:
        teacher = experiment.score("fft")
        rest = "" if teacher is None else f" (the teacher scores {plus_minus(teacher)})"
        return ("There is ", Strong("no answer yet"), f": no student run of {experiment.name} has finished{rest}.")
    arm = experiment.choice.arm
    score = experiment.score(arm)
    assert score is not None
    subject, verb, rest = experiment.choice.sentence.partition(" was shipped")
    told = Strong(f"{subject}{verb}"), f"{rest} "
    return (*told, *_kept(experiment, arm, score), *_saved(experiment, arm), *_gain(arm, comparisons), ".")


def _kept(experiment: Experiment, arm: str, score: MeanSd) -> list[Inline]:
    """Give the student's share of the teacher's score, or its score alone."""
    scored = f"{score_title(experiment.task.metrics)} on {experiment.split}, {seeds(score.n)}"
    teacher, kept = experiment.score("fft"), retention(experiment, arm, "fft")
    if teacher is None:
        why = "its teacher’s own score is not available" if arm in CONTROLS else "its teacher was not run"
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
    told: list[Inline] = []
    for cost, less, what in ((PARAMETERS, "fewer", "parameters"), (TIME, "less", "time per text")):
        saved = saving(experiment, cost, arm=arm, than="fft")
        if saved is not None:
            told.append(" and " if told else " with ")
            told.append(Strong(f"{abs(saved):.0f}% {less if saved >= 0 else 'more'} {what}"))
    return told


def _gain(arm: str, comparisons: Sequence[Comparison]) -> list[Inline]:
    """Say what distillation adds over the same student without a teacher."""
    found = find_gain(comparisons)
    if found is None:
        taught = "what distillation adds is not known, for lack of a student without a teacher"
        return [f"; {taught if arm in CONTROLS else 'no distilled student was run beside it'}"]
    if found.difference is None:
        return ["; distillation changes the score by ", Strong(f"{signed(found.plain)} points"), f" ({found.reason})"]
    one = found.difference
    told = f" over the same student without a teacher ({span(one)}"
    if one.sign == 1:
        return ["; distillation adds ", Strong(f"{signed(one.difference)} points"), f"{told})"]
    if one.sign == -1:
        return ["; distillation costs ", Strong(f"{signed(-one.difference, plus=False)} points"), f"{told})"]
    zero = "" if one.sign is None else ": it includes zero, so no gain is shown"
    return ["; distillation makes a difference of ", Strong(f"{signed(one.difference)} points"), f"{told}{zero})"]


def key_figures(experiment: Experiment, comparisons: Sequence[Comparison], href: str) -> Tiles | None:
    """Collect the figures that decide, each beside what it is compared with; None without a student."""
    arm = experiment.student_arm
    if arm is None:
        return None
    score, teacher, kept = experiment.score(arm), experiment.score("fft"), retention(experiment, arm, "fft")
    if kept is None or kept.mean > 100:  # there is nothing to keep of
        tiles = [Tile("Score", plus_minus(score), score_title(experiment.task.metrics), href)]
    else:
        share = f"{plus_minus(score)} of {plus_minus(teacher)}"
        tiles = [Tile("Score kept", plus_minus(kept, unit="%"), share, href)]
    for label, cost in (("Parameters", PARAMETERS), ("Time per text", TIME), ("Training memory", MEMORY)):
        one, whole = (cost.mean(experiment.finished(name)) for name in (arm, "fft"))
        if one is not None:
            detail = "no teacher to compare with"
            if whole is not None and whole > 0:
                less = "fewer" if cost is PARAMETERS else "less"
                detail = f"{change(whole, one, less)} than the teacher’s {cost.write(whole)}"
            tiles.append(Tile(label, cost.write(one), detail, href))
    if (found := find_gain(comparisons)) is not None:
        detail = found.reason if found.difference is None else span(found.difference)
        tiles.append(Tile("Gain by distillation", signed(found.plain), detail, href))
    return Tiles(tuple(tiles))


def cautions(experiment: Experiment, comparisons: Sequence[Comparison]) -> list[Paragraph]:
    """List what limits the answer: failed runs, one seed, selection, what the interval does not cover."""
    found = []
    for record in (run.record for run in experiment.unfinished):
        state = "has not finished; the same command continues it"
        if record.status == "failed":
            state = f"failed: {record.error or 'no reason was recorded'}"
        found.append(warning(Strong(f"{arm_title(record.arm)}, seed {record.seed}"), f" {state}"))
    found += [warning(f"{fault}. The parts that need them leave that run out.") for fault in experiment.faults]
    found += [
        told
        for told in (_constant_decisions(experiment), _weak_teacher(experiment), _good_words(experiment))
        if told is not None
    ]
    if max((len(experiment.finished(arm)) for arm in experiment.arms), default=0) == 1:
        found.append(
            warning("One seed: no verdict. Another seed may well turn the order of the arms around. Set run.seeds.")
        )
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
    found.append(note(text))
    if any(one.difference for one in comparisons):
        found.append(note(INTERVALS))
    return found


def _constant_decisions(experiment: Experiment) -> Paragraph | None:
    """Warn where the shipped arm says the same of every example, which accuracy alone can hide."""
    arm, task = experiment.student_arm, experiment.task
    if arm is None or task.kind == "multi-label":
        return None
    constant = []
    for run in experiment.finished(arm):
        logits = None if run.predictions is None else run.predictions.only(experiment.split).logits
        if logits is not None and len(logits) > 1 and np.ptp(predict_labels(task, logits)) == 0:
            constant.append(str(run.record.seed))
    if not constant:
        return None
    which = f"seed{'s' if len(constant) > 1 else ''} {', '.join(constant)}"
    text = f" ({which}) predicts the same for every example: it has learnt nothing that tells texts apart."
    return warning(Strong(arm_title(arm)), text)


def _weak_teacher(experiment: Experiment) -> Paragraph | None:
    """Warn where the teacher is worse than a student, or than itself with adapters."""
    teacher = experiment.score("fft")
    others = {arm: score.mean for arm in ("lora", *STUDENT_ARMS) if (score := experiment.score(arm)) is not None}
    best = max(others, key=lambda arm: others[arm], default=None)
    if teacher is None or best is None or others[best] <= teacher.mean + NOTABLE:
        return None
    text = f"The teacher scores {teacher.mean:.1f}, below {arm_title(best)} with {others[best]:.1f}: what it "
    text += "teaches is of little use. "
    if any((run.record.config.get("teacher") or {}).get("fine_tuned") for run in experiment.runs):
        return warning(f"{text}Give a better one, or ship a student without a teacher.")
    return warning(
        f"{text}It may be half trained: raise teacher.train.epochs or teacher.train.learning_rate (docs/recipes.md)."
    )


def _good_words(experiment: Experiment) -> Paragraph | None:
    """Warn where a bag of words is about as good as the student, or better: then no transformer is needed."""
    words = experiment.score("words")
    student = experiment.score(experiment.student_arm) if experiment.student_arm else None
    if words is None or student is None or words.mean <= student.mean - _ENOUGH:
        return None
    return warning(
        f"A bag of words scores {words.mean:.1f}, the student {student.mean:.1f}: this task may need no transformer, "
        "or these have not learnt it."
    )
