"""A candidate: several teachers, averaged, or each answering for the rows that it has not been trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from kdlora.data.load import Splits
from kdlora.distil.fingerprints import hash_json
from kdlora.distil.logits import TeacherLogits

SEED = 0
"""Draws the folds; they are the same for every recipe and seed, so that the teachers are trained once."""


def folds_of(ids: Sequence[str], train_ids: Sequence[str], count: int) -> npt.NDArray[np.int64]:
    """Deal the training rows out to folds of the same size, and every copy to the fold of its text.

    Args:
        ids: of training rows, or of perturbed copies of them ("<id>~1").
        train_ids: of all training rows, in their order.
        count: number of folds.

    Returns:
        The fold of each of `ids`, from 0, shape (ids,).
    """
    folds = np.random.default_rng(SEED).permutation(len(train_ids)) % count
    known = dict(zip(train_ids, folds.tolist(), strict=True))
    return np.asarray([known[name if name in known else name.rpartition("~")[0]] for name in ids], dtype=np.int64)


def without_fold(splits: Splits, fold: int, count: int) -> Splits:
    """Give what the teacher of a fold is trained on: the rows of the other folds, and no unlabelled ones.

    Args:
        splits: the whole task.
        fold: from 0.
        count: number of folds.
    """
    ids = splits.train["id"][:]
    others = np.flatnonzero(folds_of(ids, ids, count) != fold)
    return dataclasses.replace(splits, train=splits.train.select(others), unlabelled=None, copies=0)


def rows_of_fold(rows: Dataset, train_ids: Sequence[str], fold: int, count: int) -> Dataset:
    """Give the rows that the teacher of a fold answers for.

    Args:
        rows: training rows, or copies of them.
        train_ids: of all training rows, in their order.
        fold: from 0.
        count: number of folds.
    """
    return rows.select(np.flatnonzero(folds_of(rows["id"][:], train_ids, count) == fold))


def mean_logits(answers: Sequence[TeacherLogits]) -> TeacherLogits:
    """Average the logits of several teachers for the same rows.

    Args:
        answers: one or more, of the same ids in the same order.
    """
    mean = np.mean([one.logits for one in answers], axis=0, dtype=np.float32)
    return dataclasses.replace(answers[0], logits=mean, fingerprint=_fingerprint(answers))


def joined_logits(answers: Sequence[TeacherLogits]) -> TeacherLogits:
    """Put the answers of the teachers of all folds together.

    Args:
        answers: one or more, of different ids.
    """
    ids = pa.concat_arrays([one.ids for one in answers])
    logits = np.concatenate([one.logits for one in answers])
    return dataclasses.replace(answers[0], ids=ids, logits=logits, fingerprint=_fingerprint(answers))


def _fingerprint(answers: Sequence[TeacherLogits]) -> str:
    return hash_json([one.fingerprint for one in answers])
