"""The part of the report on what becomes of outputs: thresholds of labels, the promised error rate, and its curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdlora.errors import counted, told_apart
from kdlora.evidence.defer import EVERYTHING, POINTS, Deferral, Deferring, FittedModel, Threshold, Thresholds, stated
from kdlora.evidence.records import ExperimentLayout, RunRecord
from kdlora.report.collect import Experiment
from kdlora.report.page import Block, Figure, Paragraph, Table
from kdlora.report.plots import PALETTE, Style, arm_style, draw, named
from kdlora.report.shipped import read_part
from kdlora.report.wording import arm_title, shown

_SHIPPED = {"student": 6, "student, ONNX": 4, "student, int8": 5, "student, OpenVINO int8": 7}
"""What ships, and its colour; the other models of a plot are arms."""


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _judged_on(found: Thresholds) -> str:
    if found.source == "test":
        return f"{counted(found.judged, 'row')} of the test split"
    return f"{counted(found.judged, 'validation row')}, on which they were fitted, so the figures are a little too good"


def threshold_table(found: Thresholds) -> Table:
    """List every threshold with the file that it is of; the last two columns are of the metric it was fitted for."""
    columns: dict[str, Callable[[tuple[FittedModel, Threshold]], str]] = {
        "model": lambda one: one[0].name,
        "label": lambda one: one[1].label,
        "fitted for": lambda one: one[1].goal,
        "threshold": lambda one: told_apart(one[1].threshold),
        "precision": lambda one: _with_interval(one[1].precision, one[1].precision_low, one[1].precision_high),
        "recall": lambda one: _with_interval(one[1].recall, one[1].recall_low, one[1].recall_high),
        "at 0.5": lambda one: f"{one[1].before:.1%}",
        "at the threshold": lambda one: f"{one[1].after:.1%}",
    }
    gains = "; ".join(f"{one.name} {one.score_before:.2f} to {one.score_after:.2f}" for one in found.models)
    note = (
        f"Fitted on {found.rows:,} validation rows; figures of {_judged_on(found)}. Intervals: 95%. The last two "
        f"columns are of what it was fitted for. Score of the task: {gains}."
    )
    note = " ".join([note, *(f"{one}." for one in found.notes)])
    rows = [(model, label) for model in found.models for label in model.labels]
    return Table.of("Above which probability a label is said", rows, columns, text_columns=3, note=note)


def deferral_blocks(experiment: Experiment) -> list[Block | None]:
    fitted, fault = read_part(experiment.layout.thresholds, Thresholds, "Run kdlora thresholds again.")
    found, other = read_part(experiment.layout.deferral, Deferral, "Run kdlora defer again.")
    blocks: list[Block | None] = [Paragraph(told, "warning") for told in (fault, other) if told]
    if fitted is not None:
        blocks.append(threshold_table(fitted))
    if found is not None:
        told = (
            "A model gives no label where it is less sure than the threshold of its file."
            if any(one.promise.threshold != EVERYTHING for one in found.models if one.promise)
            else "Every text is answered."
        )
        told += f" Of the labels that it gives, at most {stated(found.error, 1)} are wrong, with "
        told += f"{stated(found.confidence, 0)} confidence."
        if bare := [_title(model.name) for model in found.models if model.reason]:
            told += f" Of {', '.join(bare)} nothing can be promised, so every text is answered."
        if not found.promises:
            told = "Nothing can be promised, so every text is answered."
        blocks += [Paragraph(told), *deferral_tables(found), _curves(found)]
    return blocks


def decision_sentences(layout: ExperimentLayout, record: RunRecord) -> list[str]:
    """Say for the model card what becomes of the outputs of `student/`, which a run made."""
    fitted, found = read_part(layout.thresholds, Thresholds, "")[0], read_part(layout.deferral, Deferral, "")[0]
    said = ["a label is said above the probability in kdlora_decisions.json, which suits the score on validation best"]
    said = said if record.threshold is not None and fitted is None else []
    said += [
        f"{label.label} is said above a probability of {told_apart(label.threshold)} (fitted for {label.goal}; "
        f"precision {_with_interval(label.precision, label.precision_low, label.precision_high)}, recall "
        f"{_with_interval(label.recall, label.recall_low, label.recall_high)} on {_judged_on(fitted)}; intervals: 95%)"
        for model in ([] if fitted is None else fitted.models)
        for label in model.labels
        if model.name == "student"
    ]
    for one in [] if found is None else found.models:
        if one.name == "student" and (promise := one.promise) is not None:
            when = "every text is answered"
            if promise.threshold != EVERYTHING:
                when = f"no label is given where the {promise.sureness} is below {_threshold(one)}"
            said.append(
                f"{when}: of the answers, {promise.coverage:.1%} of {promise.rows:,} rows, at most "
                f"{stated(promise.error, 1)} are wrong, with {stated(promise.confidence, 0)} confidence"
            )
    return said


def tell_refusals(models: Sequence[Deferring]) -> str:
    reasons: dict[str, list[str]] = {}
    for model in models:
        reasons.setdefault(model.reason, []).append(model.name)
    return " ".join(f"{'; '.join(names)}: {reason}" for reason, names in reasons.items() if reason)


def deferral_tables(found: Deferral) -> list[Table]:
    columns: dict[str, Callable[[Deferring], str]] = {
        "model": lambda one: _title(one.name),
        "answers": lambda one: shown(one.promise.coverage if one.promise else None, ".1%"),
        "wrong among them": lambda one: f"{one.promise.wrong} of {one.promise.answered}" if one.promise else "–",
        f"least {found.sureness}": _threshold,
        "error, mean over coverages": lambda one: f"{one.area:.2%}",
    }
    asked = "" if found.promises else "asked for: "
    promised = f"{asked}at most {stated(found.error, 1)} wrong with {stated(found.confidence, 0)} confidence"
    parts = [f"{counted(found.rows, 'row')} of {found.source}, {promised}."]
    if found.known:
        parts.append(f"Left out: {counted(found.known, 'training, validation or unlabelled text')}.")
    note = " ".join([*parts, tell_refusals(found.models)]).strip()
    tables = [Table.of("What may be acted on", found.models, columns, note=note)]
    rows = tuple(
        (_title(one.name), met.sureness, *(shown(part, ".1%") for part in (met.coverage, met.deferred, met.told_apart)))
        for one in found.models
        for met in one.unknown
    )
    if rows:
        note = f"{counted(found.unknown, 'text')} of no known class. "
        note += "Each kind of sureness has the threshold it may promise."
        titles = ("model", "sureness", "answers of the known", "deferred of the unknown", "known is surer than unknown")
        tables.append(Table("Texts of no known class", titles, rows, text_columns=2, note=note))
    return tables


def _title(name: str) -> str:
    return f"what ships: {name}" if name in _SHIPPED else arm_title(name)


def _threshold(model: Deferring) -> str:
    if model.promise is None:
        return "–"
    return "none" if model.promise.threshold == EVERYTHING else told_apart(model.promise.threshold)


def _curves(found: Deferral) -> Figure:
    def paint(axes: Any) -> None:
        for model in found.models:
            style = Style(_SHIPPED[model.name], dashed=True) if model.name in _SHIPPED else arm_style(model.name)
            line = "--" if style.dashed else "-"
            risk = 100 * np.array(model.risk)
            axes.plot(100 * POINTS, risk, line, color=style.colour, linewidth=2, label=named(_title(model.name)))
        axes.axhline(100 * found.error, color=PALETTE["soft"], linewidth=1, linestyle=":")
        axes.set(xlabel="share of the texts that is answered (%)", ylabel="wrong among the answers (%)", xlim=(0, 100))
        axes.set_ylim(bottom=0)

    said = "; ".join(
        f"{_title(model.name)} {model.risk[49]:.1%} at half, {model.risk[-1]:.1%} at all" for model in found.models
    )
    rate = "promised rate" if found.promises else "rate that was asked for"
    caption = f"The surest texts first; mean over seeds. Lower is better. The dotted line is the {rate}."
    return draw(paint, "Error against coverage", f"Error rate: {said}.", "risk", caption=caption)
