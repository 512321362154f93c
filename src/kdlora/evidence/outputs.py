"""Plots and tables of what a model says: confusions, residuals, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdlora.data.tasks import Task
from kdlora.evidence.blocks import Cell, Figure, LegendItem, Table
from kdlora.evidence.calibration import Reliability, probabilities, reliability
from kdlora.evidence.metrics import predict_labels
from kdlora.evidence.stats import mean_sd
from kdlora.evidence.svg import Drawing, Style, padded, shorten, swatch
from kdlora.evidence.wording import plus_minus, signed

MOST_CLASSES = 10
_MOST_POINTS = 1200


@dataclass(frozen=True)
class Outputs:
    """Logits of one arm, one array for each seed, with the labels of the same rows."""

    name: str
    style: Style
    logits: tuple[np.ndarray, ...]
    labels: np.ndarray


def confusion_counts(task: Task, outputs: Outputs) -> np.ndarray:
    """Count (label, decision) pairs, as a mean over seeds.

    Args:
        task: single-label.
        outputs: of one arm.

    Returns:
        float64 (labels, labels): rows are labels, columns decisions.
    """
    size = task.num_labels
    places = np.concatenate([outputs.labels * size + predict_labels(task, one) for one in outputs.logits])
    counts = np.bincount(places, minlength=size * size).reshape(size, size)
    return counts / len(outputs.logits)


def confusion_plot(task: Task, outputs: Outputs, *, identity: str) -> Figure:
    """Draw the confusion matrix as shares of each label.

    Args:
        task: single-label, with few labels.
        outputs: of one arm.
        identity: unique in the page.
    """
    counts = confusion_counts(task, outputs)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = task.num_labels
    drawing = Drawing(height=400, left=118, top=34, bottom=92)
    wide, high = (drawing.right - drawing.left) / size, (drawing.bottom - drawing.top) / size
    for row in range(size):
        y = drawing.top + row * high
        drawing.text(
            drawing.left - 8,
            y + high / 2 + 4,
            shorten(task.label_names[row], 14),
            "tick end",
            title=task.label_names[row],
        )
        for column in range(size):
            x, share = drawing.left + column * wide, shares[row, column]
            names = f"{task.label_names[row]} decided as {task.label_names[column]}"
            hover = f"{names}: {100 * share:.1f}%, {counts[row, column]:.1f} rows"
            drawing.rectangle(x + 1, y + 1, wide - 2, high - 2, "heat", opacity=0.04 + 0.96 * share, title=hover)
            css = "heat-text middle strong-heat" if share > 0.5 else "heat-text middle"
            drawing.text(x + wide / 2, y + high / 2 + 5, f"{100 * share:.0f}%", css)
    for column in range(size):
        x = drawing.left + (column + 0.5) * wide
        name = shorten(task.label_names[column], max(4, int(wide / 9)))
        drawing.text(x, drawing.bottom + 20, name, "tick middle", title=task.label_names[column])
    drawing.text((drawing.left + drawing.right) / 2, drawing.bottom + 46, "decision", "axis-label middle")
    drawing.text(drawing.left - 8, drawing.top - 14, "label", "axis-label end")
    drawing.height = int(drawing.bottom + 56)
    title = f"Confusion matrix of {outputs.name}"
    right = "; ".join(f"{name} {100 * shares[row, row]:.0f}%" for row, name in enumerate(task.label_names))
    description = f"Share of each label's rows that is decided rightly: {right}."
    caption = f"Each row adds up to 100%. {_over(outputs)}"
    return Figure(title, drawing.render(title, description, identity), description, caption)


def confusion_table(task: Task, outputs: Outputs, *, most: int = 12) -> Table:
    """List the most frequent confusions, for tasks with more labels than a matrix can show.

    Args:
        task: single-label.
        outputs: of one arm.
        most: rows of the table.
    """
    counts = confusion_counts(task, outputs)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), task.num_labels) for place in order]
    rows = tuple(
        (
            Cell(task.label_names[label]),
            Cell(task.label_names[decision]),
            Cell(f"{counts[label, decision]:.1f}"),
            Cell(f"{100 * counts[label, decision] / totals[label]:.0f}%"),
        )
        for label, decision in pairs
        if counts[label, decision] > 0
    )
    columns = ("label", "taken for", "rows", "of the label's rows")
    return Table(
        f"Most frequent confusions of {outputs.name}", columns, rows, frozenset({2, 3}), note=_over(outputs), side=True
    )


def label_table(task: Task, outputs: Outputs, teacher: Outputs | None) -> Table:
    """List precision, recall and F1 of every label of a multi-label task.

    Args:
        task: multi-label.
        outputs: of the student.
        teacher: of the teacher, where its predictions are known.
    """
    found = [_per_label(task, one, outputs.labels) for one in outputs.logits]
    before = [_per_label(task, one, teacher.labels)[2] for one in teacher.logits] if teacher else []
    columns = ("label", "rows", "precision", "recall", "F1", *(("teacher's F1",) if before else ()))
    rows = []
    for number, name in enumerate(task.label_names):
        figures = [plus_minus(mean_sd([100 * seed[part][number] for seed in found])) for part in range(3)]
        if before:
            figures.append(plus_minus(mean_sd([100 * seed[number] for seed in before])))
        rows.append((Cell(name), Cell(f"{int(outputs.labels[:, number].sum())}"), *map(Cell, figures)))
    caption = f"Each label under {outputs.name}"
    return Table(
        caption,
        columns,
        tuple(rows),
        frozenset(range(1, len(columns))),
        note="Per cent, mean ± standard deviation over seeds.",
        side=True,
    )


def _per_label(task: Task, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give precision, recall and F1 of each label, 0 where there is nothing to divide by."""
    decided = predict_labels(task, logits)
    hits = (decided * labels).sum(axis=0)
    said, true = decided.sum(axis=0), labels.sum(axis=0)
    return hits / np.maximum(said, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(said + true, 1)


def residual_plot(outputs: Outputs, *, quantity: str, identity: str) -> Figure:
    """Draw predictions of one seed against labels of a regression task.

    Args:
        outputs: of one arm; the first seed is drawn.
        quantity: name of what is predicted.
        identity: unique in the page.
    """
    predicted, true = outputs.logits[0][:, 0].astype(float), outputs.labels.astype(float)
    residuals = predicted - true
    shown = np.linspace(0, len(true) - 1, min(len(true), _MOST_POINTS)).astype(int)
    drawing = Drawing(height=360)
    low, high = padded([*true[shown].tolist(), *predicted[shown].tolist()], margin=0.05, least=1e-6)
    x, y = drawing.x_scale(low, high), drawing.y_scale(low, high)
    drawing.axes(x, y, f"label ({quantity})", f"prediction ({quantity})")
    drawing.line(x(low), y(low), x(high), y(high), "zero")
    for row in shown:
        drawing.mark(x(true[row]), y(predicted[row]), outputs.style, radius=3, css="mark dot")
    title = f"Predictions of {outputs.name} against labels"
    size = np.abs(residuals)
    description = (
        f"Mean error {signed(float(residuals.mean()), 3)}, mean absolute error {size.mean():.3g}, "
        f"root mean squared error {np.sqrt((residuals**2).mean()):.3g}; the worst is off by {size.max():.3g}."
    )
    part = "" if len(shown) == len(true) else f" {len(shown)} of {len(true)} rows are drawn."
    caption = f"{description} One seed; on the line, prediction and label agree.{part}"
    return Figure(title, drawing.render(title, description, identity), description, caption)


def residual_histogram(outputs: Outputs, *, quantity: str, identity: str) -> Figure:
    """Draw how the errors of one seed are distributed.

    Args:
        outputs: of one arm; the first seed is drawn.
        quantity: name of what is predicted.
        identity: unique in the page.
    """
    residuals = outputs.logits[0][:, 0].astype(float) - outputs.labels.astype(float)
    reach = float(np.abs(residuals).max()) or 1.0
    counts, edges = np.histogram(residuals, bins=21, range=(-reach, reach))
    drawing = Drawing(height=360)
    x, y = drawing.x_scale(-reach, reach), drawing.y_scale(0, float(counts.max()) * 1.08)
    drawing.axes(x, y, f"prediction − label ({quantity})", "rows")
    for number, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        top = y(float(number))
        hover = f"{left:.2f} to {right:.2f}: {number} rows"
        drawing.rectangle(x(left) + 1, top, x(right) - x(left) - 2, drawing.bottom - top, "bar", opacity=1, title=hover)
    drawing.line(x(0), drawing.top, x(0), drawing.bottom, "zero")
    title = f"Residuals of {outputs.name}"
    within = 100 * float(np.mean(np.abs(residuals) <= reach / 4))
    description = f"{within:.0f}% of the errors lie within {reach / 4:.2g} of zero; the largest is {reach:.2g}."
    return Figure(title, drawing.render(title, description, identity), description, f"{description} One seed.")


def calibration_plot(task: Task, arms: Sequence[Outputs], *, identity: str) -> Figure:
    """Draw reliability diagrams of several arms.

    Args:
        task: single-label or multi-label.
        arms: their logits; seeds are pooled for the lines, the error is the mean over seeds.
        identity: unique in the page.
    """
    drawing = Drawing(height=360)
    start = 1 / task.num_labels if task.kind == "single-label" and task.num_labels == 2 else 0.0
    start = 0.5 if task.kind == "multi-label" else start
    pools = [
        _reliability(task, np.concatenate(arm.logits), np.concatenate([arm.labels] * len(arm.logits))) for arm in arms
    ]
    lowest = min(start, *(value for pooled in pools for value in pooled.accuracy))
    x, y = drawing.x_scale(start, 1), drawing.y_scale(np.floor(10 * lowest) / 10, 1)
    drawing.axes(x, y, "confidence of the decision", "share of right decisions")
    drawing.line(x(start), y(start), x(1), y(1), "zero")
    legend, said = [], []
    for arm, pooled in zip(arms, pools, strict=True):
        error = mean_sd([100 * _reliability(task, one, arm.labels).error for one in arm.logits])
        places = [(x(max(one, start)), y(two)) for one, two in zip(pooled.confidence, pooled.accuracy, strict=True)]
        drawing.path(places, arm.style)
        for place, number in zip(places, pooled.count, strict=True):
            radius = 3 + 6 * float(np.sqrt(number / sum(pooled.count)))
            drawing.mark(*place, arm.style, radius=radius, title=f"{arm.name}: {number // len(arm.logits)} decisions")
        legend.append(LegendItem(swatch(arm.style, line=True), f"{arm.name}, ECE {plus_minus(error)}%"))
        said.append(f"{arm.name} {plus_minus(error)}%")
    title = "Calibration"
    description = f"Expected calibration error: {'; '.join(said)}."
    caption = (
        "On the line, a model is right as often as it is sure. "
        "Marks grow with the share of decisions; bins of width 0.1."
    )
    return Figure(title, drawing.render(title, description, identity), description, caption, tuple(legend))


def _reliability(task: Task, logits: np.ndarray, labels: np.ndarray) -> Reliability:
    return reliability(probabilities(logits, task.kind), labels, task.kind)


def _over(outputs: Outputs) -> str:
    """Say what the counts are a mean of."""
    return f"Mean over {len(outputs.logits)} seeds." if len(outputs.logits) > 1 else "One seed."
