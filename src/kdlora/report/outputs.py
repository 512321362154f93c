"""What a model says: confusions, residuals, calibration, and where teacher and student differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import rel_entr

from kdlora.data.tasks import Task
from kdlora.evidence.metrics import Reliability, predict_labels, probabilities, reliability
from kdlora.evidence.predictions import Predictions
from kdlora.evidence.stats import mean_sd
from kdlora.report.blocks import Figure, Quotation, Quotations, Table
from kdlora.report.collect import Experiment
from kdlora.report.findings import align
from kdlora.report.plots import PALETTE, Frame, Style, draw, named, padded, scatter, shorten
from kdlora.report.wording import plus_minus, signed

MOST_CLASSES = 10
_MOST_POINTS = 1200
_GUIDE: dict[str, Any] = {"color": PALETTE["soft"], "linestyle": "--", "linewidth": 1.2, "zorder": 1}
_LONGEST = 600


@dataclass(frozen=True)
class Outputs:
    """Logits of one arm, one array for each seed, with the labels of the same rows."""

    name: str
    style: Style
    logits: tuple[np.ndarray, ...]
    labels: np.ndarray


def confusion_counts(task: Task, outputs: Outputs) -> np.ndarray:
    """Count (label, decision) pairs, as a mean over seeds."""
    size = task.num_labels
    places = np.concatenate([outputs.labels * size + predict_labels(task, one) for one in outputs.logits])
    counts = np.bincount(places, minlength=size * size).reshape(size, size)
    return counts / len(outputs.logits)


def confusion_plot(task: Task, outputs: Outputs, *, identity: str) -> Figure:
    """Draw the confusion matrix as shares of each label."""
    counts = confusion_counts(task, outputs)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [shorten(name, 14) for name in task.label_names]
    crowded = max(map(len, names)) * task.num_labels > 36

    def paint(axes: Any) -> None:
        _paint_shares(axes, shares)
        axes.set_xticks(range(task.num_labels), names, rotation=90 if crowded else 0)
        axes.set_yticks(range(task.num_labels), names)
        axes.set(xlabel="decision", ylabel="label")

    title = f"Confusion matrix of {outputs.name}"
    right = "; ".join(f"{name} {100 * shares[row, row]:.0f}%" for row, name in enumerate(task.label_names))
    description = f"Share of each label's rows that is decided rightly: {right}."
    caption = f"Each row adds up to 100%. {_over(outputs)}"
    bottom = 150 if crowded else 50
    return draw(
        paint, title, description, identity, caption=caption, frame=Frame(290 + bottom, left=140, bottom=bottom)
    )


def _paint_shares(axes: Any, shares: np.ndarray) -> None:
    """Draw a field of cells, the darker the larger."""
    from matplotlib.patches import Rectangle

    for (row, column), share in np.ndenumerate(shares):
        look = {"color": PALETTE["series-0"], "alpha": 0.04 + 0.96 * share, "linewidth": 0}
        axes.add_patch(Rectangle((column - 0.49, row - 0.49), 0.98, 0.98, **look))
        colour = PALETTE["card" if share > 0.5 else "ink"]
        axes.text(column, row, f"{100 * share:.0f}%", ha="center", va="center", color=colour, fontweight="bold")
    axes.set(xlim=(-0.5, len(shares) - 0.5), ylim=(len(shares) - 0.5, -0.5))
    axes.grid(visible=False)


def confusion_table(task: Task, outputs: Outputs, *, most: int = 12) -> Table:
    """List the most frequent confusions, for tasks with more labels than a matrix can show."""
    counts = confusion_counts(task, outputs)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), task.num_labels) for place in order]
    rows = tuple(
        (
            task.label_names[label],
            task.label_names[decision],
            f"{counts[label, decision]:.1f}",
            f"{100 * counts[label, decision] / totals[label]:.0f}%",
        )
        for label, decision in pairs
        if counts[label, decision] > 0
    )
    columns = ("label", "taken for", "rows", "of the label's rows")
    caption = f"Most frequent confusions of {outputs.name}"
    return Table(caption, columns, rows, text_columns=2, note=_over(outputs), side=True)


def label_table(task: Task, outputs: Outputs, teacher: Outputs | None) -> Table:
    """List precision, recall and F1 of every label of a multi-label task."""
    found = [_per_label(task, one, outputs.labels) for one in outputs.logits]
    before = [_per_label(task, one, teacher.labels)[2] for one in teacher.logits] if teacher else []
    columns = ("label", "rows", "precision", "recall", "F1", *(("teacher's F1",) if before else ()))
    rows = []
    for number, name in enumerate(task.label_names):
        figures = [plus_minus(mean_sd([100 * seed[part][number] for seed in found])) for part in range(3)]
        if before:
            figures.append(plus_minus(mean_sd([100 * seed[number] for seed in before])))
        rows.append((name, f"{int(outputs.labels[:, number].sum())}", *figures))
    note = "Per cent, mean ± standard deviation over seeds."
    return Table(f"Each label under {outputs.name}", columns, tuple(rows), note=note, side=True)


def _per_label(task: Task, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give precision, recall and F1 of each label, 0 where there is nothing to divide by."""
    decided = predict_labels(task, logits)
    hits = (decided * labels).sum(axis=0)
    said, true = decided.sum(axis=0), labels.sum(axis=0)
    return hits / np.maximum(said, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(said + true, 1)


def residual_plot(outputs: Outputs, *, quantity: str, identity: str) -> Figure:
    """Draw predictions of one seed against labels of a regression task."""
    predicted, true = outputs.logits[0][:, 0].astype(float), outputs.labels.astype(float)
    residuals = predicted - true
    shown = np.linspace(0, len(true) - 1, min(len(true), _MOST_POINTS)).astype(int)
    limits = padded([*true[shown].tolist(), *predicted[shown].tolist()], margin=0.05, least=1e-6)

    def paint(axes: Any) -> None:
        axes.plot(limits, limits, **_GUIDE)
        points = list(zip(true[shown], predicted[shown], strict=True))
        scatter(axes, points, outputs.style, radius=3, alpha=0.4, linewidths=0)
        axes.set(xlim=limits, ylim=limits, xlabel=f"label ({quantity})", ylabel=f"prediction ({quantity})")

    title = f"Predictions of {outputs.name} against labels"
    size = np.abs(residuals)
    description = (
        f"Mean error {signed(float(residuals.mean()), 3)}, mean absolute error {size.mean():.3g}, "
        f"root mean squared error {np.sqrt((residuals**2).mean()):.3g}; the worst is off by {size.max():.3g}."
    )
    part = "" if len(shown) == len(true) else f" {len(shown)} of {len(true)} rows are drawn."
    caption = f"{description} One seed; on the line, prediction and label agree.{part}"
    return draw(paint, title, description, identity, caption=caption, frame=Frame(360))


def residual_histogram(outputs: Outputs, *, quantity: str, identity: str) -> Figure:
    """Draw how the errors of one seed are distributed."""
    residuals = outputs.logits[0][:, 0].astype(float) - outputs.labels.astype(float)
    reach = float(np.abs(residuals).max()) or 1.0
    counts, edges = np.histogram(residuals, bins=21, range=(-reach, reach))

    def paint(axes: Any) -> None:
        axes.bar(edges[:-1], counts, 0.95 * np.diff(edges), align="edge", color=PALETTE["series-1"])
        axes.axvline(0, **_GUIDE)
        axes.set(xlim=(-reach, reach), xlabel=f"prediction − label ({quantity})", ylabel="rows")

    title = f"Residuals of {outputs.name}"
    within = 100 * float(np.mean(np.abs(residuals) <= reach / 4))
    description = f"{within:.0f}% of the errors lie within {reach / 4:.2g} of zero; the largest is {reach:.2g}."
    return draw(paint, title, description, identity, caption=f"{description} One seed.", frame=Frame(360))


def calibration_plot(task: Task, arms: Sequence[Outputs], *, identity: str) -> Figure:
    """Draw reliability diagrams of several arms."""
    start = 1 / task.num_labels if task.kind == "single-label" and task.num_labels == 2 else 0.0
    start = 0.5 if task.kind == "multi-label" else start
    pools = [
        _reliability(task, np.concatenate(arm.logits), np.concatenate([arm.labels] * len(arm.logits))) for arm in arms
    ]
    errors = [
        plus_minus(mean_sd([100 * _reliability(task, one, arm.labels).error for one in arm.logits])) for arm in arms
    ]

    def paint(axes: Any) -> None:
        axes.plot([start, 1], [start, 1], **_GUIDE)
        for arm, pooled, error in zip(arms, pools, errors, strict=True):
            confidence = np.maximum(pooled.confidence, start)
            sizes = (6 + 12 * np.sqrt(np.array(pooled.count) / sum(pooled.count))) ** 2
            colour, label = arm.style.colour, named(f"{arm.name}, ECE {error}%")
            axes.plot(confidence, pooled.accuracy, color=colour, linewidth=2.2)
            marks = {"marker": arm.style.marker, "edgecolors": PALETTE["card"], "zorder": 3, "label": label}
            axes.scatter(confidence, pooled.accuracy, sizes, colour, **marks)
        lowest = min(start, *(value for pooled in pools for value in pooled.accuracy))
        axes.set(xlim=(start, 1.02), ylim=(np.floor(10 * lowest) / 10, 1.03))
        axes.set(xlabel="confidence of the decision", ylabel="share of right decisions")

    said = "; ".join(f"{arm.name} {error}%" for arm, error in zip(arms, errors, strict=True))
    caption = (
        "On the line, a model is right as often as it is sure. "
        "Marks grow with the share of decisions; bins of width 0.1."
    )
    description = f"Expected calibration error: {said}."
    return draw(paint, "Calibration", description, identity, caption=caption, frame=Frame(360))


def _reliability(task: Task, logits: np.ndarray, labels: np.ndarray) -> Reliability:
    return reliability(probabilities(logits, task.kind), labels, task.kind)


def _over(outputs: Outputs) -> str:
    """Say what the counts are a mean of."""
    return f"Mean over {len(outputs.logits)} seeds." if len(outputs.logits) > 1 else "One seed."


def disagreements(experiment: Experiment, *, most: int = 8) -> Quotations | None:
    """Pick the examples whose predictions differ most between teacher and student.

    The teacher is the first `fft` run with predictions, the student the mean over the seeds of the shipped arm.
    Distance: Jensen-Shannon divergence of the two distributions (single-label), the largest difference of a label's
    probability (multi-label), the difference of the predictions (regression).
    """
    arm = experiment.student_arm
    if arm is None or not experiment.examples:
        return None
    teachers, students = (
        [run.predictions.only(experiment.split) for run in experiment.finished(name) if run.predictions]
        for name in ("fft", arm)
    )
    aligned = align([teachers[0], *students]) if teachers and students else None
    if aligned is None:
        return None
    task, first = experiment.task, aligned[0]
    teacher = _soften(task, first.logits)
    student = np.mean([_soften(task, one.logits) for one in aligned[1:]], axis=0)
    order = np.argsort(-_distance(task, teacher, student), kind="stable")
    found = [
        quotation
        for row in order[: 4 * most]
        if (quotation := _quote(experiment, first, int(row), teacher, student, len(students))) is not None
    ]
    return Quotations(tuple(found[:most])) if found else None


def _soften(task: Task, logits: np.ndarray) -> np.ndarray:
    """Give probabilities, or the values themselves for regression."""
    return logits.astype(np.float64) if task.kind == "regression" else probabilities(logits, task.kind)


def _distance(task: Task, teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Measure each row's disagreement."""
    if task.kind == "single-label":
        # Symmetric and bounded: KL would put a sure student beside an unsure teacher above opposite decisions.
        middle = (teacher + student) / 2
        return np.asarray((rel_entr(teacher, middle) + rel_entr(student, middle)).sum(axis=1))
    return np.asarray(np.abs(teacher - student).max(axis=1))


def _quote(
    experiment: Experiment, rows: Predictions, row: int, teacher: np.ndarray, student: np.ndarray, seeds: int
) -> Quotation | None:
    """Put one example into words; None where its text was not kept."""
    example = experiment.examples.get((rows.split[row], rows.ids[row]))
    if example is None:
        return None
    task = experiment.task
    facts = [("id", rows.ids[row])]
    if rows.labels is not None:
        facts.append(("label", _label(task, rows.labels[row])))
    facts.append(("teacher", _opinion(task, teacher[row], student[row])))
    who = "student" if seeds == 1 else f"student, mean of {seeds} seeds"
    facts.append((who, _opinion(task, student[row], teacher[row])))
    pair = None if example.text_pair is None else _cut(example.text_pair)
    return Quotation(_cut(example.text), pair, tuple(facts))


def _label(task: Task, label: np.ndarray) -> str:
    """Name the label of an example."""
    if task.kind == "regression":
        return f"{float(label):.3g}"
    if task.kind == "multi-label":
        names = [name for name, marked in zip(task.label_names, label, strict=True) if marked]
        return ", ".join(names) or "none"
    return task.label_names[int(label)]


def _opinion(task: Task, values: np.ndarray, other: np.ndarray) -> str:
    """Say what one side predicts; for multi-label, on the label that divides the two."""
    if task.kind == "regression":
        return f"{float(values[0]):.3g}"
    if task.kind == "multi-label":
        column = int(np.abs(values - other).argmax())
        return f"{task.label_names[column]}: {100 * values[column]:.0f}%"
    column = int(values.argmax())
    return f"{task.label_names[column]}, {100 * values[column]:.0f}%"


def _cut(text: str) -> str:
    """Keep the beginning of a long text."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
