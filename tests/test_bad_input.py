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


@pytest.fixture
def train(tmp_path):
    """`train(rows)` or `train(text=...)` writes the training file and gives the config's section."""

    def write(rows=None, *, text=None, name="train.csv"):
        path = tmp_path / name
        if rows is not None:
            write_csv(path, rows)
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"train": str(path)}

    return write


def changed(row, **columns):
    """Sentiment rows with one of them changed."""
    rows = sentiment_rows(40)
    rows[row] |= columns
    return rows


def test_missing_file(refused, tmp_path):
    """A misspelt file must not become an empty data set."""
    refused({"data": {"train": str(tmp_path / "trian.csv")}}, "trian.csv", "data.train")


def test_missing_text_column(refused, train):
    """Training on another column than the one meant gives a plausible score."""
    refused(
        {"data": train(sentiment_rows(40)), "task": {"text": "txet"}}, "'txet'", "task.text", "Did you mean 'text'?"
    )


def test_missing_label_column(refused, train):
    """The same for the label."""
    refused({"data": train(sentiment_rows(40)), "task": {"label": "lable"}}, "'lable'", "task.label", "'label'")


def test_validation_without_the_label_column(refused, train, tmp_path):
    """The fault is in the second file, and must be said to be."""
    other = write_csv(tmp_path / "other.csv", [{"id": "1", "text": "a film"}])
    refused({"data": train(sentiment_rows(40)) | {"validation": str(other)}}, "other.csv", "'label'")


@pytest.mark.parametrize("text", ["", "id,text,label\n"])
def test_empty_file(refused, train, text):
    """No rows, no training; not an average over nothing."""
    refused({"data": train(text=text)}, "train.csv")


def test_one_class_only(refused, train):
    """A classifier of one class is always right."""
    rows = [row | {"label": "positive"} for row in sentiment_rows(40)]
    refused({"data": train(rows)}, "one class only", "positive")


def test_a_validation_label_that_training_lacks(refused, train, tmp_path):
    """It could never be predicted, and would count as the model's error."""
    other = write_csv(tmp_path / "other.csv", changed(3, label="neutral"))
    refused({"data": train(sentiment_rows(40)) | {"validation": str(other)}}, "neutral", "other.csv")


@pytest.mark.parametrize("value", ["nan", "much", "", "inf"])
def test_a_numeric_label_that_is_none(refused, train, value):
    """One NaN among the targets makes every weight NaN."""
    rows = [row | {"label": str(number)} for number, row in enumerate(sentiment_rows(40))]
    rows[7]["label"] = value
    refused({"data": train(rows), "task": {"kind": "regression"}}, "train.csv", "row 8")


@pytest.mark.parametrize("value", ["", "   "])
def test_empty_text(refused, train, value):
    """An empty text has a label and teaches noise."""
    refused({"data": train(changed(7, text=value))}, "train.csv", "row 8", "text")


def test_null_text(refused, tmp_path):
    """Pandas would turn it into the word `nan`."""
    rows = sentiment_rows(40)
    rows[4]["text"] = None
    path = write_lines(tmp_path / "train.jsonl", rows)
    refused({"data": {"train": str(path)}}, "train.jsonl", "row 5", "text")


def test_duplicate_ids(refused, train):
    """Teacher logits are attached by id: a doubled id gets another text's."""
    rows = sentiment_rows(40)
    rows[5]["id"] = rows[20]["id"]
    refused({"data": train(rows)}, "train.csv", repr(rows[20]["id"]))


def test_broken_utf8(refused, train):
    """Replacement characters train silently."""
    lines = "id,text,label\n" + "".join(f"{i},film {i},{'ab'[i % 2]}\n" for i in range(20))
    refused({"data": train(text=lines.encode() + b"20,caf\xe9,a\n")}, "train.csv", "line 22", "UTF-8")


def test_ragged_tsv(refused, train):
    """A missing tab moves the label into the text."""
    lines = "id\ttext\tlabel\n" + "".join(f"{i}\tfilm {i}\t{'ab'[i % 2]}\n" for i in range(20)) + "20\tfilm a\n"
    refused({"data": train(text=lines, name="train.tsv")}, "train.tsv", "row 21", "2 columns where 3 are expected")


def test_tsv_with_a_quote_that_swallows_lines(refused, train):
    """Read with CSV's quoting, one stray quote swallows rows; read without, it is a character. Never half of each."""
    lines = "id\ttext\tlabel\n" + "".join(f"{i}\tfilm {i}\t{'ab'[i % 2]}\n" for i in range(20))
    lines += '20\t"a text\nin two lines"\ta\n'
    refused({"data": train(text=lines, name="train.tsv")}, "train.tsv")


@pytest.fixture
def given(experiment, tmp_path):
    """A copy of the finished experiment's teacher, with another config."""

    def copy(**changes):
        folder = tmp_path / "given"
        shutil.copytree(experiment.layout.teacher, folder, ignore=shutil.ignore_patterns("logits"))
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return copy


def distilled(**teacher):
    return {"teacher": {"model": None, **teacher}, "run": {"arms": ["kd-lora"]}}


def test_a_teacher_with_other_labels(refused, given):
    """Matched by position, it would teach spam for praise."""
    folder = given(id2label={"0": "ham", "1": "spam"}, label2id={"ham": 0, "spam": 1})
    refused(distilled(fine_tuned=str(folder)), str(folder), "ham, spam", "negative", "teacher.label_names")


def test_a_teacher_that_does_not_say_its_labels(refused, given):
    """A guess is right half of the time."""
    folder = given(id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    refused(distilled(fine_tuned=str(folder)), "Set teacher.label_names")


def table_rows(workshop):
    return [{"id": row["id"], "negative": 0.0, "positive": 1.0} for row in read_rows(workshop.train)]


def test_a_table_with_missing_rows(refused, workshop, tmp_path):
    """Rows without a teacher would be taught by zeros."""
    rows = table_rows(workshop)
    path = write_lines(tmp_path / "teacher.jsonl", rows[2:])
    refused(distilled(logits=str(path)), "teacher.jsonl", "2 of 64", repr(rows[0]["id"]), "add the rows")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_table_with_numbers_that_are_none(refused, workshop, tmp_path, value):
    """One of them is enough to lose the student."""
    rows = table_rows(workshop)
    rows[9]["positive"] = value
    pd.DataFrame(rows).to_parquet(tmp_path / "teacher.parquet")
    refused(distilled(logits=str(tmp_path / "teacher.parquet")), "teacher.parquet", "first id", repr(rows[9]["id"]))


def test_a_table_with_other_labels(refused, workshop, tmp_path):
    """The same as for a model."""
    rows = [{"id": row["id"], "negativ": 0, "positive": 1} for row in table_rows(workshop)]
    path = write_lines(tmp_path / "teacher.jsonl", rows)
    refused(distilled(logits=str(path)), "teacher.jsonl", "negativ", "Did you mean")


def test_a_table_of_logits_that_are_called_probabilities(refused, workshop, tmp_path):
    """Taken for probabilities, logits would be clipped to nonsense."""
    rows = [row | {"positive": 3.5} for row in table_rows(workshop)]
    path = write_lines(tmp_path / "teacher.jsonl", rows)
    refused(distilled(probabilities=str(path)), "between 0 and 1", "teacher.logits")


def test_a_table_that_is_not_there(refused, tmp_path):
    """Found before the control arms are trained."""
    refused(distilled(logits=str(tmp_path / "none.parquet")), "none.parquet")


def test_a_target_module_that_matches_nothing(refused):
    """Without any adapter only the head trains, and the run still finishes."""
    refused({"lora": {"targets": ["qery"]}}, "qery", "lora.targets")


def test_a_model_that_is_not_there(refused, tmp_path):
    """A misspelt folder must not be asked for on the Hub, with a message about tokens and networks."""
    refused({"student": {"model": str(tmp_path / "modle")}}, "modle")


def test_a_model_folder_without_weights(refused, workshop, tmp_path):
    """Random weights train too; nobody would know."""
    folder = shutil.copytree(workshop.student, tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    refused({"student": {"model": str(folder)}}, str(folder), "weights")


def test_a_model_folder_with_weights_of_another_architecture(refused, workshop, tmp_path):
    """Transformers fills what does not fit with random numbers, and warns."""
    folder = shutil.copytree(workshop.student, tmp_path / "mixed")
    weights = {f"other.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused({"student": {"model": str(folder)}}, str(folder))


def test_a_pretrained_model_given_as_fine_tuned(refused, workshop):
    """Its head would be random, and teach at random."""
    refused(distilled(fine_tuned=str(workshop.teacher)), str(workshop.teacher), "fine-tuned", "teacher.model")


def test_layers_that_the_teacher_does_not_have(refused):
    """Counting from 1 is the usual mistake."""
    layers = {"student": {"model": None, "from_teacher_layers": [1, 2]}}
    refused(layers, "student.from_teacher_layers", "layer 2", "0 to 1")


def test_a_folder_that_belongs_to_another_config(cli, experiment, workshop, tmp_path):
    """Nothing of a finished experiment may be overwritten by a second one."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(workshop.values({"lora": {"rank": 3}})))
    before = snapshot(experiment.folder)
    shown = cli("run", config, "--out", experiment.folder)
    assert shown.code == 2
    assert f"{experiment.folder} belongs to another config" in shown.err
    assert "lora.rank: 8 there, 3 here" in shown.err
    assert "--out" in shown.err
    assert snapshot(experiment.folder) == before


def test_a_config_with_five_faults(refused):
    """One fault per attempt costs five attempts."""
    message = refused(
        {
            "distil": {"temperature": 0, "alhpa": 0.3},
            "lora": {"rank": "eight"},
            "student": {"train": {"epochs": -1}},
            "run": {"arms": ["kd_lora"]},
        },
        "5 faults",
        "distil.temperature",
        "distil.alhpa: unknown key. Did you mean 'alpha'?",
        "lora.rank",
        "student.train.epochs",
        "Did you mean 'kd-lora'?",
    )
    assert len(message.splitlines()) == 6
