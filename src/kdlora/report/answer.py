"""The answer in one sentence, the key figures, and what a reader must know: the facts, which `answer.html` words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdlora.config import STUDENT_ARMS
from kdlora.evidence.metrics import predict_labels
from kdlora.report.choice import NOTABLE, is_teacher_given
from kdlora.report.collect import Experiment
from kdlora.report.costs import MEMORY, PARAMETERS, TIME, saving
from kdlora.report.findings import CONTROLS, Comparison, find_gain, retention
from kdlora.report.page import Block, Paragraph, Prose, Tile, Tiles, engine
from kdlora.report.wording import (
    INTERVALS,
    arm_title,
    change,
    model_title,
    plus_minus,
    points,
    score_title,
    signed,
    span,
)


def opening(experiment: Experiment, comparisons: Sequence[Comparison], href: str) -> list[Block | None]:
    """Say what ships and why, what it keeps, saves and gains; then the key figures; then what limits all this."""
    environment = engine("prose")
    environment.filters |= {"figure": plus_minus, "signed": signed, "points": points, "span": span}
    environment.filters["arm_title"] = arm_title
    words = environment.get_template("answer.html").make_module(_facts(experiment, comparisons))

    def said(part: str) -> list[Prose]:
        return [Prose(line) for line in str(getattr(words, part)()).splitlines() if line]

    blocks: list[Block | None] = [Paragraph(Prose().join(said("lead")), "lead"), _tiles(experiment, comparisons, href)]
    return [*blocks, *(Paragraph(text, tone[:-1]) for tone in ("warnings", "notes") for text in said(tone))]


def _facts(experiment: Experiment, comparisons: Sequence[Comparison]) -> dict[str, object]:
    arm = experiment.student_arm
    facts: dict[str, object] = {
        "arm": arm,
        "name": experiment.name,
        "split": experiment.split,
        "faults": experiment.faults,
        "unfinished": [run.record for run in experiment.unfinished],
        "teacher": experiment.score("fft"),
        "words": experiment.score("words"),
        "score": experiment.score(arm) if arm else None,
        "most_seeds": max((len(experiment.finished(one)) for one in experiment.arms), default=0),
        "notable": NOTABLE,
        "given": is_teacher_given(experiment.runs),
        "constant": _constant_seeds(experiment),
        "gain": find_gain(comparisons),
        "paired": any(one.difference for one in comparisons),
        "intervals": INTERVALS,
    }
    others: dict[str, float] = {
        one: score.mean for one in ("lora", *STUDENT_ARMS) if (score := experiment.score(one)) is not None
    }
    facts |= {"others": others, "best": max(others, key=others.__getitem__, default=None)}
    if experiment.choice is not None:
        subject, verb, reason = experiment.choice.sentence.partition(" was shipped")
        facts |= {"shipped": f"{subject}{verb}", "reason": reason, "distilled": arm in CONTROLS}
    if arm is not None:
        seeds = len(experiment.finished(arm))
        metric = f"{score_title(experiment.task.metrics)} on {experiment.split}"
        facts["scored"] = f"{metric}, {'one seed' if seeds == 1 else f'{seeds} seeds'}"
        facts["kept"] = retention(experiment, arm, "fft")
        facts["teacher_model"] = next((model_title(run.record.model) for run in experiment.finished("fft")), "")
        costs = ((PARAMETERS, "fewer", "parameters"), (TIME, "less", "time per text"))
        facts["savings"] = [(saving(experiment, cost, arm=arm, than="fft"), *words) for cost, *words in costs]
    return facts


def _constant_seeds(experiment: Experiment) -> list[str]:
    """List the seeds whose shipped arm says the same of every example, which accuracy alone can hide."""
    if experiment.student_arm is None or experiment.task.kind == "multi-label":
        return []
    seeds = []
    for run in experiment.finished(experiment.student_arm):
        logits = () if run.predictions is None else run.predictions.only(experiment.split).logits
        if len(logits) > 1 and np.ptp(predict_labels(experiment.task, np.asarray(logits))) == 0:
            seeds.append(str(run.record.seed))
    return seeds


def _tiles(experiment: Experiment, comparisons: Sequence[Comparison], href: str) -> Tiles | None:
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
