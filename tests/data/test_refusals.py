"""What loading refuses of second files, of values that only JSON and Parquet have, and of what is evaluated.

`tests/faults/corpus_data.py` has the training files.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from loading import TEXTS, WORDS, load, refused, write_jsonl

from kdlora.data.load import load_examples
from kdlora.data.tasks import Task
from kdlora.errors import DataError


def test_validation_without_labels(csv_file) -> None:
    """A split without labels can't be scored."""
    path, bare = csv_file("a.csv", text=TEXTS, label=WORDS), csv_file("b.csv", text=TEXTS)
    for split in ("validation", "test"):
        message = refused(train=path, **{split: bare})
        assert bare in message
        assert "need labels" in message


def test_labels_that_training_lacks(csv_file) -> None:
    """A label that was never learnt costs accuracy that no training can win back."""
    path = csv_file("a.csv", text=TEXTS, label=WORDS)
    other = csv_file("b.csv", text=["t", "u"], label=["good", "god"])
    for split in ("validation", "test"):
        message = refused(train=path, **{split: other})
        assert f"{other}, row 2: the label 'god'" in message
        assert "Did you mean 'good'" in message
    named = {"label_names": ["bad", "good", "god"]}
    assert "validation split has labels that training lacks: 'god'" in refused(named, train=path, validation=other)
    path = csv_file("c.csv", text=TEXTS, label=["good"] * 18 + ["bad"] * 2)
    message = refused(train=path, validation=path, max_train_examples=5)
    assert "one class only ('good')" in message
    assert "data.max_train_examples" in message


@pytest.mark.parametrize(
    ("rows", "task", "expected"),
    [
        (
            [("t", row % 2) for row in range(10)] + [("u", None), ("v", None)],
            {},
            "row 11: no label in column 'label' (2",
        ),
        ([("t", 0.5), ("u", None)], {"kind": "regression"}, "row 2: no label in column 'label' (1 of 2 rows)"),
        ([("t", "a"), (None, "b")], {}, "row 2: the text 'text' is empty"),
        ([(1, "a"), (2, "b")], {}, "holds int64, not text"),
        ([(None, "a"), (None, "b")], {}, "in every row"),
        ([("t", [0, 1]), ("t", [0, 3])], {}, "row 2: 'label' is 3, but"),
        ([("t", [0, 1]), ("t", [0])], {}, "differ in length"),
        ([("t", ["a"]), ("t", None), ("t", ["b"])], {}, "row 2: no label"),
        ([("t", []), ("t", [])], {}, "are all empty"),
        ([("t", ["a"]), ("t", ["b", "c"])], {"label_names": ["a", "b"]}, "row 2: the label 'c'"),
        ([("t", [0, 1])], {"label_names": ["a", "b", "c"]}, "row 1: 'label' has 2 values, but there are 3 labels"),
        ([("t", ["a"]), ("t", ["b"])], {"kind": "single-label"}, "set task.kind: multi-label"),
    ],
)
def test_values_that_only_json_has(tmp_path: Path, rows, task, expected) -> None:
    """A missing label must not become a class of its own, or zero; numbers as texts come from a wrong column."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    assert expected in refused(task, train=path)


def test_ids_that_are_lists(tmp_path: Path) -> None:
    """An id has to be written into tables of logits and predictions."""
    rows = [{"id": [1], "text": "t", "label": "a"}, {"id": [2], "text": "u", "label": "b"}]
    assert "the id column 'id' holds list" in refused(train=write_jsonl(tmp_path / "a.jsonl", rows))


def test_decimals_as_classes(tmp_path: Path) -> None:
    """A pandas column with 1.0 and 0.0 means the classes 1 and 0; 0.5 means no class."""
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": TEXTS, "label": [0.0, 1.0] * 10}).to_parquet(path)
    assert load({"kind": "single-label"}, train=str(path)).task.label_names == ("0", "1")
    pd.DataFrame({"text": TEXTS, "label": [0.0, 0.5] * 10}).to_parquet(path)
    assert "row 2: the label 'label' is 0.5, a decimal" in refused({"kind": "single-label"}, train=str(path))
    for missing in (None, float("nan")):
        pq.write_table(pa.table({"text": TEXTS, "label": pa.array([0.0, missing, 1.0, 0.0] * 5, pa.float64())}), path)
        for kind in ("auto", "single-label"):
            assert "row 2: no label in column 'label' (5 of 20 rows)" in refused({"kind": kind}, train=str(path))


def test_load_examples_faults(tmp_path: Path, csv_file, emotions: Dataset) -> None:
    """`kdlora evaluate` on a file without labels, or on a folder of splits."""
    task = Task("single-label", ("text",), ("label",), ("sad", "glad"), ("accuracy",))
    with pytest.raises(DataError, match="no label column 'label'"):
        load_examples(csv_file("a.csv", text=["t"]), task, labelled=True)
    with pytest.raises(DataError, match="is a folder"):
        load_examples(str(tmp_path), task, labelled=False)
    DatasetDict({"train": emotions, "test": emotions}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="holds the splits train, test"):
        load_examples(str(tmp_path / "saved"), task, labelled=True)
    assert len(load_examples(str(tmp_path / "saved" / "test"), task, labelled=True)) == 20
