"""What speaks against a teacher, found before it labels: a control that is better, a class it does not know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kdlora.config import TEACHER_ARMS, Config
from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.records import ExperimentLayout, RunRecord

_FEWEST_ROWS = 3
"""Validation rows that a class needs before it counts as unknown to a teacher that gets none of them right."""
_SHOWN = 5


def doubts_of_teacher(config: Config, layout: ExperimentLayout, records: Sequence[RunRecord]) -> list[str]:
    """Say what speaks against the teacher on the validation rows, and what to do about it.

    Args:
        config: the experiment.
        layout: its folder.
        records: of the runs so far.

    Returns:
        Plain sentences; none where the teacher is better than every control and knows every class.
    """
    finished = [record for record in records if record.status == "finished" and record.score is not None]
    teachers = [record for record in finished if record.arm == "fft" and record.seed == config.teacher_seed]
    if not teachers:
        return []
    teacher = teachers[0]
    task = Task.from_dict(teacher.task)
    place = layout.run("fft", teacher.seed).predictions
    unknown = _unknown_classes(task, read_predictions(place)) if place.exists() else []
    found = [*_better_controls(teacher, finished), *_about(unknown)]
    return [f"{sentence} {_remedy(config)}" for sentence in found]


def _better_controls(teacher: RunRecord, finished: Sequence[RunRecord]) -> Iterator[str]:
    controls = [
        record for record in finished if record.arm not in TEACHER_ARMS and (record.score or 0.0) > _score(teacher)
    ]
    if controls:
        best = max(controls, key=_score)
        words = best.arm == "words"
        name = "words, a bag of words," if words else f"{best.arm} without a teacher"
        yield (
            f"The teacher is below {'a bag of words' if words else 'its student’s control'}: on validation it has "
            f"{_score(teacher):.1f}, {name} {_score(best):.1f}. What it teaches can then hardly help."
        )


def _score(record: RunRecord) -> float:
    return record.score or 0.0


def _about(unknown: Sequence[str]) -> Iterator[str]:
    if unknown:
        names = ", ".join(map(repr, unknown[:_SHOWN])) + (
            f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        )
        yield f"The teacher gets no validation row of {names} right: it does not know what it would teach there."


def _unknown_classes(task: Task, predictions: Predictions) -> list[str]:
    """Name the classes of which a teacher gets none of the validation rows right."""
    seen = predictions.only("validation")
    if task.kind != "single-label" or seen.labels is None:
        return []
    labels = np.asarray(seen.labels, dtype=np.int64)
    right = seen.logits.argmax(axis=1) == labels
    rows, known = (np.bincount(part, minlength=task.num_labels) for part in (labels, labels[right]))
    return [
        name
        for name, all_, some in zip(task.label_names, rows, known, strict=True)
        if all_ >= _FEWEST_ROWS and not some
    ]


def _remedy(config: Config) -> str:
    if config.given_teacher:
        return "Give another teacher, or ship the control."
    train = config.teacher.train
    return (
        f"Train the teacher longer (teacher.train.epochs, now {train.epochs:g}), at another rate "
        f"(teacher.train.learning_rate, now {train.learning_rate:g}), or name another teacher.model."
    )
