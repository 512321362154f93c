"""One experiment as a section of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.report.answer import answer, cautions, key_figures, time_of_one, total_parameters
from kdlora.report.blocks import Block, Bullets, Code, Figure, Inline, Paragraph, Section
from kdlora.report.collect import Experiment, Run
from kdlora.report.experiment_tables import Links, claims_table, cost_table, difference_table, run_table, score_table
from kdlora.report.findings import Comparison, align, compare_arms
from kdlora.report.outputs import (
    MOST_CLASSES,
    Outputs,
    calibration_plot,
    confusion_plot,
    confusion_table,
    disagreements,
    label_table,
    residual_histogram,
    residual_plot,
)
from kdlora.report.plots import (
    Curve,
    Series,
    Style,
    arm_style,
    differences,
    learning_curves,
    score_against_cost,
)
from kdlora.report.shipped_blocks import shipped_blocks, shipped_tiles
from kdlora.report.wording import ARM_MEANINGS, arm_title, score_title


def experiment_section(experiment: Experiment, *, number: int, base: Path, draws: int = 2_000) -> Section:
    """Tell the whole story of one experiment: answer, tables, plots, examples, runs, environment."""
    mark = f"e{number}"
    links = Links(base, f"{mark}-runs")
    comparisons = compare_arms(experiment, draws=draws)
    tiles = key_figures(experiment, comparisons, links.runs)
    top: list[Block] = [Paragraph(answer(experiment, comparisons), "lead")]
    as_shipped = shipped_tiles(experiment, f"{mark}-shipped")
    top += [row for row in (tiles, as_shipped) if row is not None]
    top += cautions(experiment, comparisons)
    parts = (
        _section("Score", f"{mark}-score", _score_blocks(experiment, comparisons, links, mark)),
        _section("Cost", f"{mark}-cost", _cost_blocks(experiment, links, mark)),
        _section("As shipped", f"{mark}-shipped", shipped_blocks(experiment, links, mark)),
        _section("Training", f"{mark}-training", _training_blocks(experiment, mark)),
        _section("What it gets wrong", f"{mark}-errors", _error_blocks(experiment, mark)),
        _section("Where teacher and student disagree most", f"{mark}-examples", _example_blocks(experiment)),
        _section("Runs", f"{mark}-runs", [run_table(experiment, links), _arm_list(experiment)]),
        _section("How it was made", f"{mark}-made", _provenance(experiment)),
    )
    return Section(experiment.name, mark, tuple(top), tuple(part for part in parts if part.blocks))


def _section(title: str, anchor: str, blocks: Sequence[Block | None]) -> Section:
    """Make a section of the blocks that there are."""
    return Section(title, anchor, tuple(block for block in blocks if block is not None))


def _score_blocks(
    experiment: Experiment, comparisons: Sequence[Comparison], links: Links, mark: str
) -> list[Block | None]:
    """Table 1, the paper's claims where they are asked for, the differences."""
    blocks: list[Block | None] = [score_table(experiment, links)]
    if experiment.shows_paper:
        blocks.append(claims_table(experiment, links))
    if comparisons:
        blocks.append(difference_table(comparisons, links, "Differences in score"))
    paired = [(one.title, one.difference) for one in comparisons if one.difference is not None]
    blocks.append(differences(paired, title="Differences with their intervals", identity=f"{mark}-differences"))
    return blocks


def _cost_blocks(experiment: Experiment, links: Links, mark: str) -> list[Block | None]:
    """Table 2, score against parameters and against latency."""
    score = f"score on {experiment.split} (0 to 100)"

    def plot(read: Callable[[Run], float | None], title: str, cost: str, name: str, scale: float) -> Figure | None:
        series = [_series(experiment, arm, read) for arm in experiment.arms]
        return score_against_cost(series, title=title, cost=cost, score=score, identity=f"{mark}-{name}", scale=scale)

    return [
        cost_table(experiment, links),
        plot(total_parameters, "Score against parameters", "parameters in all (millions)", "parameters", 1e6),
        plot(time_of_one, "Score against latency", "median time of one text (ms)", "latency", 1.0),
    ]


def _series(experiment: Experiment, arm: str, read: Callable[[Run], float | None]) -> Series:
    """Collect the points of one arm."""
    pairs = [(read(run), run.score(experiment.split)) for run in experiment.finished(arm)]
    points = tuple((cost, score) for cost, score in pairs if cost is not None and score is not None)
    return Series(arm_title(arm), arm_style(arm), points)


def _training_blocks(experiment: Experiment, mark: str) -> list[Block | None]:
    """Learning curves of score and of the loss terms."""
    arms = [arm for arm in experiment.arms if experiment.finished(arm)]
    scores = [_curve(experiment, arm, "score", arm_title(arm), arm_style(arm)) for arm in arms]
    students = [arm for arm in arms if arm not in ("fft", "lora")] or arms
    losses = []
    for arm in students:
        style = arm_style(arm)
        losses.append(_curve(experiment, arm, "hard_loss", f"{arm_title(arm)}, hard loss", style))
        soft = Style(style.number, dashed=True)
        losses.append(_curve(experiment, arm, "soft_loss", f"{arm_title(arm)}, soft loss", soft))
    return [
        learning_curves(scores, title="Validation score", value="score on validation", identity=f"{mark}-curve"),
        learning_curves(losses, title="Loss terms of the students", value="training loss", identity=f"{mark}-loss"),
    ]


def _curve(experiment: Experiment, arm: str, key: str, name: str, style: Style) -> Curve:
    """Read one quantity from the histories of an arm."""
    seeds = []
    for run in experiment.finished(arm):
        points = [(_number(entry.get("epoch")), _number(entry.get(key))) for entry in run.record.history]
        kept = tuple((epoch, value) for epoch, value in points if epoch is not None and value is not None)
        if kept:
            seeds.append(kept)
    return Curve(name, style, tuple(seeds))


def _number(value: Any) -> float | None:
    """Take what is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and np.isfinite(value) else None


def _error_blocks(experiment: Experiment, mark: str) -> list[Block | None]:
    """Confusions or residuals of the shipped arm, and calibration."""
    arm, task = experiment.student_arm, experiment.task
    student = _outputs(experiment, arm) if arm else None
    if student is None:
        return [Paragraph(("No predictions were kept, so there is nothing to show here.",), "note")] if arm else []
    teacher = _outputs(experiment, "fft")
    if task.kind == "regression":
        quantity = task.label_names[0]
        return [
            residual_plot(student, quantity=quantity, identity=f"{mark}-residuals"),
            residual_histogram(student, quantity=quantity, identity=f"{mark}-histogram"),
        ]
    known = [one for one in (teacher, student) if one is not None]
    calibration = calibration_plot(task, known, identity=f"{mark}-calibration")
    if task.kind == "multi-label":
        return [label_table(task, student, teacher), calibration]
    if task.num_labels > MOST_CLASSES:
        return [confusion_table(task, student), calibration]
    return [confusion_plot(task, student, identity=f"{mark}-confusion"), calibration]


def _outputs(experiment: Experiment, arm: str) -> Outputs | None:
    """Collect an arm's logits, its rows in one order."""
    kept = [run.predictions.only(experiment.split) for run in experiment.finished(arm) if run.predictions]
    aligned = align(kept) if kept else None
    if aligned is None or aligned[0].labels is None or not all(np.isfinite(one.logits).all() for one in aligned):
        return None
    style = arm_style(arm)
    return Outputs(arm_title(arm), style, tuple(one.logits for one in aligned), aligned[0].labels)


def _example_blocks(experiment: Experiment) -> list[Block | None]:
    """The examples on which teacher and student differ most, or why there are none."""
    if experiment.student_arm is None:
        return []
    found = disagreements(experiment)
    if found is None:
        text = "There are no examples to show: the texts, or the predictions of teacher or student, were not kept."
        return [Paragraph((text,), "note")]
    measure = {
        "single-label": "the Jensen-Shannon divergence of their probabilities",
        "multi-label": "the largest difference in the probability of a label",
        "regression": "the difference of their predictions",
    }[experiment.task.kind]
    return [Paragraph((f"Ordered by {measure}. Some of these are wrong labels: look before training on.",)), found]


def _arm_list(experiment: Experiment) -> Bullets:
    """Explain the arms."""
    known = [arm for arm in experiment.arms if arm in ARM_MEANINGS]
    return Bullets(tuple((arm_title(arm), f": {ARM_MEANINGS[arm]}.") for arm in known))


def _provenance(experiment: Experiment) -> list[Block | None]:
    """Data, truncation, versions, machine, code state, configuration."""
    records = [run.record for run in experiment.runs]
    facts: list[tuple[Inline, ...]] = [(f"Score: {score_title(experiment.task.metrics)}.",)]
    facts += [(f"Rows: {_pairs(records[0].rows)}.",)] if records[0].rows else []
    facts += [(f"Teacher: {records[0].teacher_model}.",)] if records[0].teacher_model else []
    facts += [(f"Student: {records[0].student_model}.",)] if records[0].student_model else []
    facts += _truncated(experiment)
    for title, values in (
        ("Machine", [record.machine for record in records]),
        ("Versions", [record.versions for record in records]),
        ("Code", [record.git for record in records]),
    ):
        distinct = list(dict.fromkeys(_pairs(one) for one in values if one))
        differ = " (the runs differ)" if len(distinct) > 1 else ""
        facts += [(f"{title}{differ}: {text}.",) for text in distinct]
    notes = dict.fromkeys(note for record in records for note in record.notes)
    facts += [(note,) for note in notes]
    config = next((record.config for record in records if record.config), None)
    code = Code("Configuration", json.dumps(config, indent=2, ensure_ascii=False)) if config else None
    return [Bullets(tuple(facts)), code]


def _truncated(experiment: Experiment) -> list[tuple[Inline, ...]]:
    """Say how many texts were cut, arms with the same counts together."""
    arms_of: dict[str, list[str]] = {}
    for arm in experiment.arms:
        cut = next((run.record.truncated for run in experiment.finished(arm)), {})
        if any(cut.values()):
            arms_of.setdefault(_pairs(cut), []).append(arm_title(arm))
    return [(f"Texts cut at the maximum length: {cut} ({', '.join(arms)}).",) for cut, arms in arms_of.items()]


def _pairs(values: dict[str, Any]) -> str:
    """Write a small dictionary in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())
