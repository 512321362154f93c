"""One experiment as a section of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlora.report.answer import answer, cautions, key_figures
from kdlora.report.blocks import Block, Bullets, Code, Figure, Paragraph, Section
from kdlora.report.collect import Experiment
from kdlora.report.costs import PARAMETERS, TIME, Cost
from kdlora.report.findings import Comparison, compare_arms
from kdlora.report.outputs import error_blocks, example_blocks
from kdlora.report.plots import Curve, Series, Style, arm_style, differences, learning_curves, score_against_cost
from kdlora.report.shipped_tables import shipped_blocks, shipped_tiles
from kdlora.report.tables import Links, claims_table, cost_table, difference_table, run_table, score_table
from kdlora.report.wording import ARMS, arm_title, score_title


def experiment_section(experiment: Experiment, *, number: int, base: Path, draws: int) -> Section:
    """Tell the whole story of one experiment: answer, tables, plots, examples, runs, environment."""
    mark = f"e{number}"
    links = Links(base, f"{mark}-runs")
    comparisons = compare_arms(experiment, draws=draws)
    tiles = (key_figures(experiment, comparisons, f"#{links.runs}"), shipped_tiles(experiment, f"#{mark}-shipped"))
    top: list[Block] = [Paragraph(answer(experiment, comparisons), "lead"), *(row for row in tiles if row is not None)]
    explained = Bullets(tuple((f"{': '.join(ARMS[arm])}.",) for arm in experiment.arms if arm in ARMS))
    parts: tuple[tuple[str, str, Sequence[Block | None]], ...] = (
        ("Score", "score", _score_blocks(experiment, comparisons, links, mark)),
        ("Cost", "cost", _cost_blocks(experiment, links, mark)),
        ("As shipped", "shipped", shipped_blocks(experiment, links, mark)),
        ("Training", "training", _training_blocks(experiment, mark)),
        ("What it gets wrong", "errors", error_blocks(experiment, mark)),
        ("Where teacher and student disagree most", "examples", example_blocks(experiment)),
        ("Runs", "runs", [run_table(experiment, links), explained]),
        ("How it was made", "made", _provenance(experiment)),
    )
    sections = [
        Section(title, f"{mark}-{anchor}", tuple(block for block in blocks if block is not None))
        for title, anchor, blocks in parts
    ]
    cautioned = (*top, *cautions(experiment, comparisons))
    return Section(experiment.name, mark, cautioned, tuple(part for part in sections if part.blocks))


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
    def plot(name: str, cost: Cost) -> Figure | None:
        series = [
            Series(arm_title(arm), arm_style(arm), cost.points(experiment.finished(arm), experiment.split))
            for arm in experiment.arms
        ]
        score = f"score on {experiment.split} (0 to 100)"
        title, identity = f"Score against {name}", f"{mark}-{name}"
        return score_against_cost(series, title=title, cost=cost.axis, score=score, identity=identity)

    return [cost_table(experiment, links), plot("parameters", PARAMETERS), plot("latency", TIME)]


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
    facts += _truncated(experiment)
    for title, values in (
        ("Machine", [record.machine for record in records]),
        ("Versions", [record.versions for record in records]),
        ("Code", [record.git for record in records]),
    ):
        distinct = list(dict.fromkeys(_pairs(one) for one in values if one))
        differ = " (the runs differ)" if len(distinct) > 1 else ""
        facts += [f"{title}{differ}: {text}." for text in distinct]
    facts += dict.fromkeys(text for record in records for text in record.notes)
    config = next((record.config for record in records if record.config), None)
    code = Code("Configuration", json.dumps(config, indent=2, ensure_ascii=False)) if config else None
    return [Bullets(tuple((fact,) for fact in facts)), code]


def _truncated(experiment: Experiment) -> list[str]:
    """Say how many texts were cut, arms with the same counts together."""
    arms_of: dict[str, list[str]] = {}
    for arm in experiment.arms:
        cut = next((run.record.truncated for run in experiment.finished(arm)), {})
        if any(cut.values()):
            arms_of.setdefault(_pairs(cut), []).append(arm_title(arm))
    return [f"Texts cut at the maximum length: {cut} ({', '.join(arms)})." for cut, arms in arms_of.items()]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
