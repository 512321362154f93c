"""The answer in one sentence, the key figures, and what a reader must know before believing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kdlora.config import STUDENT_ARMS
from kdlora.evidence.metrics import predict_labels
from kdlora.report.choice import NOTABLE, is_teacher_given
from kdlora.report.collect import Experiment
from kdlora.report.costs import MEMORY, PARAMETERS, TIME, saving
from kdlora.report.findings import CONTROLS, Comparison, find_gain, retention
from kdlora.report.page import Paragraph, Prose, Tile, Tiles, strong
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


def answer(experiment: Experiment, comparisons: Sequence[Comparison]) -> Prose:
    """Say what ships and why, then what it keeps of the teacher, what it saves and what distillation adds."""
    if experiment.choice is None:
        teacher = experiment.score("fft")
        rest = "" if teacher is None else f" (the teacher scores {plus_minus(teacher)})"
        none = Prose("There is <strong>no answer yet</strong>: no student run of {} has finished{}.")
        return none.format(experiment.name, rest)
    arm = experiment.choice.arm
    subject, verb, reason = experiment.choice.sentence.partition(" was shipped")
    told = Prose("<strong>{}</strong>{} {}{}; {}.")
    parts = _kept(experiment, arm), _saved(experiment, arm), _gain(arm, comparisons)
    return told.format(f"{subject}{verb}", reason, *parts)


def _kept(experiment: Experiment, arm: str) -> Prose:
    """Give the student's share of the teacher's score, or its score alone."""
    score, teacher, kept = experiment.score(arm), experiment.score("fft"), retention(experiment, arm, "fft")
    scored = f"{score_title(experiment.task.metrics)} on {experiment.split}, {seeds(len(experiment.finished(arm)))}"
    if teacher is None:
        why = "its teacher’s own score is not available" if arm in CONTROLS else "its teacher was not run"
        return Prose("It scores <strong>{}</strong> ({}; {})").format(plus_minus(score), scored, why)
    name = model_title(experiment.finished("fft")[0].record.model)
    if kept is None or kept.mean > 100:  # more than all of it is no share
        told = Prose("It scores <strong>{}</strong> against {} of {} ({})")
        return told.format(plus_minus(score), plus_minus(teacher), name, scored)
    told = Prose("It keeps <strong>{}</strong> of {}’s score ({} of {}; {})")
    return told.format(plus_minus(kept, unit="%"), name, plus_minus(score), plus_minus(teacher), scored)


def _saved(experiment: Experiment, arm: str) -> Prose:
    told = Prose()
    for cost, less, what in ((PARAMETERS, "fewer", "parameters"), (TIME, "less", "time per text")):
        if (saved := saving(experiment, cost, arm=arm, than="fft")) is not None:
            share = f"{abs(saved):.0f}% {less if saved >= 0 else 'more'} {what}"
            told += (" and " if told else " with ") + strong(share)
    return told


def _gain(arm: str, comparisons: Sequence[Comparison]) -> str:
    """Say what distillation adds over the same student without a teacher."""
    found = find_gain(comparisons)
    if found is None:
        taught = "what distillation adds is not known, for lack of a student without a teacher"
        return taught if arm in CONTROLS else "no distilled student was run beside it"
    one = found.difference
    if one is None:
        told = Prose("distillation changes the score by <strong>{} points</strong> ({})")
        return told.format(signed(found.plain), found.reason)
    verb = {1: "adds", -1: "costs"}.get(one.sign or 0, "makes a difference of")
    points = signed(-one.difference, plus=False) if one.sign == -1 else signed(one.difference)
    zero = ": it includes zero, so no gain is shown" if one.sign == 0 else ""
    told = Prose("distillation {} <strong>{} points</strong> over the same student without a teacher ({}{})")
    return told.format(verb, points, span(one), zero)


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
            less = "fewer" if cost is PARAMETERS else "less"
            detail = f"{change(whole, one, less)} than the teacher’s {cost.write(whole)}" if whole else ""
            tiles.append(Tile(label, cost.write(one), detail or "no teacher to compare with", href))
    if (found := find_gain(comparisons)) is not None:
        detail = found.reason if found.difference is None else span(found.difference)
        tiles.append(Tile("Gain by distillation", signed(found.plain), detail, href))
    return Tiles(tuple(tiles))


def cautions(experiment: Experiment, comparisons: Sequence[Comparison]) -> list[Paragraph]:
    """List what limits the answer: failed runs, one seed, selection, what the interval does not cover."""
    if experiment.split == "test":
        scored = (
            "Scores are on the test split. Checkpoints, early stopping, and the arm and seed that shipped, were chosen "
            "on validation."
        )
    else:
        scored = (
            "There is no test split: scores are on the validation split, which also chooses what ships (and the "
            "epoch, with select: best), so the shipped student’s own score is a little too good. Set data.test."
        )
    found = [Paragraph(text, "warning") for text in _warnings(experiment)]
    found.append(Paragraph(scored, "note"))
    return [*found, Paragraph(INTERVALS, "note")] if any(one.difference for one in comparisons) else found


def _warnings(experiment: Experiment) -> Iterator[str]:
    for record in (run.record for run in experiment.unfinished):
        state = "has not finished; the same command continues it"
        if record.status == "failed":
            state = f"failed: {record.error or 'no reason was recorded'}"
        yield strong(f"{arm_title(record.arm)}, seed {record.seed}") + f" {state}"
    yield from (f"{fault}. The parts that need them leave that run out." for fault in experiment.faults)
    yield from _constant_decisions(experiment)
    yield from _other_models(experiment)
    if max((len(experiment.finished(arm)) for arm in experiment.arms), default=0) == 1:
        yield "One seed: no verdict. Another seed may well turn the order of the arms around. Set run.seeds."


def _constant_decisions(experiment: Experiment) -> Iterator[str]:
    """Warn where the shipped arm says the same of every example, which accuracy alone can hide."""
    arm, task = experiment.student_arm, experiment.task
    if arm is None or task.kind == "multi-label":
        return
    constant = []
    for run in experiment.finished(arm):
        logits = None if run.predictions is None else run.predictions.only(experiment.split).logits
        if logits is not None and len(logits) > 1 and np.ptp(predict_labels(task, logits)) == 0:
            constant.append(str(run.record.seed))
    if constant:
        which = f"seed{'s' if len(constant) > 1 else ''} {', '.join(constant)}"
        told = "predicts the same for every example: it has learnt nothing that tells texts apart."
        yield strong(arm_title(arm)) + f" ({which}) {told}"


def _other_models(experiment: Experiment) -> Iterator[str]:
    """Warn of a teacher that is worse than a student or than itself with adapters, and of a bag of words as good."""
    teacher, words = experiment.score("fft"), experiment.score("words")
    others: dict[str, float] = {
        arm: score.mean for arm in ("lora", *STUDENT_ARMS) if (score := experiment.score(arm)) is not None
    }
    best = max(others, key=lambda arm: others[arm], default=None)
    if teacher is not None and best is not None and others[best] > teacher.mean + NOTABLE:
        told = f"The teacher scores {teacher.mean:.1f}, below {arm_title(best)} with {others[best]:.1f}: "
        remedy = "It may be half trained: raise teacher.train.epochs or teacher.train.learning_rate (docs/recipes.md)."
        if is_teacher_given(experiment.runs):
            remedy = "Give a better one, or ship a student without a teacher."
        yield f"{told}what it teaches is of little use. {remedy}"
    student = others.get(experiment.student_arm or "")
    if words is not None and student is not None and words.mean > student - _ENOUGH:
        yield (
            f"A bag of words scores {words.mean:.1f}, the student {student:.1f}: this task may need no transformer, "
            "or these have not learnt it."
        )
