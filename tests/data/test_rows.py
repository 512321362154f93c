import errno
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlora.config import DataConfig, TaskConfig
from kdlora.data.batches import tokenise
from kdlora.data.load import load_splits
from kdlora.data.read import open_file
from kdlora.data.spool import doubles, read_column, settle, slice_rows, spool
from kdlora.distil.logits import TeacherLogits

ROWS = 4_000

kinds_of_selection = st.one_of(
    st.lists(st.integers(0, 199), max_size=60),  # shuffled, repeated
    st.sets(st.integers(0, 199), max_size=150).map(sorted),  # drawn
)


def write_parquet(path: Path, rows: int) -> Path:
    texts = [f"a good film that nobody should have to see twice {row}" for row in range(rows)]
    pq.write_table(pa.table({"text": texts, "label": ["no", "yes"] * (rows // 2)}), path)
    return path


@cache
def columns() -> Dataset:
    values = {
        "id": [str(row) for row in range(200)],
        "value": list(range(200)),
        "label": [row % 2 for row in range(200)],
    }
    return Dataset.from_dict(values).cast_column("label", ClassLabel(names=["no", "yes"]))


@settings(deadline=None)
@given(selection=kinds_of_selection, rows=st.integers(1, 30))
def test_slices_are_the_rows_in_order(selection: list[int], rows: int) -> None:
    """A selection that is read past its list of row numbers gives texts the labels of others, written down or not."""
    chosen = columns().select(selection)
    slices = list(slice_rows(chosen, ["value", "id"], rows))
    assert all(part.column_names == ["value", "id"] and 0 < part.num_rows <= rows for part in slices)
    assert [row for part in slices for row in part["value"].to_pylist()] == selection
    assert [row for part in slices for row in part["id"].to_pylist()] == list(map(str, selection))
    settled = settle(chosen)
    assert settled[:] == chosen[:]
    assert settled.features == chosen.features
    assert read_column(settled, "value").to_pylist() == selection


@pytest.mark.parametrize("validation", [True, False])
def test_prepared_rows_lie_on_disk(tmp_path: Path, tiny_tokenizer, validation: bool) -> None:
    """Ten million rows in memory, as ids, labels, logits and tokens, are more than most machines have."""
    other = {"validation": str(write_parquet(tmp_path / "validation.parquet", 10))} if validation else {}
    data = DataConfig(train=str(write_parquet(tmp_path / "train.parquet", ROWS)), **other)
    ids = [str(row) for row in range(ROWS)]
    logits = TeacherLogits(ids, np.ones((ROWS, 2), np.float32), ("no", "yes"), "made up")
    before = pa.total_allocated_bytes()
    splits = load_splits(TaskConfig(text=["text"], label="label"), data)
    tokens = tokenise(logits.attach(splits.train), tiny_tokenizer, 32)
    assert len(tokens.dataset) >= 0.8 * ROWS
    # Where validation rows are drawn, the numbers of the rows remain, 8 bytes each, and room to grow.
    assert pa.total_allocated_bytes() - before < (4 if validation else 24) * ROWS


def test_no_file_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named file stays when the process is killed while it writes: a night of kills would fill the disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def batches():
        for value in range(3):
            yield pa.RecordBatch.from_pydict({"value": [value]})
            seen.append(list(tmp_path.iterdir()))

    table = spool(batches(), "three rows")
    assert seen == [[], [], []]
    assert list(tmp_path.iterdir()) == []
    assert table["value"].to_pylist() == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_not_the_datas_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound file was called unreadable, with the advice to write it again, where only space was wanting."""
    source = open_file(write_parquet(tmp_path / "train.parquet", 10), "data.train")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b"))  # noqa: SIM115, PTH123
    with pytest.raises(OSError, match="No space left on device in the folder for temporary") as caught:
        source.read(("text", "label"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(ids=st.lists(st.one_of(texts, st.sampled_from(["", "a", "a\0", "\0a", "12345678", "123456789"])), max_size=30))
def test_what_a_set_says(ids: list[str]) -> None:
    """Doubles that are missed teach one row twice and another never; false ones refuse good data."""
    assert sorted(doubles(pa.array(ids, pa.string())).to_pylist()) == sorted({one for one in ids if ids.count(one) > 1})
