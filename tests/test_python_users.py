"""What Python users see: reprs, tables and bars in notebooks, callbacks, arguments of a plain Trainer script."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import TrainerCallback

from kdlora import (
    Config,
    LoraSettings,
    StudentTrainConfig,
    TeacherTrainConfig,
    attach_teacher,
    build_config,
    load_encoder,
    load_splits,
    merge_student,
    train_student,
    train_teacher,
)
from kdlora.config import DataConfig, DistilConfig, StudentConfig, TaskConfig
from kdlora.data.windows import WindowSettings
from kdlora.deploy.predict import Classifier
from kdlora.distil.logits import TeacherLogits
from kdlora.errors import ConfigError, DataError
from kdlora.experiment.scoring import evaluate
from kdlora.models.encoders import save_encoder
from kdlora.report.report import make_report


@pytest.fixture(scope="module")
def splits(workshop):
    return load_splits(TaskConfig(), DataConfig(train=str(workshop.train), validation=str(workshop.validation)))


class Steps(TrainerCallback):
    def __init__(self, most=100):
        self.count, self.most = 0, most

    def on_step_end(self, args, state, control, **_):
        self.count, self.planned = self.count + 1, state.max_steps
        control.should_training_stop = self.count == self.most


def test_reprs_are_a_line_and_notebooks_show_tables(experiment, splits, workshop):
    """The default repr of an experiment is ten thousand characters of records, of a model every layer."""
    report = make_report(experiment.folder, out=experiment.folder.parent / "again", draws=50)
    logits = TeacherLogits(["a", "b"], np.zeros((2, 2), dtype=np.float32), ("no", "yes"), "")
    said = [
        repr(experiment),
        repr(splits),
        repr(logits),
        repr(Classifier.load(experiment.layout.student)),
        repr(load_encoder(str(workshop.student), splits.task, seed=0)),
        repr(report),
    ]
    assert all(len(text) < 500 for text in said)
    assert "12 runs, 0 failed, kd-" in said[0]
    failed = experiment.records[0].model_copy(update={"status": "failed"})
    table = replace(experiment, records=[failed, *experiment.records[1:]])._repr_html_()
    assert table.count("<tr>") == 1 + 6
    assert '<th scope="row">kd-lora</th>' in table
    frame = report._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts" title=')
    assert "<script>" not in frame, "the page is an attribute, escaped"


def test_callbacks_reach_the_training(workshop, splits, tmp_path):
    """An argument that is accepted and dropped: the tracker shows an empty run."""
    steps = Steps()
    settings = TeacherTrainConfig(epochs=1, batch_size=16, learning_rate=1e-3)
    train_student(
        str(workshop.student), splits, settings, folder=tmp_path, lora=None, precision="fp32", callbacks=[steps]
    )
    assert steps.count == 4

    # Splits that already teach a student must not distil one teacher into the next.
    ids = splits.train["id"]
    said = TeacherLogits(pa.array(ids), np.zeros((len(ids), 2), np.float32), splits.task.label_names, "by hand")
    settings, told = TeacherTrainConfig(epochs=1, batch_size=32, learning_rate=1e-4), []
    for rows in (splits, attach_teacher(splits, said)):
        trained = train_teacher(str(workshop.teacher), rows, settings, folder=tmp_path / str(len(told)), device="cpu")
        told.append([sorted(entry) for entry in trained.outcome.history])
    assert told[0] == told[1]


def test_a_teacher_made_by_hand_is_read_by_its_names(splits):
    """Columns in another order than the task's labels taught every class reversed, without a word."""
    numbers, labels = list(range(len(splits.train))), splits.task.label_names
    values = np.random.default_rng(0).normal(size=(len(numbers), 2)).astype(np.float32)
    rows = replace(splits, train=splits.train.remove_columns("id").add_column("id", [str(one) for one in numbers]))
    taught = [
        attach_teacher(rows, TeacherLogits(numbers, logits, names, "by hand")).train["teacher_logits"][:]
        for logits, names in ((values, labels), (values[:, ::-1], labels[::-1]))
    ]
    assert taught[0] == taught[1]
    with pytest.raises(DataError, match="Name the teacher's columns as the task names its labels"):
        attach_teacher(rows, TeacherLogits(numbers, values, ("good", "bad"), "by hand"))
    said = TeacherLogits(numbers, values, labels, "by hand")
    with pytest.raises(ConfigError, match="this teacher gives probabilities; use kl"):
        attach_teacher(rows, said, replace(said, from_probabilities=True), distil=DistilConfig(loss="mse"))


def test_a_config_made_of_parts_is_that_of_its_keys():
    """Parts that were set kept the paper's other values, under a recipe that said `default`."""
    parts = Config(
        data=DataConfig(train="/data/reviews.csv"),
        family="bert",
        lora=LoraSettings(rank=8),
        student=StudentConfig(train=StudentTrainConfig(epochs=3)),
    )
    keys = {"data": {"train": "/data/reviews.csv"}, "family": "bert", "lora": {"rank": 8}}
    assert parts.model_dump() == build_config({**keys, "student": {"train": {"epochs": 3}}}).model_dump()
    assert (parts.lora.targets, parts.data.augment, parts.student.train.dropout) == ("all-linear", None, 0.0)


def test_students_by_adapters_and_with_all_weights_take_the_same_steps(workshop, splits, tmp_path):
    """With all weights tuned it took a teacher's fewer passes."""
    settings, seen = StudentTrainConfig(epochs=None, batch_size=16), {}
    for name, lora in (("adapters", LoraSettings()), ("all", None)):
        seen[name] = Steps(most=1)
        given = {"folder": tmp_path / name, "lora": lora, "device": "cpu", "callbacks": [seen[name]]}
        train_student(str(workshop.student), splits, settings, **given)
    assert seen["all"].planned == seen["adapters"].planned == 600


def test_a_loaded_student_stays_as_it_is(workshop, splits, tmp_path):
    """The control began at the distilled weights; and without adapters, at a rate that is theirs."""
    encoder = load_encoder(str(workshop.student), splits.task, seed=0)
    settings = StudentTrainConfig(epochs=1, batch_size=32)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    found = [
        train_student(encoder, splits, settings, folder=tmp_path / name, lora=None, device="cpu").outcome.history
        for name in ("one", "two")
    ]
    plain = [[{key: entry[key] for key in ("score", "loss", "learning_rate")} for entry in one] for one in found]
    assert plain[0] == plain[1]
    assert max(entry["learning_rate"] for entry in plain[0]) > StudentTrainConfig().learning_rate  # of a tiny width
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.model.state_dict().items())


def test_a_saved_student_reads_long_texts_as_it_was_trained(workshop, splits, tmp_path):
    """It was read up to the model's limit, without windows, or by what its base had noted."""
    rows = replace(splits, task=replace(splits.task, windows=WindowSettings(pool="max")))
    encoder = load_encoder(str(workshop.student), rows.task, seed=0)
    encoder.model.config.kdlora_task = splits.task.to_dict() | {"text": ["premise", "hypothesis"]}
    settings = StudentTrainConfig(epochs=1, batch_size=32, max_length=8)
    trained = train_student(encoder, rows, settings, folder=tmp_path / "training", device="cpu", precision="fp32")
    merged = merge_student(trained.model)
    save_encoder(replace(trained.encoder, model=merged), tmp_path / "saved")
    student = Classifier.load(tmp_path / "saved")
    assert student.folder.task == rows.task.to_dict()
    expected = evaluate(merged, encoder.tokenizer, splits.validation, rows.task).logits
    np.testing.assert_allclose(student.predict_logits(splits.validation["text"][:]), expected, atol=1e-5)
