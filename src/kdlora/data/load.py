"""Load a task's splits, checked and in canonical columns; the one entrance to the data room."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from kdlora.config import DataConfig, TaskConfig
from kdlora.data import glue
from kdlora.data.augment import stored_copies
from kdlora.data.canonical import Columns, corrupt_rows, find_id_column, to_canonical
from kdlora.data.collection import is_collection, open_collection_texts
from kdlora.data.infer import infer_label_column, infer_task, infer_text_columns
from kdlora.data.opening import Groups, open_examples, open_splits
from kdlora.data.sources import Source
from kdlora.data.split import split_rows
from kdlora.data.spool import read_column
from kdlora.data.tasks import GLUE, GlueTask, Task
from kdlora.data.unlabelled import keep_unscored, read_lines
from kdlora.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """A task and its examples.

    Attributes:
        task: what is learnt.
        train: examples to learn from.
        validation: examples for checkpoints, early stopping and the choice of what is shipped.
        test: examples for the headline, where there are labelled ones.
        notes: plain sentences on what was inferred, dropped or drawn.
        unlabelled: texts that only the teacher labels; no column `label`.
        copies: how many of these are perturbed copies of training texts.
        held_out: training rows that a search took out; an epoch draws as many of the others once more.
    """

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset | None = None
    notes: tuple[str, ...] = ()
    unlabelled: Dataset | None = None
    copies: int = 0
    held_out: int = 0

    def __repr__(self) -> str:
        """Say what is learnt, and how many examples there are."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        rows = ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)
        return f"Splits({self.task.kind}, labels {list(self.task.label_names)}, {rows})"


@dataclass
class _Reading:
    """What is needed to read every split of one experiment alike, and what is said about it."""

    task: Task
    glue: GlueTask | None
    id_column: str
    notes: list[str] = field(default_factory=list)

    def split(self, groups: Groups, *, labelled: bool) -> Dataset:
        """Read a split; several groups become one data set with a `group` column."""
        parts = {group: self._source(source, group, labelled=labelled) for group, source in groups.items()}
        if list(parts) == [""]:
            return parts[""]
        return concatenate_datasets([part.add_column("group", [group] * len(part)) for group, part in parts.items()])

    def _source(self, source: Source, group: str, *, labelled: bool) -> Dataset:
        columns = self.columns(source, labelled=labelled)
        raw = source.read(columns.wanted)
        if source.benchmark:
            total = raw.table.num_rows + raw.ragged
            corrupt = corrupt_rows(raw, columns)
            raw = raw.keep(pc.invert(corrupt)) if pc.any(corrupt).as_py() else raw
            if dropped := total - raw.table.num_rows:
                self.notes.append(
                    f"{source.name}: {dropped} of {total} corrupt rows (ragged, or without text or label) were dropped."
                )
            if not raw.table.num_rows:
                raise DataError(f"{source.name}: none of its {total} rows has both text and label")
        return to_canonical(raw, columns, self.task, prefix=f"{group}-" if group else "")

    def columns(self, source: Source, *, labelled: bool) -> Columns:
        """Assign the columns of one source."""
        if self.glue is None:
            text = tuple(source.require(column, "task.text") for column in self.task.text)
            label = self.task.label if labelled else ()
        else:
            text = glue.glue_text_columns(source, self.glue)
            found = glue.glue_label_column(source, self.glue)
            label = ((found or self.task.label[0]),) if labelled else ()
        for column in label:
            if column not in source.columns:
                raise DataError(
                    f"{source.name} has no label column {column!r} (task.label); it has "
                    f"{', '.join(map(repr, source.columns))}.{did_you_mean(column, source.columns)} Training, "
                    "validation and test files need labels"
                )
        if source.benchmark and self.id_column == "id":  # QQP has a column `id` that is not the Hub's
            return Columns(text, label, "idx" if "idx" in source.columns else None)
        return Columns(text, label, find_id_column(source, self.id_column))

    def has_labels(self, source: Source) -> bool:
        """Whether a split carries labels at all; the Hub's test splits of GLUE hold only -1."""
        name = glue.glue_label_column(source, self.glue) if self.glue else self.task.label[0]
        if name is None or name not in source.columns:
            return False
        values = source.read([name]).table[name]
        if pa.types.is_integer(values.type):
            return bool(pc.any(pc.greater_equal(values, 0)).as_py())
        if pa.types.is_floating(values.type):  # STS-B
            return bool(pc.any(pc.not_equal(values, -1.0)).as_py())
        return bool(values.null_count < len(values))


def load_splits(task: TaskConfig, data: DataConfig, *, copies_in: Path | None = None) -> Splits:
    """Load every split of an experiment.

    Args:
        task: a GLUE task by name, or columns and kind of the user's own data as far as they are set.
        data: files, a folder in GLUE's layout, a `save_to_disk` folder or a Hub data set.
        copies_in: folder that keeps the perturbed copies (`data.augment`) for the next call; default: none does.

    Returns:
        The completed task and its splits in canonical columns.

    Raises:
        DataError: something is missing, cannot be read, is ambiguous or does not fit; the message names file, row
            or config key, and the remedy.
    """
    known = GLUE[task.name] if task.name is not None else None
    if known is not None and known.name == "ax":
        raise DataError("task.name: ax has no training data; train on mnli, and predict AX with that model")
    splits = open_splits(known, data)
    if "train" not in splits:
        raise DataError("no training data: set data.train to a file or to the name of a split")
    reading = _begin(task, known, data, splits["train"][""])
    train = reading.split(splits["train"], labelled=True)
    train, validation = _train_and_validation(reading, data, splits, train)
    test = _test(reading, data, splits)
    _check_labels(reading.task, data, train, {"validation": validation, "test": test})
    unlabelled = _unlabelled(reading, data, splits, [part for part in (validation, test) if part is not None])
    for note in reading.notes:
        logger.info(note)
    splits_read = Splits(reading.task, train, validation, test, tuple(reading.notes), unlabelled)
    return add_copies(splits_read, data.augment, seed=data.split_seed, keep_in=copies_in)


def add_copies(splits: Splits, copies: int, *, seed: int, keep_in: Path | None = None) -> Splits:
    """Put perturbed copies of the training texts beside the unlabelled rows."""
    if not copies:
        return splits
    scored = [part for part in (splits.validation, splits.test) if part is not None]
    made = stored_copies(splits.train, copies, seed=seed, scored=scored, folder=keep_in)
    parts = [splits.unlabelled.select_columns(made.column_names)] if splits.unlabelled is not None else []
    note = f"{len(made)} perturbed copies of the training texts are there for the teacher to label (data.augment)."
    return replace(
        splits, unlabelled=concatenate_datasets([*parts, made]), copies=len(made), notes=(*splits.notes, note)
    )


def load_examples(path: str, task: Task, *, id_column: str = "id", labelled: bool) -> Dataset:
    """Load one file of examples for a task that is known, to evaluate or predict."""
    known = next((entry for name, entry in GLUE.items() if name == task.name), None)
    source = open_examples(Path(path), known)
    reading = _Reading(task, known, id_column)
    dataset = reading.split({"": source}, labelled=labelled)
    for note in reading.notes:
        logger.warning(note)
    return dataset


def _begin(task: TaskConfig, known: GlueTask | None, data: DataConfig, train: Source) -> _Reading:
    """Complete the task from the training data."""
    if known is not None:
        return _Reading(known.task, known, data.id_column)
    text = task.text or infer_text_columns(train)
    label = task.label or infer_label_column(train)
    if both := [column for column in text if column in label]:
        raise DataError(
            f"the column {both[0]!r} is both text and label, so there is nothing to learn; set task.text and task.label"
        )
    reading = _Reading(Task("single-label", text, label, (), ()), None, data.id_column)
    columns = reading.columns(train, labelled=True)
    inferred, notes = infer_task(train.read(columns.label), text, label, task)
    if task.text is None:
        reading.notes.append(f"Text column inferred from its name: {', '.join(text)}.")
    if task.label is None:
        reading.notes.append(f"Label column inferred from its name: {', '.join(label)}.")
    return replace(reading, task=inferred, notes=[*reading.notes, *notes])


def _train_and_validation(
    reading: _Reading, data: DataConfig, splits: Mapping[str, Groups], train: Dataset
) -> tuple[Dataset, Dataset]:
    if "validation" in splits:
        validation = reading.split(splits["validation"], labelled=True)
    else:
        if len(train) < 2:
            raise DataError(f"{len(train)} training row cannot be split; give more rows, or a validation file")
        classes = read_column(train, "label").to_numpy() if reading.task.kind == "single-label" else None
        kept, drawn = split_rows(len(train), data.validation_fraction, data.split_seed, classes)
        if not len(drawn):
            raise DataError("every label has a single training row; give more rows per label, or a validation file")
        train, validation = train.select(kept), train.select(drawn)
        how = "stratified by label" if classes is not None else "at random"
        reading.notes.append(
            f"{len(drawn)} of {len(kept) + len(drawn)} training rows became the validation split, drawn {how} "
            f"(data.validation_fraction {data.validation_fraction}, data.split_seed {data.split_seed})."
        )
    limit = data.max_train_examples
    if limit is not None and limit < len(train):
        reading.notes.append(
            f"Only the first {limit} of {len(train)} training rows are used (data.max_train_examples)."
        )
        train = train.select(range(limit))
    return train, validation


def _test(reading: _Reading, data: DataConfig, splits: Mapping[str, Groups]) -> Dataset | None:
    groups = splits.get("test")
    if groups is None:
        return None
    if data.test is None and not all(reading.has_labels(source) for source in groups.values()):
        names = ", ".join(source.name for source in groups.values())
        reading.notes.append(f"{names} carries no labels and is not used for scoring.")
        return None
    return reading.split(groups, labelled=True)


def _unlabelled(
    reading: _Reading, data: DataConfig, splits: Mapping[str, Groups], scored: list[Dataset]
) -> Dataset | None:
    """Read the texts without labels; those that a score is measured on are left out."""
    if data.unlabelled is None:
        return None
    if "unlabelled" in splits:
        rows = reading.split(splits["unlabelled"], labelled=False)
    else:
        read = open_collection_texts if is_collection(Path(data.unlabelled)) else read_lines
        rows = read(Path(data.unlabelled), reading.task)
    kept = keep_unscored(rows, scored)
    if dropped := len(rows) - len(kept):
        reading.notes.append(
            f"{data.unlabelled}: {dropped} of {len(rows)} unlabelled rows hold the text of a validation or test row; "
            "they are left out, so that every scored text is new to the student."
        )
    if not len(kept):
        raise DataError(f"{data.unlabelled} (data.unlabelled): no rows are left that are not scored on; give others")
    limit = data.max_unlabelled_examples
    if limit is not None and limit < len(kept):
        reading.notes.append(
            f"Only the first {limit} of {len(kept)} unlabelled rows are used (data.max_unlabelled_examples)."
        )
        kept = kept.select(range(limit))
    return kept.remove_columns("group") if "group" in kept.column_names else kept


def _check_labels(task: Task, data: DataConfig, train: Dataset, others: Mapping[str, Dataset | None]) -> None:
    """Refuse training rows that teach nothing, and labels elsewhere that training lacks."""
    limited = " Raise data.max_train_examples, which leaves them out." if data.max_train_examples is not None else ""
    labels = _label_matrix(task, train)
    if task.kind == "multi-label":
        if not labels.any():
            raise DataError(
                f"no training row has any label ({', '.join(task.label)} are all 0); check task.label.{limited}"
            )
        known = labels.any(axis=0)
    elif task.kind == "regression":
        if np.ptp(labels) == 0:
            raise DataError(f"every training label is {labels[0]}; a regression needs different values.{limited}")
        return
    else:
        known = np.bincount(labels, minlength=task.num_labels) > 0
        if known.sum() < 2:
            only = task.label_names[int(labels[0])]
            raise DataError(
                f"the training rows hold one class only ({only!r}); a classifier needs two or more.{limited}"
            )
    for split, dataset in others.items():
        if dataset is None:
            continue
        found = _label_matrix(task, dataset)
        used = found.any(axis=0) if task.kind == "multi-label" else np.bincount(found, minlength=task.num_labels) > 0
        if (used & ~known).any():
            names = ", ".join(repr(task.label_names[column]) for column in np.flatnonzero(used & ~known))
            raise DataError(
                f"the {split} split has labels that training lacks: {names}. Add training rows of them.{limited}"
            )


def _label_matrix(task: Task, dataset: Dataset) -> np.ndarray:
    column = read_column(dataset, "label")
    if task.kind != "multi-label":
        return np.asarray(column.to_numpy())
    return np.asarray(pc.list_flatten(column).to_numpy()).reshape(-1, task.num_labels)
