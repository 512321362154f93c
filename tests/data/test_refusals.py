"""What loading refuses: each message names file and row, or config key, and the remedy."""

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

IDS = [str(row) for row in range(20)]
FORTY = {"text": [f"t{row}" for row in range(40)]}
AB = {"label": ["a", "b"]}

REFUSED: dict[str, tuple[dict, dict, tuple[str, ...]]] = {
    # The wrong column that happens to exist would be learnt without an error; the right name has to be suggested.
    "a text column": (
        {"task": {"text": "review", "label": "sentiment"}},
        {"reviews": TEXTS, "sentiment": WORDS},
        ("no column 'review' (task.text)", "it has 'reviews', 'sentiment'", "Did you mean 'reviews'"),
    ),
    "a label column": (
        {"task": {"text": "reviews", "label": "sentimet"}},
        {"reviews": TEXTS, "sentiment": WORDS},
        ("no label column 'sentimet' (task.label)", "Did you mean 'sentiment'"),
    ),
    "an id column": ({"id_column": "key"}, {"text": TEXTS, "label": WORDS}, ("data.id_column",)),
    # A guess between two columns is right half the time and never seen.
    "no known text": ({}, {"first": TEXTS, "label": WORDS}, ("Set task.text; the columns are 'first', 'label'",)),
    "two texts": ({}, {"text": TEXTS, "review": TEXTS, "label": WORDS}, ("may be text or review; set task.text",)),
    "no known label": ({}, {"text": TEXTS, "outcome": WORDS}, ("Set task.label; the columns are",)),
    # A model of one class is right on every row it has seen.
    "one class": ({}, {"text": TEXTS, "label": ["good"] * 20}, ("one class only (good)",)),
    "one value": ({}, {"text": TEXTS, "label": [2.5] * 20}, ("every training label is 2.5",)),
    "no label": ({"task": AB}, {"text": TEXTS, "a": [0] * 20, "b": [0] * 20}, ("no training row has any label",)),
    # Ids or prices taken for classes give a classifier of thousands of labels; one "n/a" must not make one either.
    "integers": (
        {},
        FORTY | {"label": range(40)},
        ("40 different integers", "set task.kind to single-label or regression"),
    ),
    "whole decimals": ({}, FORTY | {"label": [1.0, 2.0] * 20}, ("all whole numbers",)),
    "many names": ({}, FORTY | {"label": FORTY["text"]}, ("40 texts in 40 rows",)),
    "a word among numbers": (
        {},
        {"text": TEXTS, "label": [f"{row}.5" for row in range(16)] + ["n/a", "1.5", "2.5", "3.5"]},
        ("row 17", "'n/a' among numbers"),
    ),
    # Two rows with one id share teacher logits: one of them learns from another text.
    "a double id": (
        {},
        {"id": [*IDS[:19], "4"], "text": TEXTS, "label": WORDS},
        ("a.csv, row 20: the id '4' ('id') is also that of row 5", "data.id_column"),
    ),
    "an empty id": ({}, {"id": [*IDS[:19], ""], "text": TEXTS, "label": WORDS}, ("row 20: the id ('id') is empty",)),
    # One NaN label makes every weight NaN after its batch.
    **{
        f"regression {value!r}": (
            {"task": {"kind": "regression"}},
            {"text": TEXTS, "label": [0.5, 1.5] * 8 + [value] + [2.0, 3.0, 4.0]},
            ("a.csv, row 17: ", expected),
        )
        for expected, values in (("finite", ("nan", "inf", "1e60")), ("number", ("much",)), ("no label", ("", "  ")))
        for value in values
    },
    # A blank text is learnt as "no words mean this label".
    **{
        f"blank {value!r}": (
            {},
            {"text": [*TEXTS[:18], value, value], "label": WORDS},
            ("a.csv, row 19: the text 'text' is empty (1 more such rows)",),
        )
        for value in ("", "  \t", "\u00a0\u3000", "\ufeff")
    },
    "half a pair": (
        {},
        {"sentence1": TEXTS, "sentence2": [*TEXTS[:19], ""], "label": WORDS},
        ("row 20: the text 'sentence2' is empty",),
    ),
    # A 2 in a 0/1 column gives a loss below zero.
    "a 2": (
        {"task": AB},
        {"text": TEXTS, "a": [0, 1] * 10, "b": [0, 1] * 9 + [2, 0]},
        ("a.csv, row 19: 'b' is '2', but a multi-label column holds only 0 and 1",),
    ),
    "a hole": (
        {"task": AB},
        {"text": TEXTS, "a": [0, 1] * 10, "b": [0, 1] * 9 + ["", 0]},
        ("row 19: no label in column 'b'",),
    ),
    "other names": (
        {"task": AB | {"label_names": ["a", "c"]}},
        {"text": TEXTS, "a": [0, 1] * 10, "b": [0, 1] * 10},
        ("need the same names",),
    ),
    "several labels": (
        {"task": AB | {"kind": "single-label"}},
        {"text": TEXTS, "a": [0, 1] * 10, "b": [0, 1] * 10},
        ("name one",),
    ),
    "names that are no lists": (
        {"task": {"kind": "multi-label"}},
        {"text": TEXTS, "label": WORDS},
        ("expected a list of label names",),
    ),
    # One row can't be divided into training and validation.
    "one row": ({}, {"text": ["t"], "label": [0.5]}, ("cannot be split",)),
    "a row a class": ({}, {"text": TEXTS[:3], "label": ["a", "b", "c"]}, ("every label has a single training row",)),
}


@pytest.mark.parametrize(("settings", "columns", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_learnt_from(csv_file, settings, columns, expected) -> None:
    """Each of these would train without an error, on another column, class or text than the user means."""
    message = refused(train=csv_file("a.csv", **columns), **settings)
    assert [part for part in expected if part not in message] == []


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
