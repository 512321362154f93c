"""What the rows of an experiment must hold, so that something can be learnt and its score shows it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from kdlora.config import DataConfig
from kdlora.data.canonical import Reading
from kdlora.data.spool import label_array, read_column
from kdlora.data.tags import NO_TAG
from kdlora.data.tasks import Task
from kdlora.errors import DataError, listed

_FEW = 30
"""With fewer rows, or entities, the choice of weights and of what ships is left to chance."""


def check_labels(task: Task, data: DataConfig, train: Dataset, scored: Mapping[str, Dataset]) -> None:
    """Refuse training rows that teach nothing, and labels elsewhere that training lacks."""
    limited = " Raise data.max_train_examples, which leaves them out." if data.max_train_examples is not None else ""
    if task.kind == "regression":
        labels = read_column(train, "label").to_numpy()
        if np.ptp(labels) == 0:
            raise DataError(f"every training label is {labels[0]}; a regression needs different values.{limited}")
        return
    known, names = used_labels(task, train), task.label_types or task.label_names
    if not known.any():
        nothing = "holds no entity: every word is O" if task.kind == "tokens" else "are all 0"
        raise DataError(
            f"no training row has any label ({', '.join(task.label)} {nothing}); check task.label.{limited}"
        )
    if task.kind == "single-label" and known.sum() < 2:
        only = task.label_names[int(np.flatnonzero(known)[0])]
        raise DataError(f"the training rows hold one class only ({only!r}); a classifier needs two or more.{limited}")
    for split, rows in scored.items():
        if (strange := used_labels(task, rows) & ~known).any():
            lacking = listed(repr(names[column]) for column in np.flatnonzero(strange))
            raise DataError(
                f"the {split} split has labels that training lacks: {lacking}. Add training rows of them.{limited}"
            )


def check_scored(reading: Reading, scored: Mapping[str, Dataset]) -> None:
    """Refuse a validation split whose score cannot show what was learnt; note where a score says little."""
    for split, rows in scored.items():
        labels, found, one, more = label_array(rows), len(rows), "row", "rows"
        if reading.task.kind == "multi-label":
            found, one, more = int(labels.any(axis=1).sum()), "row with labels", "rows with labels"
        elif reading.task.kind == "tokens":
            found, one, more = int(np.sum(labels % 2 == 1)), "entity", "entities"  # each has one `B-`, whose tag is odd
        holds = f"{found or 'no'} {one if found == 1 else more}"
        if reading.task.kind == "regression" and not np.ptp(labels):
            found, more, holds = 0, "rows of several values", f"one value only, {labels[0]:g} (rows: {len(rows)})"
        if split == "validation":
            lacking = [] if reading.task.kind == "regression" else _lacking_labels(reading.task, rows)
            wanted = (metric.partition(":")[2] for metric in reading.task.metrics if not metric.startswith("cost:"))
            missing = next((f"no row with {name!r}, which the score is of" for name in wanted if name in lacking), "")
            if reading.task.kind == "single-label" and len(lacking) == reading.task.num_labels - 1:
                missing = f"one class only, {next(one for one in reading.task.label_names if one not in lacking)!r}"
            if not found or missing:  # then every model has the same score
                raise DataError(
                    f"the validation split holds {missing or holds}, so that a score on it cannot show what a model "
                    f"has learnt. Give it {'others' if missing else more}; where it was drawn, give more such training "
                    "rows, or raise data.validation_fraction"
                )
        if found < _FEW:
            reading.notes.append(f"The {split} split holds {holds}; a score on so few says little.")
        if reading.task.kind != "regression":
            reading.notes += doubts_of_labels(reading.task, rows, f"The {split} split")


def _lacking_labels(task: Task, rows: Dataset) -> list[str]:
    names = task.label_types or task.label_names
    return [names[column] for column in np.flatnonzero(~used_labels(task, rows))]


def used_labels(task: Task, rows: Dataset) -> npt.NDArray[np.bool_]:
    """Say of each label, or type of entity, whether any row has it."""
    labels = label_array(rows)
    if task.kind == "multi-label":
        return np.asarray(labels.any(axis=0))
    counts = np.bincount(labels[labels != NO_TAG], minlength=task.num_labels)
    return (counts[1::2] + counts[2::2] if task.kind == "tokens" else counts) > 0


def doubts_of_labels(task: Task, rows: Dataset, path: str) -> list[str]:
    """Say what a score on these rows cannot tell."""
    if task.kind == "regression":
        labels = read_column(rows, "label").to_numpy()
        return [f"{path}: every label is {labels[0]:g}, so correlations are 0."] if np.ptp(labels) == 0 else []
    lacking, total = _lacking_labels(task, rows), len(task.label_types or task.label_names)
    told = f"{path}: no row has {listed(map(repr, lacking))} ({len(lacking)} of {total} labels)"
    where = "" if task.kind == "multi-label" else " where they are predicted"
    return [f"{told}. Macro F1 counts these as 0{where}, and their own figures are 0."] if lacking else []
