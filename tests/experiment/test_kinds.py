"""Every kind of task through the whole experiment, with every kind of teacher and with unlabelled text."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from experiments import (
    FAST,
    answers,
    copy_experiment,
    edit_json,
    flags,
    predicted,
    read_rows,
    snapshot,
    write_lines,
)
from kdlora.configfile import build_config
from kdlora.data.load import load_splits
from kdlora.data.tasks import Task
from kdlora.distil import inference
from kdlora.distil.inference import read_stored_logits
from kdlora.errors import ArtifactError, DataError
from kdlora.evidence.predictions import read_examples
from kdlora.evidence.records import ExperimentLayout, write_record
from kdlora.experiment.recording import new_record
from kdlora.experiment.run import plan_experiment, run_experiment
from kdlora.experiment.scoring import score_given_teacher
from kdlora.experiment.settle import check_table, with_values
from kdlora.experiment.stages import label_training_rows, train_run
from kdlora.system.ownership import MANIFEST
from tiny import sentiment_rows, write_csv


def test_regression_is_scored_and_shipped_on_the_original_scale(workshop, tmp_path):
    """Targets are standardised in training; a student left on that scale correlates, and is wrong everywhere."""
    files = {}
    for split, count in (("train", 64), ("validation", 24)):
        rows = sentiment_rows(count, seed=len(split))
        for number, row in enumerate(rows):
            row["label"] = 2000 + 100 * (row["label"] == "positive") + number % 7
        files[split] = str(write_csv(tmp_path / f"{split}.csv", rows))
    config = workshop.config({"data": files, "task": {"kind": "regression"}, "run": {"arms": ["fft", "kd-lora"]}})
    result = run_experiment(config, tmp_path / "out")
    assert [record.status for record in result.records] == ["finished", "finished"]
    for record in result.records:
        assert set(record.metrics) >= {"pearson", "spearman", "mse", "mae"}
        assert 1900 < predicted(result.layout, record.arm).logits.mean() < 2200
    assert AutoConfig.from_pretrained(result.layout.student).problem_type == "regression"
    found = answers(result.layout.student, [row["text"] for row in read_rows(files["validation"])])
    np.testing.assert_allclose(found, predicted(result.layout, "kd-lora").logits, rtol=1e-4)
    stored = read_stored_logits(result.layout.teacher_logits, Task.from_dict(result.records[0].task))
    assert 1900 < stored.logits.mean() < 2200


def test_a_table_in_other_units_is_doubted_before_it_teaches(workshop, tmp_path, caplog):
    """Percent in place of stars pull the student half the way, and correlation, which ships it, sees no units."""
    rows = [{"id": str(row), "text": f"text {row}", "label": row % 6 + 0.5} for row in range(24)]
    train = write_csv(tmp_path / "train.csv", rows)
    config = workshop.config(
        {
            "data": {"train": str(train), "validation": str(train)},
            "task": {"kind": "regression"},
            "teacher": {"model": None, "logits": str(tmp_path / "table.csv")},
            "run": {"arms": ["kd-lora"]},
        }
    )
    splits = load_splits(config.task, config.data)
    for times in (1.1, 20):
        assert not caplog.messages
        said = [{"id": row["id"], "prediction": row["label"] * times} for row in reversed(rows)]
        write_csv(tmp_path / "table.csv", said)
        notes = check_table(config, splits).notes[len(splits.notes) :]
    assert list(notes) == caplog.messages
    assert notes[0].startswith("The teacher's values (mean 60) are further from the training labels (mean 3) than")


def test_probabilities_in_place_of_logits_are_doubted(workshop, tmp_path, caplog):
    """The student learnt the softmax of probabilities, hardly more than that all labels are equal."""
    rows = read_rows(workshop.train)
    teacher = {"model": None, "logits": str(tmp_path / "table.csv")}
    config = workshop.config({"teacher": teacher, "run": {"arms": ["kd-lora"]}})
    splits = load_splits(config.task, config.data)
    for times in (2, 1):
        assert not caplog.messages
        said = [{"id": row["id"], "negative": 0.9 * times, "positive": 0.12 * times} for row in rows]
        write_csv(tmp_path / "table.csv", said)
        notes = check_table(config, splits).notes[len(splits.notes) :]
    assert list(notes) == caplog.messages
    assert len(notes) == 1
    assert notes[0].startswith(f"{tmp_path / 'table.csv'}: each row of these logits sums to 1, as probabilities do")


def test_multi_label_columns_taught_by_a_table_of_probabilities(workshop, tmp_path):
    """A table without validation rows can teach, though it cannot be scored; its columns come in any order."""
    rows = flags(sentiment_rows(64))
    files = {
        "train": str(write_csv(tmp_path / "train.csv", rows)),
        "validation": str(write_csv(tmp_path / "validation.csv", flags(sentiment_rows(24, 1)))),
    }
    table = [
        {name: 0.9 if row[name] else 0.2 for name in ("music", "praise", "film")} | {"id": row["id"]}
        for row in [*reversed(rows), {"id": "unknown", "music": 0, "praise": 0, "film": 1}]
    ]
    pd.DataFrame(table).to_parquet(tmp_path / "teacher.parquet")
    teacher = {"model": None, "probabilities": str(tmp_path / "teacher.parquet")}
    sections = {"data": files, "task": {"label": ["praise", "film", "music"]}, "teacher": teacher}
    result = run_experiment(workshop.config(sections | {"run": {"arms": ["fft", "kd-lora"]}}), tmp_path / "out")
    teacher, student = result.records
    assert (teacher.status, teacher.score) == ("finished", None)
    assert any("not available" in note for note in teacher.notes)
    assert any("1 rows belong to no training example" in note for note in result.notes)
    assert student.task["kind"] == "multi-label"
    assert set(student.metrics) >= {"micro_f1", "macro_f1", "subset_accuracy"}
    assert student.history[-1]["soft_loss"] > 0
    shipped = AutoConfig.from_pretrained(result.layout.student)
    assert shipped.problem_type == "multi_label_classification"
    assert list(shipped.id2label.values()) == ["praise", "film", "music"]
    assert "not available" in result.layout.report_md.read_text()
    assert not result.layout.teacher.exists()
    # Another table at the same place: the old student was shown as its, for no run was left that would have noticed.
    before = snapshot(result.layout.root)
    pd.DataFrame(table).replace({0.9: 0.2, 0.2: 0.9}).to_parquet(tmp_path / "teacher.parquet")
    with pytest.raises(ArtifactError, match=r"teacher\.parquet is another teacher than the one that finished runs"):
        run_experiment(workshop.config(sections | {"run": {"arms": ["fft", "kd-lora"]}}), tmp_path / "out")
    assert snapshot(result.layout.root) == before


def test_pairs_of_three_classes_with_a_test_split_and_a_student_of_the_teachers_layers(workshop, tmp_path):
    """The second text must reach the model, the headline the test split, and the student's base its adapter."""
    names = ("agree", "differ", "unclear")
    files = {}
    for split, count in (("train", 60), ("validation", 24), ("test", 30)):
        rows = sentiment_rows(count, seed=len(split))
        rows = [
            {"first": row["text"], "second": other["text"], "relation": names[number % 3]}
            for number, (row, other) in enumerate(zip(rows, reversed(rows), strict=True))
        ]
        files[split] = str(write_csv(tmp_path / f"{split}.csv", rows))
    config = workshop.config(
        {
            "data": files,
            "task": {"text": ["first", "second"], "label": "relation"},
            "student": {"model": None, "from_teacher_layers": [1]},
            "run": {"arms": ["kd-lora"]},
        }
    )
    result = run_experiment(config, tmp_path / "out")
    teacher, student = result.records
    assert (teacher.arm, student.status) == ("fft", "finished")
    assert student.rows == {"train": 60, "validation": 24, "test": 30}
    assert student.test_score == pytest.approx(100 * student.test_metrics["accuracy"])
    assert student.total_parameters < teacher.total_parameters
    assert "on the test split" in (result.layout.student / "README.md").read_text()
    on_test = predicted(result.layout, "kd-lora", split="test")
    assert on_test.label_names == names
    assert on_test.ids == tuple(str(row) for row in range(30))
    assert {split for split, _ in read_examples(result.layout.examples)} == {"validation", "test"}
    # The base of this adapter lies nowhere else, so it is shipped too.
    rows = read_rows(files["test"])
    texts = [row["first"] for row in rows], [row["second"] for row in rows]
    for folder in (result.layout.adapter, result.layout.student):
        found = answers(folder, *texts, adapter=folder == result.layout.adapter)
        np.testing.assert_allclose(found, on_test.logits, atol=1e-4)
    # Shipped again with every call, it would be exported and measured again too.
    before = snapshot(result.layout.root)
    run_experiment(config, tmp_path / "out")
    shipped = {name for name in before if name.split("/")[0] in ("student", "adapter")}
    assert "adapter/base/model.safetensors" in shipped
    assert snapshot(result.layout.root).items() >= {(name, before[name]) for name in shipped}
    (result.layout.adapter / "base" / "model.safetensors").unlink()
    run_experiment(config, tmp_path / "out")
    assert (result.layout.adapter / "base" / "model.safetensors").is_file()


def test_a_given_teacher_with_its_labels_in_another_order_is_the_same_teacher(
    experiment, workshop, tmp_path, monkeypatch
):
    """Columns matched by position teach every student the opposite, and the loss still falls.

    One that is exchanged after it was scored would teach under another's score; labelling by as many tokens as ever ran
    out of memory again.
    """
    turned = copy_experiment(experiment.layout.teacher, tmp_path / "reversed")
    weights = load_file(turned / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, turned / "model.safetensors", metadata={"format": "pt"})
    edit_json(turned / "config.json", id2label={"0": "positive", "1": "negative"})
    edit_json(turned / "config.json", label2id={"positive": 0, "negative": 1})
    layout = ExperimentLayout(tmp_path / "out")
    teacher = {"fine_tuned": str(turned), "train": FAST | {"micro_batch_tokens": 64}}
    config = workshop.config({"teacher": teacher, "run": {"arms": ["fft", "kd-lora"]}})
    record = train_run(config, layout, "fft", 0, lambda event: None)
    write_record(layout.run("fft", 0).record, record)
    assert record.metrics == experiment.records[0].metrics
    assert any("evaluated, not trained" in note for note in record.notes)
    tokens, predict_logits = [], inference.predict_logits

    def watch(*given, **named):
        tokens.append(named["batch_tokens"])
        return predict_logits(*given, **named)

    monkeypatch.setattr(inference, "predict_logits", watch)
    label_training_rows(config, layout)
    assert tokens == [64]
    task, before = Task.from_dict(experiment.records[0].task), experiment.layout
    np.testing.assert_allclose(predicted(layout, "fft").logits, predicted(before, "fft").logits, atol=1e-5)
    said, wanted = (read_stored_logits(one.teacher_logits, task).logits for one in (layout, before))
    np.testing.assert_allclose(said, wanted, atol=1e-5)
    edit_json(layout.root / MANIFEST, made_by="kdlora", kind="experiment")
    plan_experiment(config, layout.root)  # whose look at the models is a child, too
    shutil.copy(experiment.layout.teacher / "model.safetensors", turned)
    with pytest.raises(ArtifactError, match="reversed is another teacher than the one that finished runs in"):
        plan_experiment(config, layout.root)
    shutil.rmtree(layout.teacher_logits)
    with pytest.raises(ArtifactError, match=r"other weights than when it was scored.*fft-seed0 to have it scored anew"):
        label_training_rows(config, layout)


@pytest.fixture
def config(workshop, tmp_path):
    """Forty unlabelled rows with ids that the training rows have too, and one scored text."""
    rows = [{"id": row["id"], "text": row["text"] + " indeed"} for row in sentiment_rows(40, seed=7)]
    rows.append({"id": "scored", "text": sentiment_rows(40, seed=1)[0]["text"]})
    path = write_csv(tmp_path / "unlabelled.csv", rows)
    return workshop.config({"data": {"unlabelled": str(path)}, "run": {"arms": ["fft", "kd-lora", "student-lora"]}})


def test_the_teacher_labels_them_and_the_student_learns_from_both(config, tmp_path):
    """Rows that nobody trains on, or logits attached to the training row of the same id, would go unnoticed.

    `lora` had a student's epochs, which are few where there are many unlabelled texts, of its own few rows.
    """
    config = with_values(config, {"run.arms": (*config.run.arms, "lora")})
    result, splits = run_experiment(config, tmp_path / "out"), load_splits(config.task, config.data)
    stored = read_stored_logits(result.layout.unlabelled_logits, splits.task)
    assert stored.ids.to_pylist() == splits.unlabelled["id"][:]
    np.testing.assert_array_equal(np.asarray(stored.attach(splits.unlabelled)["teacher_logits"]), stored.logits)
    assert [record.status for record in result.records] == ["finished"] * 4
    teacher, control, student, large = (
        next(one for one in result.records if one.arm == arm) for arm in ("fft", "student-lora", "kd-lora", "lora")
    )
    assert student.rows == {"train": 64, "unlabelled": 40, "validation": 40}
    steps = 2 * math.ceil(104 / 8)
    assert [one.history[-1]["step"] for one in (student, control, large)] == [steps] * 3
    assert teacher.history[-1]["step"] == 2 * math.ceil(64 / 8)
    assert student.history[-1]["soft_loss"] > 0
    assert student.truncated["unlabelled (by the teacher)"] == student.truncated["unlabelled"] == 0
    assert "unlabelled" not in control.truncated
    report = result.layout.report_md.read_text()  # a reader who does not know of them takes the gain for the loss's
    assert "train 64, unlabelled 40, validation 40" in report
    assert "40 unlabelled rows: the teacher labelled them" in report
    assert "hold the text of a validation or test row" in report
    assert "unlabelled rows, labelled by the teacher: 40" in (result.layout.student / "README.md").read_text()


def test_a_table_of_the_training_rows_covers_those_that_validate(tmp_path):
    """A teacher that answered every training row had no score, for a tenth of them was called `validation` later."""
    rows = [{"id": f"r{row}", "text": f"a text {row}", "label": "bg"[row % 2]} for row in range(40)]
    answers = [{"id": row["id"], "b": 1.0 - (row["label"] == "g"), "g": float(row["label"] == "g")} for row in rows]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "table.jsonl", answers)
    data, teacher = {"train": str(tmp_path / "train.jsonl")}, {"probabilities": str(tmp_path / "table.jsonl")}
    given = build_config({"data": data, "teacher": teacher, "student": {"model": "m"}})
    layout, splits = ExperimentLayout(tmp_path / "run"), load_splits(given.task, given.data)
    record = score_given_teacher(given, layout, splits, new_record(given, layout, splits, "fft", 0))
    assert record.score == 100
    own = write_lines(tmp_path / "own.jsonl", [{**row, "id": row["id"] + "v"} for row in rows])  # other rows
    given = build_config({"data": data | {"validation": str(own)}, "teacher": teacher, "student": {"model": "m"}})
    splits = load_splits(given.task, given.data)
    record = score_given_teacher(given, layout, splits, new_record(given, layout, splits, "fft", 0))
    assert record.score is None


def test_a_table_must_cover_the_unlabelled_rows(config, tmp_path):
    """Found out by the child of the first student, the fault costs a teacher's evaluation; named early, nothing."""
    path = tmp_path / "table.jsonl"
    splits = load_splits(config.task, config.data)
    config = with_values(config, {"teacher.model": None, "teacher.logits": str(path)})
    rows = [("train", key) for key in splits.train["id"]] + [("unlabelled", key) for key in splits.unlabelled["id"]]
    table = [{"split": split, "id": key, "negative": 0.5, "positive": 0.25} for split, key in rows]
    write_lines(path, [row for row in table if row["split"] == "train"])
    with pytest.raises(DataError, match="no row is of split 'unlabelled'"):
        check_table(config, splits)
    nobody = with_values(config, {"run.arms": ("student-lora",)})
    assert check_table(nobody, splits) is splits  # whom it does not teach, it need not cover
    write_lines(path, [*table, {"split": "unlabelled", "id": "x", "negative": 0, "positive": 0}])
    told = f"{path}: 1 rows belong to no unlabelled example and teach nothing."
    assert check_table(config, splits).notes == (*splits.notes, told)
    assert plan_experiment(config, tmp_path / "out").notes[-1] == told  # `--dry-run` prints it
