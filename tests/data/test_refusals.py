"""What loading refuses: each message names file and row, or config key, and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import Splits, load_examples, load_splits
from kdlora.data.tasks import Task
from kdlora.errors import DataError

TEXTS = [f"text {row}" for row in range(20)]
WORDS = ["bad", "good"] * 10


def load(task: dict | None = None, **data) -> Splits:
    return load_splits(TaskConfig(**(task or {})), DataConfig(**data))


def refused(task: dict | None = None, **data) -> str:
    with pytest.raises(DataError) as caught:
        load(task, **data)
    return str(caught.value)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_missing_columns(csv_file) -> None:
    """The wrong column that happens to exist would be learnt without an error; the right name has to be suggested."""
    path = csv_file("a.csv", reviews=TEXTS, sentiment=WORDS)
    message = refused({"text": "review", "label": "sentiment"}, train=path)
    assert "no column 'review' (task.text)" in message
    assert "it has 'reviews', 'sentiment'" in message
    assert "Did you mean 'reviews'" in message
    message = refused({"text": "reviews", "label": "sentimet"}, train=path)
    assert "no label column 'sentimet' (task.label)" in message
    assert "Did you mean 'sentiment'" in message
    assert "data.id_column" in refused({"text": "reviews"}, train=path, id_column="key")


def test_columns_that_cannot_be_guessed(csv_file) -> None:
    """A guess between two columns is right half the time and never seen."""
    path = csv_file("a.csv", first=TEXTS, label=WORDS)
    assert "Set task.text; the columns are 'first', 'label'" in refused(train=path)
    path = csv_file("b.csv", text=TEXTS, review=TEXTS, label=WORDS)
    assert "may be text or review; set task.text" in refused(train=path)
    path = csv_file("c.csv", text=TEXTS, outcome=WORDS)
    assert "Set task.label; the columns are" in refused(train=path)


def test_validation_without_labels(csv_file) -> None:
    """A split without labels can't be scored."""
    path, bare = csv_file("a.csv", text=TEXTS, label=WORDS), csv_file("b.csv", text=TEXTS)
    for split in ("validation", "test"):
        message = refused(train=path, **{split: bare})
        assert bare in message
        assert "need labels" in message


def test_one_class_only(csv_file) -> None:
    """A model of one class is right on every row it has seen."""
    assert "one class only (good)" in refused(train=csv_file("a.csv", text=TEXTS, label=["good"] * 20))
    path = csv_file("b.csv", text=TEXTS, label=["good"] * 18 + ["bad"] * 2)
    assert "data.max_train_examples" in (message := refused(train=path, validation=path, max_train_examples=5))
    assert "one class only ('good')" in message
    path = csv_file("c.csv", text=TEXTS, label=[2.5] * 20)
    assert "every training label is 2.5" in refused(train=path)
    path = csv_file("d.csv", text=TEXTS, a=[0] * 20, b=[0] * 20)
    assert "no training row has any label" in refused({"label": ["a", "b"]}, train=path)


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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("nan", "finite"),
        ("inf", "finite"),
        ("1e60", "finite"),
        ("much", "number"),
        ("", "no label"),
        ("  ", "no label"),
    ],
)
def test_regression_labels(csv_file, value: str, expected: str) -> None:
    """One NaN label makes every weight NaN after its batch."""
    path = csv_file("a.csv", text=TEXTS, label=[0.5, 1.5] * 8 + [value] + [2.0, 3.0, 4.0])
    message = refused({"kind": "regression"}, train=path)
    assert f"{path}, row 17: " in message
    assert expected in message


def test_text_among_numbers_when_inferred(csv_file) -> None:
    """One "n/a" must not turn a regression into a classification of twenty names."""
    path = csv_file("a.csv", text=TEXTS, label=[f"{row}.5" for row in range(16)] + ["n/a", "1.5", "2.5", "3.5"])
    message = refused(train=path)
    assert "row 17" in message
    assert "'n/a' among numbers" in message


@pytest.mark.parametrize("kind", ["single-label", "regression"])
def test_null_labels(tmp_path: Path, kind: str) -> None:
    """A missing label must not become a class of its own, or zero."""
    rows = [{"text": "t", "label": row % 2} for row in range(10)] + [{"text": "u", "label": None}, {"text": "v"}]
    message = refused({"kind": kind}, train=write_jsonl(tmp_path / "a.jsonl", rows))
    assert "row 11: no label in column 'label' (2 of 12 rows)" in message


@pytest.mark.parametrize("value", ["", "  \t", "\u00a0\u3000", "\ufeff"])
def test_empty_text(csv_file, value: str) -> None:
    """A blank text is learnt as "no words mean this label"."""
    path = csv_file("a.csv", text=[*TEXTS[:18], value, value], label=WORDS)
    message = refused(train=path)
    assert f"{path}, row 19: the text 'text' is empty (1 more such rows)" in message
    pair = csv_file("b.csv", sentence1=TEXTS, sentence2=[*TEXTS[:19], value], label=WORDS)
    assert "row 20: the text 'sentence2' is empty" in refused(train=pair)


def test_null_and_numeric_text(tmp_path: Path) -> None:
    """Numbers as texts come from a wrong column."""
    rows = [{"text": "t", "label": "a"}, {"text": None, "label": "b"}]
    assert "row 2: the text 'text' is empty" in refused(train=write_jsonl(tmp_path / "a.jsonl", rows))
    rows = [{"text": 1, "label": "a"}, {"text": 2, "label": "b"}]
    assert "holds int64, not text" in refused(train=write_jsonl(tmp_path / "b.jsonl", rows))
    rows = [{"text": None, "label": "a"}, {"text": None, "label": "b"}]
    assert "in every row" in refused(train=write_jsonl(tmp_path / "c.jsonl", rows))


def test_ids(csv_file, tmp_path: Path) -> None:
    """Two rows with one id share teacher logits: one of them learns from another text."""
    ids = [str(row) for row in range(20)]
    path = csv_file("a.csv", id=[*ids[:19], "4"], text=TEXTS, label=WORDS)
    message = refused(train=path)
    assert f"{path}, row 20: the id '4' ('id') is also that of row 5" in message
    assert "data.id_column" in message
    path = csv_file("b.csv", id=[*ids[:19], ""], text=TEXTS, label=WORDS)
    assert "row 20: the id ('id') is empty" in refused(train=path)
    rows = [{"id": [1], "text": "t", "label": "a"}, {"id": [2], "text": "u", "label": "b"}]
    assert "the id column 'id' holds list" in refused(train=write_jsonl(tmp_path / "a.jsonl", rows))


def test_multi_label_values(csv_file, tmp_path: Path) -> None:
    """A 2 in a 0/1 column gives a loss below zero; an unknown name would be dropped."""
    path = csv_file("a.csv", text=TEXTS, a=[0, 1] * 10, b=[0, 1] * 9 + [2, 0])
    assert f"{path}, row 19: 'b' is '2', but a multi-label column holds only 0 and 1" in refused(
        {"label": ["a", "b"]}, train=path
    )
    path = csv_file("b.csv", text=TEXTS, a=[0, 1] * 10, b=[0, 1] * 9 + ["", 0])
    assert "row 19: no label in column 'b'" in refused({"label": ["a", "b"]}, train=path)

    def lists(*values: object, **task: object) -> str:
        return refused(task, train=write_jsonl(tmp_path / "l.jsonl", [{"text": "t", "label": v} for v in values]))

    assert "row 2: 'label' is 3, but" in lists([0, 1], [0, 3])
    assert "differ in length" in lists([0, 1], [0])
    assert "row 2: no label" in lists(["a"], None, ["b"])
    assert "are all empty" in lists([], [])
    assert "row 2: the label 'c'" in lists(["a"], ["b", "c"], label_names=["a", "b"])
    assert "row 1: 'label' has 2 values, but there are 3 labels" in lists([0, 1], [1, 0], label_names=["a", "b", "c"])
    assert "set task.kind: multi-label" in lists(["a"], ["b"], kind="single-label")
    text = csv_file("c.csv", text=TEXTS, label=WORDS)
    assert "expected a list of label names" in refused({"kind": "multi-label"}, train=text)
    assert "need the same names" in refused({"label": ["a", "b"], "label_names": ["a", "c"]}, train=path)
    assert "name one" in refused({"label": ["a", "b"], "kind": "single-label"}, train=path)


def test_kinds_that_cannot_be_inferred(csv_file) -> None:
    """Ids or prices taken for classes give a classifier of thousands of labels."""
    texts = [f"t{row}" for row in range(40)]
    many = refused(train=csv_file("a.csv", text=texts, label=range(40)))
    assert "40 different integers" in many
    assert "set task.kind to single-label or regression" in many
    whole = refused(train=csv_file("b.csv", text=texts, label=[1.0, 2.0] * 20))
    assert "all whole numbers" in whole
    names = refused(train=csv_file("c.csv", text=texts, label=texts))
    assert "40 texts in 40 rows" in names
    path = csv_file("a.csv", text=texts, label=range(40))
    assert load({"kind": "single-label"}, train=path, validation=path).task.num_labels == 40


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


def test_too_little(csv_file) -> None:
    """One row can't be divided into training and validation."""
    path = csv_file("a.csv", text=["t"], label=[0.5])
    assert "cannot be split" in refused(train=path)
    path = csv_file("b.csv", text=["t", "u", "v"], label=["a", "b", "c"])
    assert "every label has a single training row" in refused(train=path)


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
