"""Texts without labels, from every source, and what of them is left out."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict
from loading import TEXTS, WORDS, values

from kdlora.config import DataConfig, TaskConfig
from kdlora.configfile import build_config
from kdlora.data.load import load_splits
from kdlora.errors import ConfigError, DataError


@pytest.fixture
def load(csv_file):
    """`load(unlabelled=FILE)` gives the splits of twenty training rows and two validation rows."""
    train = csv_file("train.csv", text=TEXTS, label=WORDS)
    validation = csv_file("validation.csv", text=["seen one", "seen two"], label=["bad", "good"])

    def load(task: dict | None = None, **data):
        return load_splits(TaskConfig(**(task or {})), DataConfig(train=train, validation=validation, **data))

    return load


def test_unlabelled_rows_have_ids_of_their_own_and_no_label(load, csv_file, tmp_path):
    """A label column that comes along must not teach; ids are per split, so 0 may be in both."""
    file = csv_file("more.csv", text=["new one", "new two", "new three"], label=["?", "", "bad"])
    splits = load(unlabelled=file)
    assert splits.unlabelled.column_names == ["id", "text"]
    assert values(splits.unlabelled, "id") == ["0", "1", "2"]
    assert values(splits.unlabelled, "text") == ["new one", "new two", "new three"]
    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"id": f"k{row}", "text": f"line {row}"}) + "\n" for row in range(4)))
    limited = load(unlabelled=str(lines), max_unlabelled_examples=3)
    assert values(limited.unlabelled, "id") == ["k0", "k1", "k2"]
    assert "Only the first 3 of 4 unlabelled rows are used (data.max_unlabelled_examples)." in limited.notes
    assert load().unlabelled is None


def test_scored_texts_are_left_out_and_counted(load, csv_file):
    """A validation text that the teacher answers for the student makes its score one on old texts."""
    file = csv_file("more.csv", text=["new", "seen two", "text 3", "seen one"])
    splits = load(unlabelled=file)
    assert values(splits.unlabelled, "text") == ["new", "text 3"]  # a training text may stay
    assert values(splits.unlabelled, "id") == ["0", "2"]
    assert any("2 of 4 unlabelled rows hold the text of a validation or test row" in note for note in splits.notes)
    with pytest.raises(DataError, match=r"\(data\.unlabelled\): no rows are left"):
        load(unlabelled=csv_file("only.csv", text=["seen one"]))


def test_of_a_pair_both_texts_must_be_known(csv_file):
    """A premise that occurs in validation with another hypothesis is not a scored example."""
    task = TaskConfig(text=("first", "second"), label="label")
    train = csv_file("train.csv", first=TEXTS, second=TEXTS, label=WORDS)
    validation = csv_file("validation.csv", first=["a", "c"], second=["b", "d"], label=["bad", "good"])
    more = csv_file("more.csv", first=["a", "a", "c"], second=["d", "b", "e"])
    splits = load_splits(task, DataConfig(train=train, validation=validation, unlabelled=more))
    assert list(zip(values(splits.unlabelled, "text"), values(splits.unlabelled, "text_pair"), strict=True)) == [
        ("a", "d"),
        ("c", "e"),
    ]


def test_a_split_of_a_data_set_by_name(emotions, csv_file, tmp_path):
    """The Hub's data sets bring their unlabelled part as a split; a file beside them is one still."""
    plain = Dataset.from_dict({"text": ["x y", "y z"]})
    DatasetDict({"train": emotions, "validation": emotions.select(range(2)), "unsupervised": plain}).save_to_disk(
        tmp_path / "saved"
    )
    file = csv_file("more.csv", text=["from a file"])
    for wanted, expected in (("unsupervised", ["x y", "y z"]), (file, ["from a file"])):
        splits = load_splits(TaskConfig(), DataConfig(path=str(tmp_path / "saved"), unlabelled=wanted))
        assert values(splits.unlabelled, "text") == expected
    with pytest.raises(DataError, match=r"data\.unlabelled: 'unsupervized' is neither.*mean 'unsupervised'"):
        load_splits(TaskConfig(), DataConfig(path=str(tmp_path / "saved"), unlabelled="unsupervized"))


def test_faults_name_the_key(load, csv_file, tmp_path):
    """The key tells which of five files is meant."""
    with pytest.raises(DataError, match=r"\(data\.unlabelled\) does not exist"):
        load(unlabelled=str(tmp_path / "no.csv"))
    with pytest.raises(DataError, match="has no column 'text'"):
        load(unlabelled=csv_file("other.csv", body=["x"]))
    with pytest.raises(DataError, match=r"more\.csv, row 2: the text 'text' is empty"):
        load(unlabelled=csv_file("more.csv", text=["x", " "]))
    with pytest.raises(ConfigError, match=r"data\.max_unlabelled_examples limits data\.unlabelled, which is not set"):
        build_config({"data": {"train": "t.csv", "max_unlabelled_examples": 3}, "family": "bert"})


def test_a_relative_path_resolves_against_the_configs_folder(tmp_path):
    """A saved config must find the file again from anywhere."""
    config = build_config({"data": {"train": "t.csv", "unlabelled": "u.csv"}, "family": "bert"}, base=tmp_path)
    assert config.data.unlabelled == str(tmp_path / "u.csv")


def test_plain_text_is_one_text_a_line(load, tmp_path):
    """What most people have; a line without text is no row, and must not move the ids of those after it."""
    file = tmp_path / "more.txt"
    file.write_text('\ufefffirst, with a "quote"\n\n  \nfourth\r\nseen one\n', encoding="utf-8")
    rows = load(unlabelled=str(file)).unlabelled
    assert values(rows, "text") == ['first, with a "quote"', "fourth"]
    assert values(rows, "id") == ["0", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "no line with text"), (b"fine\n\xff\n", "line 2: byte 0xFF"), (b"", "is empty")],
)
def test_a_text_file_that_cannot_serve_is_refused(load, tmp_path, content, message):
    """A traceback, or an experiment that trains without the texts that it was given."""
    file = tmp_path / "more.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(unlabelled=str(file))


def test_plain_text_cannot_serve_a_task_of_pairs(csv_file, tmp_path):
    """Lines taken for the first text of pairs, with nothing beside them."""
    train = csv_file("pairs.csv", a=TEXTS, b=TEXTS, label=WORDS)
    file = tmp_path / "more.txt"
    file.write_text("one\n")
    with pytest.raises(DataError, match=r"one text a line, but the task has pairs \(a, b\)"):
        load_splits(TaskConfig(text=("a", "b"), label="label"), DataConfig(train=train, unlabelled=str(file)))
