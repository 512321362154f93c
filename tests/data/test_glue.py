from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from loading import labels, load, refused

from kdlora.data.load import load_examples
from kdlora.data.tasks import GLUE, Task
from kdlora.errors import DataError

ROWS = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "wnli": (635, 71)}
POSITIVE = {"cola": 0.704, "sst2": 0.558, "mrpc": 0.674, "wnli": 0.491}


def write(folder: Path, file: str, *lines: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("name", ROWS)
def test_official_rows(glue_folder: Path, name: str) -> None:
    """A CSV reader loses hundreds of GLUE rows to quotes, without an error."""
    splits = load({"name": name}, path=glue_folder)
    assert (len(splits.train), len(splits.validation)) == ROWS[name]
    assert splits.test is None
    assert [note for note in splits.notes if "has no labels" not in note and "so few" not in note] == []
    assert list(splits.train["id"][:2]) == ["0", "1"]
    found = np.array(labels(splits.train))
    if name == "stsb":
        assert (found.min(), found.max()) == (0.0, 5.0)
        assert found.mean() == pytest.approx(2.70, abs=0.01)
    else:
        assert found.mean() == pytest.approx(POSITIVE[name], abs=0.001)
    assert splits.task == GLUE[name].task
    # `kdlora evaluate` on dev.tsv must score the rows that training validated on, test.tsv must be predictable.
    folder, task = glue_folder / GLUE[name].folder, GLUE[name].task
    assert load_examples(str(folder / "dev.tsv"), task, labelled=True).to_dict() == splits.validation.to_dict()
    test = load_examples(str(folder / "test.tsv"), task, labelled=False)
    assert "label" not in test.column_names
    assert len(test) > 100
    with pytest.raises(DataError, match=r"no column .* need labels"):
        load_examples(str(folder / "test.tsv"), task, labelled=True)


@pytest.mark.parametrize(("name", "columns"), [("rte", "sentence1\tsentence2"), ("qnli", "question\tsentence")])
def test_word_labels(tmp_path: Path, name: str, columns: str) -> None:
    """Sorted words happen to give the Hub's order here; codes by first appearance would not."""
    rows = ["0\ta\tb\tnot_entailment", '1\tc "d\te\tentailment', "2\tf\tg\tentailment"]
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / name.upper(), file, f"index\t{columns}\tlabel", *rows)
    write(tmp_path / name.upper(), "test.tsv", f"index\t{columns}", "0\ta\tb")
    splits = load({"name": name}, path=tmp_path)
    assert labels(splits.train) == [1, 0, 0]
    assert splits.train["text"][:] == ["a", 'c "d', "f"]
    assert splits.train["text_pair"][:] == ["b", "e", "g"]
    assert splits.test is None


def test_mnli_groups(tmp_path: Path) -> None:
    """Matched and mismatched rows with one id overwrite each other; without a group they can't be scored apart."""
    header = "index\tpromptID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
    rows = ["0\t1\tx\tp\th\tneutral\tneutral", "1\t1\tx\tq\ti\tneutral\tcontradiction", "2\t1\tx\tr\tj\tn\tentailment"]
    write(tmp_path / "MNLI", "train.tsv", header, *rows, "3\t1\tx\ts\tk\tneutral\t-")
    write(tmp_path / "MNLI", "dev_matched.tsv", header, *rows)
    write(tmp_path / "MNLI", "dev_mismatched.tsv", header, *rows[:2])
    splits = load({"name": "mnli"}, path=tmp_path)
    assert labels(splits.train) == [1, 2, 0]
    assert "group" not in splits.train.column_names
    validation = splits.validation
    assert list(validation["id"]) == ["matched-0", "matched-1", "matched-2", "mismatched-0", "mismatched-1"]
    assert list(validation["group"]) == ["matched"] * 3 + ["mismatched"] * 2
    assert labels(validation) == [1, 2, 0, 1, 2]
    assert any("1 of 4 corrupt rows" in note for note in splits.notes)
    assert len(load({"name": "mnli"}, path=tmp_path, train="validation", validation="train").train) == 5


def test_corrupt_rows_of_qqp(tmp_path: Path) -> None:
    """Ragged rows that are skipped must not renumber those after them: ids are those of the Hub."""
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = ["9\t1\t2\ta\tb\t0", "8\t1\t2\tragged", "7\t1\t2\tc\t\t1", "6\t1\t2\td\te\t1", "5\t1\t2\tf\tg\t0", "ragged"]
    write(tmp_path / "QQP", "train.tsv", header, *rows)
    write(tmp_path / "QQP", "dev.tsv", header, *rows[3:5])
    splits = load({"name": "qqp"}, path=tmp_path)
    assert list(splits.train["id"]) == ["0", "3", "4"]
    assert labels(splits.train) == [0, 1, 0]
    assert ["3 of 6" in note for note in splits.notes if "corrupt" in note] == [True]
    assert len(load_examples(str(tmp_path / "QQP" / "train.tsv"), GLUE["qqp"].task, labelled=True)) == 3
    write(tmp_path / "QQP", "train.tsv", header, "1\t1\t2\t\t\t0")
    assert "none of its 1 rows" in refused({"name": "qqp"}, path=tmp_path)  # not an empty data set


def test_folder_names(tmp_path):
    """Copies of GLUE are spelled in several ways; a missing folder has to be named."""
    header = "sentence\tlabel"
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / "sst-2", file, header, "a\t0", "b\t1")
    for folder in (tmp_path, tmp_path / "sst-2"):
        assert len(load({"name": "sst2"}, path=folder).train) == 2
    message = refused({"name": "rte"}, path=tmp_path)
    assert "neither a folder 'RTE'" in message
    assert "it holds sst-2" in message
    (tmp_path / "sst-2" / "dev.tsv").unlink()
    assert "dev.tsv (data.path) does not exist" in refused({"name": "sst2"}, path=tmp_path)

    # The files of one task in the folder of another.
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / "MRPC", file, "sentence\tlabel", "a\t0", "b\t1")
    assert "lacks the text columns of the GLUE task 'mrpc'" in refused({"name": "mrpc"}, path=tmp_path)


def hub_split(task: Task, values: list) -> Dataset:
    label = Value("float32") if task.kind == "regression" else ClassLabel(names=list(task.label_names))
    columns = {name: Value("string") for name in task.text} | {"label": label, "idx": Value("int32")}
    texts = {name: [f"{name} {row}" for row in range(len(values))] for name in task.text}
    return Dataset.from_dict(
        texts | {"label": values, "idx": [row + 5 for row in range(len(values))]}, Features(columns)
    )


@pytest.mark.parametrize("name", [name for name in GLUE if name != "ax"])
def test_every_task_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The Hub's codes and hidden test labels (-1) have to come out as in the benchmark's files."""
    task = GLUE[name].task
    values = [0.5, 1.5] if name == "stsb" else list(range(task.num_labels))
    splits = {"train": values, "validation": values, "test": [-1] * 2}
    if name == "mnli":
        splits = {"train": values, "validation_matched": values, "validation_mismatched": values, "test_matched": [-1]}
    loaded = DatasetDict({split: hub_split(task, rows) for split, rows in splits.items()})
    asked = []
    monkeypatch.setattr("kdlora.data.opening.load_dataset", lambda *args, **more: asked.append(args) or loaded)
    found = load({"name": name}, path="nyu-mll/glue")
    assert asked == [("nyu-mll/glue", name)]
    assert labels(found.train) == values
    assert list(found.train["id"]) == [str(row + 5) for row in range(len(values))]
    assert found.test is None
    assert found.task == task
    if name == "mnli":
        assert list(found.validation["id"][2:4]) == ["matched-7", "mismatched-5"]
        assert list(found.validation["group"][2:4]) == ["matched", "mismatched"]
