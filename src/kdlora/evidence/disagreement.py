"""The examples on which teacher and student disagree most."""

from __future__ import annotations

import numpy as np
from scipy.special import rel_entr

from kdlora.data.tasks import Task
from kdlora.evidence.blocks import Quotation, Quotations
from kdlora.evidence.calibration import probabilities
from kdlora.evidence.collect import Experiment
from kdlora.evidence.findings import align
from kdlora.evidence.predictions import Predictions

_LONGEST = 600


def disagreements(experiment: Experiment, *, most: int = 8) -> Quotations | None:
    """Pick the examples whose predictions differ most between teacher and student.

    The teacher is the first `fft` run with predictions, the student the mean over the seeds of the shipped arm.
    Distance: Jensen-Shannon divergence of the two distributions (single-label), the largest difference of a label's
    probability (multi-label), the difference of the predictions (regression).

    Args:
        experiment: the runs.
        most: number of examples.

    Returns:
        The examples with text, label and both predictions; None where teacher, student or texts are missing.
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
