from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlora.data import spool
from kdlora.data.spool import are_distinct

texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(ids=st.lists(st.one_of(texts, st.sampled_from(["", "a", "a\0", "\0a", "12345678", "123456789"])), max_size=30))
def test_what_a_set_says(ids: list[str]) -> None:
    """Doubles that are missed teach one row twice and another never; false ones refuse good data."""
    assert are_distinct(pa.array(ids, pa.string())) == (len(set(ids)) == len(ids))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parts_of_a_column(kind: pa.DataType) -> None:
    """A slice whose offsets do not begin at 0 would be hashed over its neighbours."""
    ids = pa.array(["x", "a", "bb", "a", "ccc", "x"], kind)
    assert are_distinct(ids[2:])
    assert not are_distinct(ids[1:4])
    assert are_distinct(pa.chunked_array([ids[2:4], ids[4:6]]))
    assert not are_distinct(pa.chunked_array([ids[:2], ids[5:]]))
    assert not are_distinct(pa.chunked_array([ids[:2], pa.array([None, None], kind)]))


def test_long_ids_that_begin_alike() -> None:
    """Only the first bytes of an id are hashed: what differs behind them must count."""
    begin = "x" * 5000
    assert are_distinct(pa.array([begin + "a", begin + "b"]))
    assert not are_distinct(pa.array([begin + "a", begin + "b", begin + "a"]))


def test_equal_hashes_of_different_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among enough ids two share a hash by chance; that is no fault of the data."""
    monkeypatch.setattr(spool, "_hash_each", lambda piece: np.zeros(len(piece), np.uint64))
    assert are_distinct(pa.array(["a", "b"]))
    assert not are_distinct(pa.array(["a", "b", "a"]))


def test_hashes_do_not_meet_by_rule() -> None:
    """A hash that mixes badly is right and slow: every collision costs the table of all ids that it is to spare."""
    names = [f"{prefix}{row}" for prefix in ("", "row-", "a-somewhat-longer-name-") for row in range(50_000)]
    assert len(np.unique(spool._hash_each(pa.array(names)))) == len(names)
