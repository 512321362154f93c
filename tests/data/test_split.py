from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdlora.data.load import split_rows


@given(
    classes=st.lists(st.integers(0, 4), min_size=2, max_size=300),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_split(classes: list[int], fraction: float, seed: int) -> None:
    """A row in both parts leaks; a class that is missing from training can't be learnt."""
    labels = np.array(classes)
    train, validation = split_rows(len(labels), fraction, seed, labels)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert len(train) > 0
    assert list(train) == sorted(train)
    assert list(validation) == sorted(validation)
    counts = np.bincount(labels, minlength=5)
    drawn = np.bincount(labels[validation], minlength=5)
    for count, share in zip(counts, drawn, strict=True):
        assert share < max(count, 1)
        assert count < 2 or abs(share - count * fraction) <= 1 + 1e-9
        assert share or count < 2 or len(labels) < 25  # five classes are a fifth of 25 rows


@given(rows_a_class=st.integers(2, 5), classes=st.integers(1, 80), seed=st.integers(0, 50))
def test_few_rows_a_class_stay_for_training(rows_a_class: int, classes: int, seed: int) -> None:
    """A row of every class took half of a set with two rows a class, which then had one each to learn from."""
    labels = np.repeat(np.arange(classes), rows_a_class)
    train, validation = split_rows(len(labels), 0.1, seed, labels)
    assert 0 < len(validation) <= max(1, np.ceil(len(labels) / 5))
    assert len(validation) >= 0.1 * len(labels) - 1
    assert set(labels[train]) == set(range(classes))
    if classes > 20 and rows_a_class == 2:
        assert labels[validation].max() > classes // 2  # not of the first classes alone


@given(rows=st.integers(2, 500), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 100))
def test_plain_split(rows: int, fraction: float, seed: int) -> None:
    """An empty part would end in a division by zero, or in a score over nothing."""
    train, validation = split_rows(rows, fraction, seed)
    assert sorted([*train, *validation]) == list(range(rows))
    assert len(validation) == min(rows - 1, max(1, round(rows * fraction)))
