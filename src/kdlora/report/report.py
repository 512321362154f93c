"""The report of an experiment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.config import STUDENT_ARMS
from kdlora.configfile import expand_home
from kdlora.evidence.metrics import predict_labels
from kdlora.evidence.records import ExperimentLayout
from kdlora.report.collect import Experiment, load_experiment
from kdlora.report.deferred import deferral_blocks
from kdlora.report.findings import Comparison, compare_arms, find_gain, is_teacher_given, retention, retention_interval
from kdlora.report.outputs import error_blocks, example_blocks
from kdlora.report.page import Block, Code, Page, Paragraph, Prose, Report, Section, Tile, engine, write_page
from kdlora.report.plots import Series, arm_style, learning_curves
from kdlora.report.shipped import shipped_blocks
from kdlora.report.tables import MEMORY, PARAMETERS, TIME, cost_blocks, run_table, saving, score_blocks
from kdlora.report.wording import (
    ARMS,
    INTERVALS,
    arm_title,
    change,
    model_title,
    plus_minus,
    points,
    score_title,
    share,
    signed,
    span,
)


def make_report(experiment: Path | str, *, out: Path | str | None = None, draws: int = 2_000) -> Report:
    """Write `report.md` and `report.html` of an experiment.

    Args:
        experiment: its folder.
        out: folder to write to; by default that of the experiment.
        draws: bootstrap draws.

    Returns:
        Both texts and where they lie.

    Raises:
        ArtifactError: a folder that is not an experiment, or a record that cannot be read.
        OSError: the folder cannot be written, or the disk is full; nothing half-written is left.

    Examples:
        >>> report = make_report("runs/reviews")
    """
    layout = ExperimentLayout(expand_home(experiment if out is None else out))
    page = _page(load_experiment(expand_home(experiment), layout.root), draws)
    return write_page(page, layout.report_md, layout.report_html)


def _page(experiment: Experiment, draws: int) -> Page:
    comparisons = compare_arms(experiment, draws=draws)
    answered, cautions = opening(experiment, comparisons)
    short: list[Block | None] = [_tiles(experiment, comparisons, draws), *cautions]
    runs = {arm: experiment.finished(arm) for arm in experiment.arms}
    curves = [Series.of(arm_title(arm), arm_style(arm), [run.record for run in own]) for arm, own in runs.items()]
    training = learning_curves(curves, title="Validation score", value="score on validation", identity="curve")
    told = {arm: what for arm, (_, what) in ARMS.items()}
    if is_teacher_given(experiment.runs):
        told["fft"] = "the teacher, as it was given: scored, not trained here"
    elif experiment.teacher_arm == "lora":
        told |= {"lora": "the teacher, tuned by adapters", "fft": "a model of the teacher's size, all weights tuned"}
    explained = tuple(f"{arm_title(arm)}: {told[arm]}." for arm in experiment.arms if arm in told)
    sections = (
        Section("In short", "short", short),
        Section("Score", "score", score_blocks(experiment, comparisons, draws)),
        Section("Cost", "cost", cost_blocks(experiment)),
        Section("As shipped", "shipped", shipped_blocks(experiment)),
        Section("What may be acted on", "deferring", deferral_blocks(experiment)),
        Section("Training", "training", [training]),
        Section("What it gets wrong", "errors", error_blocks(experiment)),
        Section("Where teacher and student disagree most", "examples", example_blocks(experiment)),
        Section("Runs", "runs", [run_table(experiment), explained]),
        Section("How it was made", "made", _provenance(experiment)),
    )
    return Page(experiment.name, "report", answered, tuple(one for one in sections if any(one.blocks)))


def _provenance(experiment: Experiment) -> list[Block | None]:
    records = [run.record for run in experiment.runs]
    first = records[0]
    known = {"Score": score_title(experiment.task), "Rows": _pairs(first.rows)}
    known |= {"Teacher": first.teacher_model or "", "Student": first.student_model or ""}
    facts = [f"{title}: {value}." for title, value in known.items() if value]
    more = " and ".join(name for name in ("unlabelled", "copies") if name in first.rows) or "unlabelled"
    arms_of: dict[str, list[str]] = {}  # how many texts were cut, arms with the same counts together
    for arm in experiment.arms:
        cut = next((run.record.truncated for run in experiment.finished(arm)), {})
        if any(cut.values()):
            arms_of.setdefault(_pairs(cut).replace("unlabelled", more), []).append(arm_title(arm))
    facts += [f"Texts cut at the maximum length: {cut} ({', '.join(arms)})." for cut, arms in arms_of.items()]
    for title, part in (("Machine", "machine"), ("Versions", "versions"), ("Code", "git")):
        distinct = list(dict.fromkeys(_pairs(one) for record in records if (one := getattr(record, part))))
        differ = " (the runs differ)" if len(distinct) > 1 else ""
        facts += [f"{title}{differ}: {text}." for text in distinct]
    facts += dict.fromkeys(text for record in records for text in record.notes)
    config = next((record.config for record in records if record.config), None)
    code = Code("Configuration", json.dumps(config, indent=2, ensure_ascii=False)) if config else None
    return [tuple(facts), code]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def opening(experiment: Experiment, comparisons: Sequence[Comparison]) -> tuple[Prose, list[Paragraph]]:
    environment = engine("prose")
    environment.filters |= {"figure": plus_minus, "signed": signed, "points": points, "span": span}
    environment.filters |= {"arm_title": arm_title, "share": share}
    words = environment.get_template("answer.html").make_module(_facts(experiment, comparisons))

    def said(part: str) -> list[Prose]:
        return [Prose(line) for line in str(getattr(words, part)()).splitlines() if line]

    cautions = [Paragraph(text, tone[:-1]) for tone in ("warnings", "notes") for text in said(tone)]
    return Prose().join(said("lead")), cautions


def _facts(experiment: Experiment, comparisons: Sequence[Comparison]) -> dict[str, object]:
    arm, taught_by, gain = experiment.student_arm, experiment.teacher_arm, find_gain(comparisons)
    asked = {one for run in experiment.runs for one in run.record.config.get("run", {}).get("arms", ())}
    others = [(score.mean, one) for one in ("lora", *STUDENT_ARMS) if (score := experiment.score(one)) is not None]
    facts: dict[str, object] = {
        "experiment": experiment,
        "arm": arm,
        "no_student_asked": asked and asked.isdisjoint(STUDENT_ARMS),
        "most_seeds": max(len(experiment.finished(one)) for one in STUDENT_ARMS),
        "best": max((one for one in others if one[1] != taught_by), key=lambda one: one[0], default=None),
        "given": is_teacher_given(experiment.runs),
        "own_labels": any(run.record.asked is not None and run.record.asked.own_labels for run in experiment.runs),
        "constant": _constant_seeds(experiment),
        "gain": gain,
        "paired": any(one.difference for one in comparisons),
        "intervals": INTERVALS,
    }
    if arm is None or experiment.choice is None:
        return facts
    subject, verb, reason = experiment.choice.sentence.partition(" was shipped")
    pair = {arm, experiment.choice.against}
    found = [one for one in comparisons if {one.first, one.second} == pair and one.difference]
    tested = found if experiment.split == "test" and not (gain and {gain.first, gain.second} == pair) else []
    metric, seeds = f"{score_title(experiment.task)} on {experiment.split}", len(experiment.finished(arm))
    title = next((model_title(run.record.model) for run in experiment.finished(taught_by)), "")
    fewer, less = (saving(experiment, cost, arm=arm, than=taught_by) for cost in (PARAMETERS, TIME))
    less = None if fewer == 0 else less  # the times of models of one size differ by chance
    told = ((fewer, "fewer", "parameters"), (less, "less", "time per text"))
    return facts | {
        "shipped": subject + (verb if experiment.is_shipped else " would ship by these runs"),
        "reason": f"{reason.rpartition(' (')[0]}." if tested else reason,  # without its interval, which is validation's
        "tested": next(iter(tested), None),
        "scored": f"{metric}, {'one seed' if seeds == 1 else f'{seeds} seeds'}",
        "scored_rows": experiment.finished(arm)[0].record.rows.get(experiment.split),
        "kept": retention(experiment, arm, taught_by),
        "teacher_model": f"{title} (LoRA)" if title and taught_by == "lora" else title,
        "savings": [one for one in told if one[0] and round(one[0])],
    }


def _constant_seeds(experiment: Experiment) -> list[int]:
    """List the seeds whose shipped arm says the same of every example, which accuracy alone can hide."""
    arm, task = experiment.student_arm, experiment.task
    if arm is None or task.kind == "multi-label":
        return []
    kept = [run for run in experiment.finished(arm) if run.predictions is not None]
    found = zip(kept, experiment.predictions(arm), strict=True)
    return [
        run.record.seed
        for run, one in found
        if len(one.logits) > 1
        and np.ptp(predict_labels(task, one.logits, one.offsets)) == 0
        and (task.kind == "tokens" or np.ptp(one.labels) > 0)
    ]


def _tiles(experiment: Experiment, comparisons: Sequence[Comparison], draws: int) -> tuple[Tile, ...]:
    arm, taught_by = experiment.student_arm, experiment.teacher_arm
    if arm is None:
        return ()
    score, teacher = experiment.score(arm), experiment.score(taught_by)
    kept = retention(experiment, arm, taught_by)
    if kept is None or kept.mean > 100:  # there is nothing to keep of
        tiles = [Tile("Score", plus_minus(score), score_title(experiment.task))]
    else:
        both = f"{plus_minus(score)} of {plus_minus(teacher)}"
        if reach := retention_interval(experiment, arm, taught_by, draws=draws):
            both += f"; 95% interval of the share {points(reach.low)} to {points(reach.high)}%"
        tiles = [Tile("Score kept", plus_minus(kept, unit="%"), both)]
    same_size = saving(experiment, PARAMETERS, arm=arm, than=taught_by) == 0
    for label, cost, less in (
        ("Parameters", PARAMETERS, "fewer"),
        ("Time per text", TIME, "less"),
        ("Training memory", MEMORY, "less"),
    ):
        one, whole = (cost.mean(experiment.finished(name)) for name in (arm, taught_by))
        saved = saving(experiment, cost, arm=arm, than=taught_by)
        if not whole:
            detail = "no figure of a teacher"
        elif saved is None:
            detail = "the teacher was measured on another machine, or with another number of threads"
        elif cost is TIME and same_size:
            detail = f"the teacher’s {cost.write(whole)}; times of models of one size differ by chance"
        else:
            detail = f"{change(saved, less)} the teacher’s {cost.write(whole)}"
        if one is not None:
            tiles.append(Tile(label, cost.write(one), detail))
    if (found := find_gain(comparisons)) is not None:
        detail = found.reason if found.difference is None else span(found.difference)
        detail += "" if arm in (found.first, found.second) else f", of {arm_title(found.first)}"
        tiles.append(Tile("Gain by distillation", signed(found.plain), detail))
    return tuple(tiles)
