"""Rows without labels beside rows with them: one training set, the mask says which labels count."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets

from kdlora.data.batches import Tokenised
from kdlora.data.tasks import Task
from kdlora.distil.inference import column_values

LABELLED = "labelled"
"""The column, and the name in a batch, that is false where a label only fills its place."""


def join_unlabelled(labelled: Tokenised, unlabelled: Tokenised, task: Task) -> Tokenised:
    """Put rows with and without labels together, in this order.

    Args:
        labelled: token ids with `label` and `teacher_logits`.
        unlabelled: token ids with `teacher_logits`, by the same tokenizer at the same length.
        task: its kind decides what fills the place of a label.

    Returns:
        All rows with a column `labelled` (bool); the labels of the unlabelled rows are zeros, and never read.
    """
    count = len(unlabelled.dataset)
    dtype = np.int64 if task.kind == "single-label" else np.float32
    empty = np.zeros((count, task.num_labels) if task.kind == "multi-label" else count, dtype)
    features = labelled.dataset.features
    filler = Dataset.from_dict({"label": empty}, features=Features({"label": features["label"]}))
    without = concatenate_datasets([unlabelled.dataset, filler], axis=1)
    names = [name for name in labelled.dataset.column_names if name in without.column_names]
    parts = [
        _mark(rows.select_columns(names), is_labelled)
        for rows, is_labelled in ((labelled.dataset.select_columns(names), True), (without, False))
    ]
    return Tokenised(
        concatenate_datasets(parts), labelled.truncated + unlabelled.truncated, max_length=labelled.max_length
    )


def labelled_values(dataset: Dataset) -> np.ndarray:
    """Read the labels that count.

    Args:
        dataset: rows with `label`, and `labelled` where some have none.

    Returns:
        The labels of the labelled rows, in their order.
    """
    labels = column_values(dataset, "label")
    return labels[column_values(dataset, LABELLED)] if LABELLED in dataset.column_names else labels


def _mark(dataset: Dataset, is_labelled: bool) -> Dataset:
    return dataset.add_column(LABELLED, np.full(len(dataset), is_labelled), feature=Value("bool"))
