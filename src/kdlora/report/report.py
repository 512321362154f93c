"""The report of one or several experiments."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.config import STUDENT_ARMS
from kdlora.evidence.metrics import predict_labels
from kdlora.evidence.records import ExperimentLayout
from kdlora.report.collect import Experiment, load_experiments
from kdlora.report.deferred import deferral_blocks
from kdlora.report.findings import CONTROLS, NOTABLE, Comparison, compare_arms, find_gain, is_teacher_given, retention
from kdlora.report.outputs import error_blocks, example_blocks
from kdlora.report.page import (
    Block,
    Bullets,
    Code,
    Page,
    Paragraph,
    Prose,
    Report,
    Section,
    Tile,
    Tiles,
    engine,
    write_page,
)
from kdlora.report.plots import Curve, Style, arm_style, differences, learning_curves
from kdlora.report.shipped_tables import shipped_blocks, shipped_tiles
from kdlora.report.tables import (
    MEMORY,
    PARAMETERS,
    TIME,
    Links,
    asked_table,
    claims_table,
    cost_plots,
    cost_table,
    difference_table,
    joint_table,
    run_table,
    saving,
    score_table,
)
from kdlora.report.wording import (
    ARMS,
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


def make_report(folders: Sequence[Path | str], *, out: Path | str | None = None, draws: int = 2_000) -> Report:
    """Write `report.md` and `report.html` of experiments.

    Args:
        folders: experiment folders; different tasks get sections of their own.
        out: folder to write to; by default that of the one experiment, or the folder that holds all of them.
        draws: bootstrap draws.

    Returns:
        Both texts and where they lie.

    Raises:
        ArtifactError: a folder that is not an experiment, or a record that cannot be read.
        OSError: the folder cannot be written, or the disk is full; nothing half-written is left.

    Examples:
        >>> report = make_report(["runs/reviews"])
    """
    experiments = load_experiments(folders)
    places = list(dict.fromkeys(map(Path, folders)))
    common = places[0] if len(places) == 1 else os.path.commonpath([place.resolve().parent for place in places])
    base = Path(common if out is None else out)
    sections = [_section(one, f"e{n}", base, draws) for n, one in enumerate(experiments, start=1)]
    if len(sections) == 1:
        whole = sections[0]
        answered, *blocks = whole.blocks  # the answer is the page's first sentence
        short = Section("In short", whole.anchor, blocks)
        page = Page(whole.title, "report", answered.text, (short, *whole.sections))  # type: ignore[union-attr]
    else:
        overview = Section("All experiments", "all", (joint_table(experiments, base),))
        page = Page(f"{len(experiments)} experiments", "report", _joint_answer(experiments), (overview, *sections))
    layout = ExperimentLayout(base)
    return write_page(page, layout.report_md, layout.report_html)


def _joint_answer(experiments: Sequence[Experiment]) -> Prose:
    found = [retention(one, one.student_arm, one.teacher_arm) for one in experiments if one.student_arm is not None]
    kept = [value.mean for value in found if value is not None]
    if not kept:
        return Prose(
            "There is <strong>no answer yet</strong>: no experiment has both a student and a teacher that finished."
        )
    return Prose(
        "On average over the experiments, the student keeps <strong>{:.1f}%</strong> of its teacher’s score "
        "(from {:.1f}% to {:.1f}%, {} of {} experiments)."
    ).format(np.mean(kept), min(kept), max(kept), len(kept), len(experiments))


def _section(experiment: Experiment, mark: str, base: Path, draws: int) -> Section:
    """Tell the whole story of one experiment: answer, tables, plots, examples, runs, environment."""
    links = Links(base, f"{mark}-runs")
    comparisons = compare_arms(experiment, draws=draws)
    answered, tiles, *cautions = opening(experiment, comparisons, f"#{links.runs}")
    top = [answered, tiles, shipped_tiles(experiment, f"#{mark}-shipped"), *cautions]
    explained = Bullets(tuple(f"{': '.join(ARMS[arm])}." for arm in experiment.arms if arm in ARMS))
    parts: tuple[tuple[str, str, Sequence[Block | None]], ...] = (
        ("Score", "score", _score_blocks(experiment, comparisons, links, mark)),
        ("Cost", "cost", _cost_blocks(experiment, links, mark)),
        ("As shipped", "shipped", shipped_blocks(experiment, links, mark)),
        ("What may be acted on", "deferring", deferral_blocks(experiment, mark)),
        ("Training", "training", _training_blocks(experiment, mark)),
        ("What it gets wrong", "errors", error_blocks(experiment, mark)),
        ("Where teacher and student disagree most", "examples", example_blocks(experiment)),
        ("Runs", "runs", [run_table(experiment, links), explained]),
        ("How it was made", "made", _provenance(experiment)),
    )
    sections = (Section(title, f"{mark}-{anchor}", blocks) for title, anchor, blocks in parts if any(blocks))
    return Section(experiment.name, mark, top, tuple(sections))


def _score_blocks(
    experiment: Experiment, comparisons: Sequence[Comparison], links: Links, mark: str
) -> list[Block | None]:
    paired = [(one.title, one.difference) for one in comparisons if one.difference is not None]
    return [
        score_table(experiment, links),
        claims_table(experiment, links) if experiment.shows_paper else None,
        difference_table(comparisons, links) if comparisons else None,
        differences(paired, title="Differences with their intervals", identity=f"{mark}-differences"),
    ]


def _cost_blocks(experiment: Experiment, links: Links, mark: str) -> list[Block | None]:
    groups = [(arm_title(arm), arm_style(arm), experiment.finished(arm)) for arm in experiment.arms]
    return [cost_table(experiment, links), asked_table(experiment), *cost_plots(groups, experiment.split, mark)]


def _training_blocks(experiment: Experiment, mark: str) -> list[Block | None]:
    records = {arm: [run.record for run in runs] for arm in experiment.arms if (runs := experiment.finished(arm))}
    scores = [Curve.of(arm_title(arm), arm_style(arm), own) for arm, own in records.items()]
    losses = []
    for arm in [arm for arm in records if arm not in ("fft", "lora")] or records:
        style, soft = arm_style(arm), Style(arm_style(arm).number, dashed=True)
        losses.append(Curve.of(f"{arm_title(arm)}, hard loss", style, records[arm], "hard_loss"))
        losses.append(Curve.of(f"{arm_title(arm)}, soft loss", soft, records[arm], "soft_loss"))
    return [
        learning_curves(scores, title="Validation score", value="score on validation", identity=f"{mark}-curve"),
        learning_curves(losses, title="Loss terms of the students", value="training loss", identity=f"{mark}-loss"),
    ]


def _provenance(experiment: Experiment) -> list[Block | None]:
    records = [run.record for run in experiment.runs]
    first = records[0]
    facts = [f"Score: {score_title(experiment.task.metrics)}."]
    facts += [f"Rows: {_pairs(first.rows)}."] if first.rows else []
    facts += [f"Teacher: {first.teacher_model}."] if first.teacher_model else []
    facts += [f"Student: {first.student_model}."] if first.student_model else []
    arms_of: dict[str, list[str]] = {}  # how many texts were cut, arms with the same counts together
    for arm in experiment.arms:
        cut = next((run.record.truncated for run in experiment.finished(arm)), {})
        if any(cut.values()):
            arms_of.setdefault(_pairs(cut), []).append(arm_title(arm))
    facts += [f"Texts cut at the maximum length: {cut} ({', '.join(arms)})." for cut, arms in arms_of.items()]
    for title, part in (("Machine", "machine"), ("Versions", "versions"), ("Code", "git")):
        distinct = list(dict.fromkeys(_pairs(one) for record in records if (one := getattr(record, part))))
        differ = " (the runs differ)" if len(distinct) > 1 else ""
        facts += [f"{title}{differ}: {text}." for text in distinct]
    facts += dict.fromkeys(text for record in records for text in record.notes)
    config = next((record.config for record in records if record.config), None)
    code = Code("Configuration", json.dumps(config, indent=2, ensure_ascii=False)) if config else None
    return [Bullets(tuple(facts)), code]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


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
    arm, taught_by = experiment.student_arm, experiment.teacher_arm
    facts: dict[str, object] = {
        "arm": arm,
        "name": experiment.name,
        "split": experiment.split,
        "faults": experiment.faults,
        "unfinished": [run.record for run in experiment.unfinished],
        "teacher": experiment.score(taught_by),
        "words": experiment.score("words"),
        "score": experiment.score(arm) if arm else None,
        "most_seeds": max((len(experiment.finished(one)) for one in experiment.arms), default=0),
        "notable": NOTABLE,
        "given": is_teacher_given(experiment.runs),
        "adapted": taught_by == "lora",
        "constant": _constant_seeds(experiment),
        "gain": find_gain(comparisons),
        "paired": any(one.difference for one in comparisons),
        "intervals": INTERVALS,
    }
    others: dict[str, float] = {
        one: score.mean
        for one in ("lora", *STUDENT_ARMS)
        if one != taught_by and (score := experiment.score(one)) is not None
    }
    facts |= {"others": others, "best": max(others, key=others.__getitem__, default=None)}
    if experiment.choice is not None:
        subject, verb, reason = experiment.choice.sentence.partition(" was shipped")
        facts |= {"shipped": f"{subject}{verb}", "reason": reason, "distilled": arm in CONTROLS}
    if arm is not None:
        seeds = len(experiment.finished(arm))
        metric = f"{score_title(experiment.task.metrics)} on {experiment.split}"
        facts["scored"] = f"{metric}, {'one seed' if seeds == 1 else f'{seeds} seeds'}"
        facts["kept"] = retention(experiment, arm, taught_by)
        title = next((model_title(run.record.model) for run in experiment.finished(taught_by)), "")
        facts["teacher_model"] = f"{title} (LoRA)" if title and taught_by == "lora" else title
        costs = ((PARAMETERS, "fewer", "parameters"), (TIME, "less", "time per text"))
        facts["savings"] = [(saving(experiment, cost, arm=arm, than=taught_by), *words) for cost, *words in costs]
    return facts


def _constant_seeds(experiment: Experiment) -> list[str]:
    """List the seeds whose shipped arm says the same of every example, which accuracy alone can hide."""
    if experiment.student_arm is None or experiment.task.kind == "multi-label":
        return []
    seeds = []
    for run in experiment.finished(experiment.student_arm):
        if run.predictions is None:
            continue
        found = run.predictions.only(experiment.split)
        if len(found.logits) > 1 and np.ptp(predict_labels(experiment.task, found.logits, found.offsets)) == 0:
            seeds.append(str(run.record.seed))
    return seeds


def _tiles(experiment: Experiment, comparisons: Sequence[Comparison], href: str) -> Tiles | None:
    """Collect the figures that decide, each beside what it is compared with; None without a student."""
    arm, taught_by = experiment.student_arm, experiment.teacher_arm
    if arm is None:
        return None
    score, teacher, kept = (
        experiment.score(arm),
        experiment.score(taught_by),
        retention(experiment, arm, taught_by),
    )
    if kept is None or kept.mean > 100:  # there is nothing to keep of
        tiles = [Tile("Score", plus_minus(score), score_title(experiment.task.metrics), href)]
    else:
        share = f"{plus_minus(score)} of {plus_minus(teacher)}"
        tiles = [Tile("Score kept", plus_minus(kept, unit="%"), share, href)]
    for label, cost in (("Parameters", PARAMETERS), ("Time per text", TIME), ("Training memory", MEMORY)):
        one, whole = (cost.mean(experiment.finished(name)) for name in (arm, taught_by))
        if one is not None:
            less = "fewer" if cost is PARAMETERS else "less"
            detail = f"{change(whole, one, less)} than the teacher’s {cost.write(whole)}" if whole else ""
            tiles.append(Tile(label, cost.write(one), detail or "no teacher to compare with", href))
    if (found := find_gain(comparisons)) is not None:
        detail = found.reason if found.difference is None else span(found.difference)
        tiles.append(Tile("Gain by distillation", signed(found.plain), detail, href))
    return Tiles(tuple(tiles))
