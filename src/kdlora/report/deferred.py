"""The part of the report on deferring: the error rate that is promised, and error against coverage of every model."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from kdlora.evidence.defer import EVERYTHING, POINTS, Deferral, Deferring
from kdlora.evidence.records import ExperimentLayout
from kdlora.report.collect import Experiment
from kdlora.report.page import Block, Figure, Paragraph, Table
from kdlora.report.plots import PALETTE, Style, arm_style, draw, named
from kdlora.report.wording import arm_title

_SHIPPED = {"student": 6, "student, ONNX": 4, "student, int8": 5}
"""What ships, and its colour; the other models of a plot are arms."""


def deferral_blocks(experiment: Experiment, mark: str) -> list[Block | None]:
    """Show what `kdlora defer` found; nothing where it has not been called."""
    file = ExperimentLayout(experiment.folder).deferral
    if not file.exists():
        return []
    try:
        found = TypeAdapter(Deferral).validate_json(file.read_bytes())
    except ValidationError as fault:
        return [
            Paragraph(f"{file.name} cannot be read ({fault.error_count()} faults); run kdlora defer again.", "warning")
        ]
    told = (
        "A model gives no label where it is less sure than the threshold of its file. Of the labels that it gives, "
        f"at most {found.error:.1%} are wrong, with {found.confidence:.0%} confidence."
    )
    if not any(model.promise for model in found.models):
        told = "Nothing can be promised, so every text is answered."
    return [Paragraph(told), _table(found), _curves(found, mark)]


def _table(found: Deferral) -> Table:
    left_out = f" {found.known} rows were left out: these are training or validation texts." if found.known else ""
    reasons = dict.fromkeys(f" {model.name}: {model.reason}." for model in found.models if model.reason)
    columns = {
        "model": lambda model: _title(model.name),
        "answers": lambda model: f"{model.promise.coverage:.1%}" if model.promise else "–",
        "wrong among them": lambda model: (
            f"{model.promise.wrong} of {model.promise.answered}" if model.promise else "–"
        ),
        f"least {found.sureness}": _threshold,
        "error, mean over coverages": lambda model: f"{model.area:.2%}",
    }
    note = f"{found.rows} rows of {found.source}.{left_out}{''.join(reasons)}"
    return Table.of("What may be acted on", found.models, columns, note=note)


def _title(name: str) -> str:
    return f"what ships: {name}" if name in _SHIPPED else arm_title(name)


def _threshold(model: Deferring) -> str:
    if model.promise is None:
        return "–"
    return "none" if model.promise.threshold == EVERYTHING else f"{model.promise.threshold:.4f}"


def _curves(found: Deferral, mark: str) -> Figure:
    """Plot the error rate of the surest texts against their share."""

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
    caption = "The surest texts first; mean over seeds. Lower is better. The dotted line is the promised rate."
    return draw(paint, "Error against coverage", f"Error rate: {said}.", f"{mark}-risk", caption=caption)
