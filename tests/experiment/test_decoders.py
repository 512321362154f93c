"""Decoders, and teachers that are tuned by adapters, through the whole experiment."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from experiments import read_rows
from kdlora.configfile import build_config
from kdlora.data.tasks import Task
from kdlora.deploy.export import export_onnx
from kdlora.deploy.predict import Classifier
from kdlora.distil.inference import read_stored_logits
from kdlora.errors import ConfigError, ModelError
from kdlora.evidence.predictions import read_predictions
from kdlora.experiment.plan import reset_unused
from kdlora.experiment.run import plan_experiment, plan_runs, run_experiment


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.build_model_folder("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def taught(workshop, llama, tmp_path_factory):
    """A Llama, tuned by adapters, teaches a DistilBERT."""
    teacher = {"model": str(llama), "tuning": "lora", "adapter_learning_rate": 1e-2}
    config = workshop.config({"teacher": teacher, "run": {"arms": ["kd-lora", "student-lora"]}})
    folder = tmp_path_factory.mktemp("taught") / "out"
    return plan_experiment(config, folder), run_experiment(config, folder)


def answers(folder, texts):
    """Give what a saved model says by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")).logits.numpy()


def test_the_teacher_tuned_by_adapters_is_the_one_that_teaches(workshop, taught):
    """All weights would be tuned after all, or the base without its adapter asked for the logits."""
    plan, result = taught
    layout = result.layout
    assert [one.arm for one in plan.trainings] == ["lora", "student-lora", "kd-lora"]
    assert [record.status for record in result.records] == ["finished"] * 3
    own = {record.arm: record for record in result.records}
    assert own["lora"].trainable_parameters < own["lora"].total_parameters / 2
    assert own["lora"].history[-1]["epoch"] == 2  # of teacher.train
    told = "the teacher is tuned by adapters (teacher.tuning: lora), merged before it labels"
    assert [told in own[arm].notes for arm in ("lora", "kd-lora", "student-lora")] == [True, True, False]
    scored = read_predictions(layout.run("lora", 0).predictions).only("validation")
    texts = [row["text"] for row in read_rows(workshop.validation)]
    np.testing.assert_allclose(answers(layout.teacher, texts), scored.logits, atol=1e-4)
    stored = read_stored_logits(layout.teacher_logits, Task.from_dict(own["lora"].task))
    texts = [row["text"] for row in read_rows(workshop.train)]
    np.testing.assert_allclose(answers(layout.teacher, texts), stored.logits, atol=1e-4)
    assert any(name.endswith("teacher/model.safetensors") for name in own["lora"].files)

    # Without `fft` the report would say that no teacher was run.
    report = taught[1].layout.report_md.read_text()
    assert "model (LoRA)’s score" in report or "of model (LoRA)" in report
    assert "was not run" not in report

    # A teacher in another arm's folder, not found, would be trained anew at every call.
    layout = taught[1].layout
    before = layout.run("lora", 0).record.stat().st_mtime_ns
    again = run_experiment(taught[0].config, layout.root)
    assert len(again.records) == 3
    assert layout.run("lora", 0).record.stat().st_mtime_ns == before


def test_who_teaches_is_planned_and_counts_for_a_suite(workshop):
    """Runs by another teacher, or at another seed, would be taken for equal ones."""
    values = {"teacher": {"tuning": "lora", "seed": 7}, "run": {"arms": ["fft", "lora", "kd-lora"], "seeds": [0, 1]}}
    config = workshop.config(values)
    runs = [(run.arm, run.seed) for run in plan_runs(config)]
    assert runs == [("lora", 7), ("fft", 0), ("fft", 1), ("lora", 0), ("lora", 1), ("kd-lora", 0), ("kd-lora", 1)]
    assert reset_unused(config, "lora").teacher == config.teacher
    assert reset_unused(workshop.config(values | {"teacher": {"seed": 7}}), "lora").teacher.seed is None
    data = {"data": {"train": "rows.csv"}, "student": {"model": "small"}}
    arms = build_config({**data, "teacher": {"model": "large", "tuning": "lora"}}).run.arms
    assert arms == ("words", "lora", "kd-lora", "student-lora")
    with pytest.raises(ConfigError, match=r"teacher\.fine_tuned gives one"):
        build_config({**data, "teacher": {"fine_tuned": "large", "tuning": "lora"}})


def test_a_decoder_as_student_predicts_what_was_scored(workshop, llama, tmp_path):
    """Served with other padding or without it, a student answers otherwise than in its report."""
    changes = {"student": {"model": str(llama)}, "export": {"formats": ["onnx"], "benchmark": True}}
    result = run_experiment(workshop.config(changes), tmp_path / "out")
    layout = result.layout
    scored = read_predictions(layout.run("student-lora", 0).predictions).only("validation")
    texts = [row["text"] for row in read_rows(workshop.validation)]
    found = Classifier.load(layout.student).predict_logits(texts)
    np.testing.assert_allclose(found, scored.logits, atol=1e-4)
    np.testing.assert_allclose(answers(layout.student, texts), scored.logits, atol=1e-4)
    assert [note for note in result.notes if "only encoders are exported to ONNX" in note]
    assert json.loads(layout.benchmark.read_text())["models"]
    with pytest.raises(ModelError, match=r"is a decoder .*only encoders"):
        export_onnx(layout.student, tmp_path / "onnx", formats=("onnx",))
