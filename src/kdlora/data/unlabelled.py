"""Texts without labels: what of them may teach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from kdlora.data.canonical import read_column

TEXTS = ("text", "text_pair")


def keep_unscored(rows: Dataset, scored: Sequence[Dataset]) -> Dataset:
    """Leave out the rows whose text, or pair of texts, a score is measured on.

    A teacher's answer to a validation text would teach the student that very text, and its score would no longer be
    one on new texts.

    Args:
        rows: canonical columns.
        scored: the validation and test rows.

    Returns:
        The other rows, in their order.
    """
    names = [name for name in TEXTS if name in rows.column_names]
    taken = [pc.is_in(read_column(rows, name), _values(scored, name)) for name in names]
    candidates = np.flatnonzero(np.logical_and.reduce([column.to_numpy() for column in taken]))
    if not len(candidates):
        return rows
    known = {texts for part in scored for texts in _tuples(part, names)}
    found = _tuples(rows.select(candidates), names)  # of a pair, each text may be known from another pair
    seen = [row for row, texts in zip(candidates.tolist(), found, strict=True) if texts in known]
    kept = np.ones(len(rows), dtype=bool)
    kept[seen] = False
    return rows.select(np.flatnonzero(kept)) if seen else rows


def _values(parts: Sequence[Dataset], name: str) -> pa.Array:
    chunks = [chunk for part in parts for chunk in read_column(part, name).chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.string())


def _tuples(rows: Dataset, names: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(read_column(rows, name).to_pylist() for name in names), strict=True))
