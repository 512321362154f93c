"""Unlabelled text and perturbed copies through an experiment: labelled by the teacher, learnt by the student."""

import math

import numpy as np
import pytest

from experiments import write_lines
from kdlora.data.load import load_splits
from kdlora.distil.teacher import read_stored_logits
from kdlora.errors import ConfigError, DataError
from kdlora.experiment.inputs import check_table
from kdlora.experiment.run import run_experiment
from tiny import sentiment_rows, write_csv

pytest_plugins = ["experiment_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it

ARMS = ["fft", "kd-lora", "student-lora"]


@pytest.fixture(scope="module")
def config(workshop, tmp_path_factory):
    """Forty unlabelled rows with ids that the training rows have too, and one scored text."""
    rows = [{"id": row["id"], "text": row["text"] + " indeed"} for row in sentiment_rows(40, seed=7)]
    rows.append({"id": "scored", "text": sentiment_rows(40, seed=1)[0]["text"]})
    path = write_csv(tmp_path_factory.mktemp("unlabelled") / "unlabelled.csv", rows)
    return workshop.config({"data": {"unlabelled": str(path)}, "run": {"arms": ARMS}})


@pytest.fixture(scope="module")
def result(config, tmp_path_factory):
    """A finished experiment with unlabelled rows."""
    return run_experiment(config, tmp_path_factory.mktemp("unlabelled-experiment") / "out")


def check_labelled(result, config):
    """See that the stored logits of the unlabelled rows are theirs; give the splits."""
    splits = load_splits(config.task, config.data)
    stored = read_stored_logits(result.layout.unlabelled_logits, splits.task)
    assert stored.ids.to_pylist() == splits.unlabelled["id"][:]
    np.testing.assert_array_equal(np.asarray(stored.attach(splits.unlabelled)["teacher_logits"]), stored.logits)
    return splits


def test_the_teacher_labels_them_and_the_student_learns_from_both(result, config):
    """Rows that nobody trains on, or logits attached to the training row of the same id, would go unnoticed."""
    teacher, control, student = result.records
    assert [record.status for record in result.records] == ["finished"] * 3
    assert student.rows == {"train": 64, "unlabelled": 40, "validation": 40}
    check_labelled(result, config)
    steps = 2 * math.ceil(104 / 8)
    assert student.history[-1]["step"] == control.history[-1]["step"] == steps
    assert teacher.history[-1]["step"] == 2 * math.ceil(64 / 8)
    assert student.history[-1]["soft_loss"] > 0
    assert student.truncated["unlabelled (by the teacher)"] == student.truncated["unlabelled"] == 0
    assert "unlabelled" not in control.truncated
    report = result.layout.report_md.read_text()  # a reader who does not know of them takes the gain for the loss's
    assert "train 64, unlabelled 40, validation 40" in report
    assert "40 unlabelled rows: the teacher labelled them" in report
    assert "hold the text of a validation or test row" in report
    assert "unlabelled rows, labelled by the teacher: 40" in (result.layout.student / "README.md").read_text()


def test_the_same_command_again_labels_nothing(result, config, monkeypatch):
    """Labelling is what unlabelled rows cost; a second call must find it done."""
    from kdlora.experiment import jobs

    monkeypatch.setattr(jobs, "run_in_child", lambda *_, **__: pytest.fail("a stage ran again"))
    assert run_experiment(config, result.folder).records == result.records


def test_a_table_must_cover_the_unlabelled_rows(config, tmp_path):
    """Found out by the child of the first student, the fault costs a teacher's evaluation; named early, nothing."""
    path = tmp_path / "table.jsonl"
    teacher = config.teacher.model_copy(update={"model": None, "logits": str(path)})
    config, splits = config.model_copy(update={"teacher": teacher}), load_splits(config.task, config.data)
    rows = [("train", key) for key in splits.train["id"]] + [("unlabelled", key) for key in splits.unlabelled["id"]]
    table = [{"split": split, "id": key, "negative": 0.5, "positive": 0.25} for split, key in rows]
    write_lines(path, [row for row in table if row["split"] == "train"])
    with pytest.raises(DataError, match="no row is of split 'unlabelled'"):
        check_table(config, splits)
    write_lines(path, [*table, {"split": "unlabelled", "id": "x", "negative": 0, "positive": 0}])
    assert check_table(config, splits) == [f"{path}: 1 rows belong to no unlabelled example and are not used."]


def test_a_collection_of_another_teacher_is_refused(workshop, tmp_path):
    """Two teachers that teach one student make a gain that belongs to neither."""
    (tmp_path / "collection.json").write_text(
        '{"schema_version": 1, "complete": true, "model": "M", "texts": 1, "label_names": ["negative", "positive"], '
        '"fingerprint": "f", "ingredients": {"weights": "w"}, "versions": {}, "shards": []}'
    )
    config = workshop.config({"data": {"unlabelled": str(tmp_path)}, "run": {"arms": ["kd-lora"]}})
    splits = load_splits(config.task, workshop.config().data)
    with pytest.raises(ConfigError, match=r"that M labelled, but this experiment trains a teacher of its own"):
        check_table(config, splits)


def test_the_teacher_labels_the_copies_and_the_epochs_stay_as_long(workshop, tmp_path):
    """Copies that nobody labels, or that make the student's training longer, would be an unfair gain or none."""
    config = workshop.config({"data": {"augment": 2}, "run": {"arms": ARMS}})
    result = run_experiment(config, tmp_path / "out")
    _, control, student = result.records
    assert [record.status for record in result.records] == ["finished"] * 3
    splits = check_labelled(result, config)
    assert 64 < splits.copies <= 128
    assert student.rows["unlabelled"] == splits.copies
    assert [record.history[-1]["step"] for record in result.records] == [2 * math.ceil(64 / 8)] * 3
    assert student.history[-1]["loss"] != control.history[-1]["loss"]
    assert len(list(result.layout.copies.glob("*.arrow"))) == 1
    assert "perturbed copies" in result.layout.report_md.read_text()
