"""A user's table as the teacher: what is read, and every way in which it can be wrong."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from kdlora.data.tags import tag_names
from kdlora.data.tasks import Task
from kdlora.distil import teacher_table
from kdlora.distil.losses import distillation_loss
from kdlora.distil.teacher_table import read_teacher_table
from kdlora.errors import ConfigError, DataError


def write(path: Path, columns: dict[str, list[object]]) -> Path:
    frame = pd.DataFrame(columns)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        lines = [json.dumps(row) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=[".parquet", ".jsonl"])
def file(request, tmp_path) -> Path:
    return tmp_path / f"table{request.param}"


@pytest.fixture
def task(tasks) -> Task:
    return tasks["single-label"]


def test_columns_by_name(file, task):
    """Columns taken by position swap the classes wherever the file was written in another order."""
    write(file, {"Positive": [1.0, 2.0], "id": ["a", "b"], "NEGATIVE": [-1.0, -2.0]})
    found = read_teacher_table(file, task, values="logits")
    assert found.logits.tolist() == [[-1.0, 1.0], [-2.0, 2.0]]
    assert found.logits.dtype == np.float32
    assert found.ids.to_pylist() == ["a", "b"]
    assert found.label_names == ("negative", "positive")

    text = file.with_name("table.csv")  # ids are text there, and stay it
    text.write_text("Positive,id,NEGATIVE\n1,007,-1\n2e0,b,-2.0\n", encoding="utf-8")
    said = read_teacher_table(text, task, values="logits")
    assert (said.ids.to_pylist(), said.logits.tolist()) == (["007", "b"], found.logits.tolist())
    for wrong in ("n/a", ""):
        text.write_text(f"id,negative,positive\n1,0.5,{wrong}\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"table\.csv.*expected numbers in column 'positive'"):
            read_teacher_table(text, task, values="logits")

    # The files that kdlora itself writes must be good as teachers; row numbers are ids too.
    write(file, {"id": [0, 1], "logit:negative": [0, 1], "logit:positive": [2, 3], "label": [1, 1]})
    found = read_teacher_table(file, task, values="logits")
    assert found.logits.tolist() == [[0.0, 2.0], [1.0, 3.0]]
    assert found.attach(Dataset.from_dict({"id": ["1"]}))["teacher_logits"][:] == [[1.0, 3.0]]


def test_a_label_that_is_called_id_is_told_from_the_ids(tmp_path):
    """Languages "de", "en", "id": the table that `kdlora ask` had written for them could not be read."""
    task = Task("single-label", ("text",), ("label",), ("de", "en", "id"), ("accuracy",))
    rows = {"id": ["a", "b"], "split": ["train", "train"], "de": [0.1, 0.2], "en": [0.2, 0.2], "logit:id": [0.7, 0.6]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    found = read_teacher_table(tmp_path / "t.parquet", task, values="probabilities")
    np.testing.assert_allclose(np.exp(found.logits), [[0.1, 0.2, 0.7], [0.2, 0.2, 0.6]], atol=1e-6)


def test_every_kind_of_list_holds_the_values_of_words(tmp_path):
    """Polars writes another kind of list than pandas, and its tables were refused."""
    names = tag_names(("X",))
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 2)):
        columns = {name: pa.array([[place, 2.0]], kind) for place, name in enumerate(names)}
        pq.write_table(pa.table({"id": ["a"], **columns}), tmp_path / "words.parquet")
        task = Task("tokens", ("words",), ("tags",), names, ("entity_f1",))
        found = read_teacher_table(tmp_path / "words.parquet", task, values="logits")
        assert found.logits.tolist() == [[0.0, 1.0, 2.0], [2.0, 2.0, 2.0]]


def test_no_label_is_not_the_class_none(file, task):
    """A row that a teacher left without an answer taught the class of that name."""
    write(file, {"id": ["a", "b"], "label": ["None", None]})
    with pytest.raises(DataError, match=r"1 rows have none, first id 'b'"):
        read_teacher_table(file, replace(task, label_names=("none", "positive")), values="probabilities")


def test_a_column_of_labels(file, task):
    """A teacher that only names labels would be refused, or teach the wrong class with all certainty."""
    write(file, {"id": ["a", "b"], "label": ["Positive ", "negative"], "text": ["good", "bad"]})
    found = read_teacher_table(file, task, values="probabilities")
    np.testing.assert_allclose(np.exp(found.logits), [[0.05, 0.95], [0.95, 0.05]], rtol=1e-6)
    assert found.from_probabilities
    write(file, {"id": ["a", "b"], "label": [1.0, 0.0]})  # pandas writes codes so where a row has none
    coded = read_teacher_table(file, replace(task, label_names=("0", "1")), values="probabilities")
    assert coded.logits.tolist() == found.logits.tolist()
    write(file, {"id": ["a", "b", "c"], "label": ["positive", "positiv", None]})
    with pytest.raises(DataError, match=r"2 rows have none, first id 'b': 'positiv'\. Did you mean 'positive'"):
        read_teacher_table(file, task, values="probabilities")


@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
def test_probabilities_teach_by_themselves(file, tasks, kind, temperature):
    """Logarithms that are clipped, or compared by their squares, teach the clip: the soft loss begins at a hundred."""
    task = tasks[kind]
    table = {name: [0.0, 1.0, 0.25] for name in task.label_names}
    if kind == "single-label":
        table["positive"] = [1.0, 0.0, 0.75]
    write(file, {"id": ["a", "b", "c"]} | table)
    teacher = read_teacher_table(file, task, values="probabilities")
    assert teacher.from_probabilities
    given = torch.tensor(np.stack([table[name] for name in task.label_names], axis=1), dtype=torch.float64)
    other = 1.0 - given
    soft, rest = given ** (1 / temperature), other ** (1 / temperature)
    soft = soft / (soft + rest)  # of two labels the other one is the rest
    logits = torch.zeros(given.shape, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.long) if kind == "single-label" else torch.zeros(given.shape)
    terms = distillation_loss(logits, labels, torch.from_numpy(teacher.logits), kind=kind, temperature=temperature)
    assert terms.soft.max() <= temperature**2 * math.log(2) + 1e-9
    (gradient,) = torch.autograd.grad(terms.soft.sum(), logits)
    width = 1 if kind == "single-label" else task.num_labels
    torch.testing.assert_close(gradient, temperature * (0.5 - soft) / width, rtol=1e-6, atol=1e-6 * temperature)


@pytest.mark.parametrize("column", ["rating", "Prediction"])
@pytest.mark.parametrize("values", ["logits", "probabilities"])
def test_regression(file, tasks, column, values):
    """A value of 4.5 stars is no probability."""
    write(file, {"id": ["x", "y"], column: [4.5, -1.0], "comment": ["not", "used"]})
    assert read_teacher_table(file, tasks["regression"], values=values).logits.tolist() == [[4.5], [-1.0]]
    with pytest.raises(ConfigError, match="values is `logits` or `probabilities`; got 'probs'"):
        read_teacher_table(file, tasks["regression"], values="probs")

    # Training rows with a column of predictions hold the true value too, which would teach.
    write(file, {"id": ["x"], "text": ["fine"], "rating": [4.0], "prediction": [4.5]})
    with pytest.raises(DataError, match=r"the teacher's value, and no true one.*found rating, prediction"):
        read_teacher_table(file, tasks["regression"], values=values)


def test_split_column(file, task):
    """Validation rows share ids (row numbers) with training rows, and would be taught instead of them."""
    write(
        file, {"id": [0, 0, 1], "split": ["validation", "train", "train"], "negative": [1, 2, 3], "positive": [4, 5, 6]}
    )
    train = read_teacher_table(file, task, values="logits")
    assert train.logits.tolist() == [[2.0, 5.0], [3.0, 6.0]]
    validation = read_teacher_table(file, task, values="logits", split="validation")
    assert validation.logits.tolist() == [[1.0, 4.0]]
    assert train.fingerprint != validation.fingerprint
    with pytest.raises(DataError, match="no row is of split 'test'; found validation, train"):
        read_teacher_table(file, task, values="logits", split="test")

    # Training rows scored as validation rows give a perfect teacher.
    write(file, {"id": [0], "negative": [1.0], "positive": [0.0]})
    with pytest.raises(DataError, match="covers the training split, not 'validation'"):
        read_teacher_table(file, task, values="logits", split="validation")


def test_a_split_named_late_is_seen(tmp_path, task):
    """A `split` that JSON Lines name after their first 10,000 rows would be read as training rows."""
    lines = [json.dumps({"id": row, "negative": 1.0, "positive": 0.0}) for row in range(10_000)]
    lines.append(json.dumps({"id": 0, "split": "validation", "negative": 1.0, "positive": 0.0}))
    (tmp_path / "late.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match="no row is of split 'train'; found None, validation"):
        read_teacher_table(tmp_path / "late.jsonl", task, values="logits")


def test_fingerprint_follows_the_content(file, task):
    """A changed table must not pass for the one that the record names."""
    write(file, {"id": [0], "negative": [0.5], "positive": [0.5]})
    first = read_teacher_table(file, task, values="logits").fingerprint
    assert read_teacher_table(file, task, values="probabilities").fingerprint != first
    write(file, {"id": [0], "negative": [0.4], "positive": [0.6]})
    assert read_teacher_table(file, task, values="logits").fingerprint != first

    # The commonest name of a regression's column must not be taken for the gold label and skipped.
    task = Task("regression", ("text",), ("label",), ("label",), ("pearson",))
    write(file, {"id": ["x"], "label": [0.5]})
    assert read_teacher_table(file, task, values="logits").logits.tolist() == [[0.5]]


GOOD = {"id": ["a", "b"], "negative": [0.4, 0.5], "positive": [0.6, 0.5]}


@pytest.mark.parametrize(
    ("change", "values", "message"),
    [
        ({"id": None, "Id": ["a", "b"]}, "logits", "no column 'id' .*Did you mean 'Id'"),
        ({"positive": None}, "logits", r"the task has 2 \(negative, positive\)\. Missing: positive"),
        ({"positive": None, "postive": [1, 2]}, "logits", "Did you mean 'postive'.*Not a label of the task: postive"),
        ({"neutral": [0, 0]}, "logits", "Not a label of the task: neutral.*rename or remove"),
        ({"negative": None, "LABEL_0": [0, 0]}, "logits", "LABEL_0"),
        ({"Negative": [0, 0]}, "logits", "must differ by more than case: .* has negative, positive, Negative"),
        ({"id": ["a", "a"]}, "logits", "1 ids occur more than once, first 'a'"),
        ({"id": ["a", None]}, "logits", "1 rows have no id"),
        ({"id": [0.5, 1.5]}, "logits", "expected text or whole numbers in column 'id'"),
        ({"positive": [1.0, None]}, "logits", "1 rows lack a value in column 'positive', first id 'b'"),
        ({"positive": [1.0, math.inf]}, "logits", "1 rows hold values that are not finite numbers, first id 'b'"),
        ({"positive": ["high", "low"]}, "logits", "expected numbers in column 'positive', got (large_)?string"),
        ({"positive": [0.6, 1.5]}, "probabilities", "between 0 and 1; 1 rows are not, first id 'b'.*teacher.logits"),
        (
            {"positive": [0.6, 0.51]},
            "probabilities",
            r"sum to 1 over the labels; 1 rows are not, first id 'b': \S+ \S+ If they were rounded, divide each row by "
            "its sum$",
        ),
        ({"positive": [0.6, math.nan]}, "probabilities", "1 rows are not, first id 'b'|lack a value"),
    ],
)
def test_wrong_content(file, task, change, values, message):
    """Each of these would otherwise train, on something else than the user meant."""
    columns = {name: column for name, column in (GOOD | change).items() if column is not None}
    write(file, columns)
    with pytest.raises(DataError, match=message) as fault:
        read_teacher_table(file, task, values=values)
    assert str(file) in str(fault.value)


def test_long_texts_are_compared_without_being_kept(monkeypatch, task):
    """All of a file's texts lay in memory before anything trained."""
    ids, long = [str(row) for row in range(25_000)], "one long text after the other " * 50
    columns = ({"id": ids, "text": [f"{row} {long}" for row in order]} for order in (ids, ids[::-1]))
    rows, turned = map(Dataset.from_dict, columns)
    monkeypatch.setattr(teacher_table, "open_collection", lambda table: SimpleNamespace(texts=1))
    monkeypatch.setattr(teacher_table, "open_collection_texts", lambda table, task: rows)
    with pytest.raises(DataError, match="labelled with other texts: 25000 of its ids, first '0'"):
        teacher_table.refuse_other_texts(Path("table"), SimpleNamespace(task=task, train=turned))
    tracemalloc.start()
    teacher_table.refuse_other_texts(Path("table"), SimpleNamespace(task=task, train=rows))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(ids) * len(long) * 0.7
