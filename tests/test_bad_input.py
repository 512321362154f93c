"""What users get wrong, through the command line: a message with place and remedy, exit status 2, nothing changed."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file

from experiments import read_rows, snapshot, write_lines
from tiny import sentiment_rows, write_csv

pytest_plugins = ["experiment_fixtures"]


@pytest.fixture
def refused(cli, workshop, tmp_path):
    """`refused({...}, "part of the message", ...)` runs a config that must be refused without a trace."""

    def check(changes, *expected):
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(workshop.values(changes)), encoding="utf-8")
        before = snapshot(tmp_path)
        shown = cli("run", config, "--out", tmp_path / "out")
        assert shown.code == 2, (shown.out, shown.err)
        assert shown.err.startswith("kdlora: ")
        assert "Traceback" not in shown.err
        assert shown.out == ""
        for part in expected:
            assert part in shown.err
        assert snapshot(tmp_path) == before
        assert not (tmp_path / "out").exists()
        return shown.err

    return check


def rows(number=None, **columns):
    """Sentiment rows, one of them changed."""
    made = sentiment_rows(40)
    if number is not None:
        made[number] |= columns
    return made


def numbers(value):
    return [row | {"label": value if place == 7 else str(place)} for place, row in enumerate(rows())]


def table(ending, delimiter=","):
    """A table of twenty good rows and an ending."""
    head = delimiter.join(["id", "text", "label"]) + "\n"
    good = "".join(f"{number}{delimiter}film {number}{delimiter}{'ab'[number % 2]}\n" for number in range(20))
    return (head + good).encode() + ending


TWICE = rows(5, id=rows()[20]["id"])
NULL = "".join(json.dumps(row) + "\n" for row in rows(4, text=None)).encode()
REGRESSION = {"task": {"kind": "regression"}}


@pytest.mark.parametrize(
    ("train", "changes", "expected"),
    [
        # Training on another column than the one meant gives a plausible score.
        (rows(), {"task": {"text": "txet"}}, ["'txet'", "task.text", "Did you mean 'text'?"]),
        (rows(), {"task": {"label": "lable"}}, ["'lable'", "task.label", "'label'"]),
        # No rows, no training; not an average over nothing.
        (b"", {}, ["train.csv"]),
        (b"id,text,label\n", {}, ["train.csv"]),
        # A classifier of one class is always right.
        ([row | {"label": "positive"} for row in rows()], {}, ["one class only", "positive"]),
        # One NaN among the targets makes every weight NaN.
        *((numbers(value), REGRESSION, ["train.csv", "row 8"]) for value in ("nan", "much", "", "inf")),
        # An empty text has a label and teaches noise; pandas would turn null into the word `nan`.
        (rows(7, text=""), {}, ["train.csv", "row 8", "text"]),
        (rows(7, text="   "), {}, ["train.csv", "row 8", "text"]),
        ({"train.jsonl": NULL}, {}, ["train.jsonl", "row 5", "text"]),
        # Teacher logits are attached by id: a doubled id gets another text's.
        (TWICE, {}, ["train.csv", repr(TWICE[5]["id"])]),
        # Replacement characters train silently.
        (table(b"20,caf\xe9,a\n"), {}, ["train.csv", "line 22", "UTF-8"]),
        # A missing tab moves the label into the text.
        ({"train.tsv": table(b"20\tfilm a\n", "\t")}, {}, ["train.tsv", "row 21", "2 columns where 3 are expected"]),
        # With CSV's quoting one stray quote swallows rows, without it is a character. Never half of each.
        ({"train.tsv": table(b'20\t"a text\nin two lines"\ta\n', "\t")}, {}, ["train.tsv"]),
    ],
)
def test_training_files(refused, tmp_path, train, changes, expected):
    """Each of these trains without a word where it is not looked for."""
    if isinstance(train, list):
        path = write_csv(tmp_path / "train.csv", train)
    else:
        ((name, content),) = train.items() if isinstance(train, dict) else [("train.csv", train)]
        path = tmp_path / name
        path.write_bytes(content)
    refused({"data": {"train": str(path)}} | changes, *expected)


@pytest.mark.parametrize(
    ("other", "expected"),
    [([{"id": "1", "text": "a film"}], "'label'"), (rows(3, label="neutral"), "neutral")],
)
def test_a_validation_file_without_labels_or_with_others(refused, tmp_path, other, expected):
    """The fault is in the second file; a label that training lacks can never be predicted."""
    train, validation = write_csv(tmp_path / "train.csv", rows()), write_csv(tmp_path / "other.csv", other)
    refused({"data": {"train": str(train), "validation": str(validation)}}, "other.csv", expected)


def distilled(**teacher):
    return {"teacher": {"model": None, **teacher}, "run": {"arms": ["kd-lora"]}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # A misspelt file must not become an empty data set, nor a folder a question to the Hub.
        ({"data": {"train": "PLACE/trian.csv"}}, ["trian.csv", "data.train"]),
        ({"student": {"model": "PLACE/modle"}}, ["modle"]),
        (distilled(logits="PLACE/none.parquet"), ["none.parquet"]),
        # Without any adapter only the head trains, and the run still finishes.
        ({"lora": {"targets": ["qery"]}}, ["qery", "lora.targets"]),
        # Counting from 1 is the usual mistake.
        (
            {"student": {"model": None, "from_teacher_layers": [1, 2]}},
            ["student.from_teacher_layers", "layer 2", "0 to 1"],
        ),
    ],
)
def test_what_is_not_there(refused, tmp_path, changes, expected):
    """Found before anything is trained, and named as the user wrote it."""
    refused(json.loads(json.dumps(changes).replace("PLACE", str(tmp_path))), *expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("ham", "spam"), ["ham, spam", "negative", "teacher.label_names"]),
        (("LABEL_0", "LABEL_1"), ["Set teacher.label_names"]),
    ],
)
def test_a_teacher_whose_labels_are_others_or_not_told(refused, experiment, tmp_path, names, expected):
    """Matched by position, it would teach spam for praise; a guess is right half of the time."""
    folder = tmp_path / "given"
    shutil.copytree(experiment.layout.teacher, folder, ignore=shutil.ignore_patterns("logits"))
    file = folder / "config.json"
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    file.write_text(json.dumps(json.loads(file.read_text()) | labels))
    refused(distilled(fine_tuned=str(folder)), str(folder) if "ham" in names else "", *expected)


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        # Rows without a teacher would be taught by zeros.
        (lambda table: table[2:], "logits", ["2 of 64", "FIRST", "add the rows"]),
        # Matched by position, names that differ are never seen.
        (
            lambda table: [{"id": row["id"], "negativ": 0, "positive": 1} for row in table],
            "logits",
            ["negativ", "Did you mean"],
        ),
        # Taken for probabilities, logits would be clipped to nonsense.
        (
            lambda table: [row | {"positive": 3.5} for row in table],
            "probabilities",
            ["between 0 and 1", "teacher.logits"],
        ),
    ],
)
def test_tables_of_a_teacher(refused, workshop, tmp_path, change, key, expected):
    """A table that does not fit teaches something all the same."""
    made = [{"id": row["id"], "negative": 0.0, "positive": 1.0} for row in read_rows(workshop.train)]
    path = write_lines(tmp_path / "teacher.jsonl", change(made))
    refused(
        distilled(**{key: str(path)}), path.name, *(part.replace("FIRST", repr(made[0]["id"])) for part in expected)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_table_with_numbers_that_are_none(refused, workshop, tmp_path, value):
    """One of them is enough to lose the student."""
    made = [{"id": row["id"], "negative": 0.0, "positive": 1.0} for row in read_rows(workshop.train)]
    made[9]["positive"] = value
    pd.DataFrame(made).to_parquet(tmp_path / "teacher.parquet")
    refused(distilled(logits=str(tmp_path / "teacher.parquet")), "teacher.parquet", "first id", repr(made[9]["id"]))


@pytest.mark.parametrize("damage", ["without weights", "weights of another architecture"])
def test_model_folders(refused, workshop, tmp_path, damage):
    """Transformers fills what is missing or does not fit with random numbers, and those train too."""
    folder = shutil.copytree(workshop.student, tmp_path / "model")
    file = folder / "model.safetensors"
    if damage == "without weights":
        file.unlink()
        refused({"student": {"model": str(folder)}}, str(folder), "weights")
    else:
        weights = {f"other.{name}": tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        refused({"student": {"model": str(folder)}}, str(folder))


def test_a_pretrained_model_given_as_fine_tuned(refused, workshop):
    """Its head would be random, and teach at random."""
    refused(distilled(fine_tuned=str(workshop.teacher)), str(workshop.teacher), "fine-tuned", "teacher.model")


def test_a_folder_that_belongs_to_another_config(cli, experiment, workshop, tmp_path):
    """Nothing of a finished experiment may be overwritten by a second one."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(workshop.values({"lora": {"rank": 3}})))
    before = snapshot(experiment.folder)
    shown = cli("run", config, "--out", experiment.folder)
    assert shown.code == 2
    for part in (f"{experiment.folder} belongs to another config", "lora.rank: 8 there, 3 here", "--out"):
        assert part in shown.err
    assert snapshot(experiment.folder) == before
