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
        if count >= 2:
            assert 1 <= share < count
            assert abs(share - count * fraction) <= 1 + 1e-9
        else:
            assert share == 0


@given(rows=st.integers(2, 500), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 100))
def test_plain_split(rows: int, fraction: float, seed: int) -> None:
    """An empty part would end in a division by zero, or in a score over nothing."""
    train, validation = split_rows(rows, fraction, seed)
    assert sorted([*train, *validation]) == list(range(rows))
    assert len(validation) == min(rows - 1, max(1, round(rows * fraction)))
