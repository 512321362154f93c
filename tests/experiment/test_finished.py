"""A finished experiment: every file, every field, and a student that is what its record says."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from experiments import ARMS, read_rows, snapshot
from kdlora.configfile import load_config
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import read_record, read_results
from kdlora.experiment.scoring import evaluate_experiment
from kdlora.report.choice import read_choice

pytest_plugins = ["experiment_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it


def logits_of(model, folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()


@pytest.fixture(scope="module")
def layout(experiment):
    return experiment.layout


@pytest.fixture(scope="module")
def texts(workshop):
    return [row["text"] for row in read_rows(workshop.validation)]


@pytest.fixture(scope="module")
def student(layout):
    return AutoModelForSequenceClassification.from_pretrained(layout.student)


def test_the_folder_holds_what_it_promises_and_nothing_half_done(layout):
    """A missing file shows when the user needs it; leftovers of a training fill the disk."""
    for path in (layout.config, layout.results, layout.report_md, layout.report_html, layout.student, layout.adapter):
        assert path.exists(), path
    assert (layout.teacher / "model.safetensors").exists()
    assert list(layout.teacher_logits.iterdir())
    for arm in ARMS:
        for seed in (0, 1):
            place = layout.run(arm, seed)
            assert place.record.exists()
            assert place.predictions.exists()
            assert place.adapter.exists() == arm.endswith("lora")  # an arm without weights could never ship,
            assert place.model.exists() == (
                arm in ("kd-fft", "student-fft")
            )  # and a model for each would fill the disk
            assert not place.checkpoints.exists()
    leftovers = [path for path in layout.root.rglob("*") if ".tmp-" in path.name]
    assert not leftovers


def test_results_json_has_the_fields_that_others_read(layout):
    """`results.json` is the interface to other programs; a renamed field breaks them in silence."""
    runs = json.loads(layout.results.read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs[:3]] == [("fft", 0), ("fft", 1), ("lora", 0)]
    assert len(runs) == 12
    for run in runs:
        assert run["status"] == "finished", run["error"]
        assert 0.0 <= run["score"] <= 100.0
        assert run["score"] == pytest.approx(100 * run["metrics"]["accuracy"])
        for key in (
            "trainable_parameters",
            "total_parameters",
            "train_seconds",
            "evaluation_seconds",
            "examples_per_second",
        ):
            assert run[key] > 0, key


def test_every_record_is_complete(layout):
    """A figure that is missing in one arm is missing in every comparison."""
    for record in read_results(layout.results):
        assert read_record(layout.run(record.arm, record.seed).record) == record
        assert record.rows == {"train": 64, "validation": 40}
        assert record.trainable_parameters == record.adapter_parameters + record.head_parameters or (
            record.adapter_parameters == 0 and record.trainable_parameters == record.total_parameters
        )
        assert (record.adapter_parameters > 0) == record.arm.endswith("lora")
        assert record.peak_memory_bytes > 0
        assert [entry.batch_size for entry in record.latency] == [1, 32]
        assert set(record.fingerprints) >= {"config", "data"}
        assert set(record.versions) >= {"torch", "transformers", "peft"}
        assert record.machine
        assert record.precision == "fp32"
        assert record.started <= record.finished
        assert [entry["epoch"] for entry in record.history] == [1.0, 2.0]
        distilled = record.arm.startswith("kd-")
        assert all(("soft_loss" in entry) == distilled for entry in record.history), record.arm


def test_sizes_are_those_of_the_models(layout):
    """Arms that loaded the wrong model would still train and score; and compactness is a headline."""
    records = {record.arm: record for record in read_results(layout.results)}
    totals = {arm: record.total_parameters for arm, record in records.items()}
    assert totals["fft"] == totals["lora"] > totals["kd-lora"]
    assert totals["kd-lora"] == totals["student-lora"] == totals["student-fft"] == totals["kd-fft"]
    size = (layout.student / "model.safetensors").stat().st_size
    assert records["kd-lora"].size_bytes == pytest.approx(size, abs=20_000)


def test_the_shipped_arm_and_seed_are_the_best_on_validation(experiment, layout):
    """Shipping the last seed, or always the same arm, would look just as well."""
    choice = read_choice(layout.shipped)
    scores = {record.seed: record.score for record in experiment.records if record.arm == choice.arm}
    assert choice.seed == max(sorted(scores), key=lambda seed: scores[seed])
    assert (experiment.shipped.arm, experiment.shipped.seed) == (choice.arm, choice.seed)
    assert choice.scores[choice.arm] == pytest.approx(np.mean(list(scores.values())))
    assert set(choice.scores) == set(ARMS) - {"fft", "lora"}
    for text in (layout.report_md.read_text(), (layout.student / "README.md").read_text()):
        assert choice.sentence.partition(" was shipped")[2] in text


def test_the_student_reloads_and_says_what_was_recorded(experiment, layout, student, texts):
    """Merged with the wrong scale, or saved before the merge, a student loads and errs."""
    recorded = read_predictions(layout.run(experiment.shipped.arm, experiment.shipped.seed).predictions)
    assert recorded.label_names == ("negative", "positive")
    assert student.config.id2label == {0: "negative", 1: "positive"}
    assert student.config.problem_type == "single_label_classification"
    np.testing.assert_allclose(logits_of(student, layout.student, texts), recorded.logits, atol=1e-4)


def test_the_pipeline_answers_with_label_names(layout):
    """`LABEL_1` is no answer."""
    classify = pipeline("text-classification", model=str(layout.student), device="cpu")
    assert classify("what a wonderful film")[0]["label"] in {"negative", "positive"}


def test_the_adapter_is_the_student_head_included(layout, texts):
    """An adapter saved without its head gets a random one on loading, and only a warning."""
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(layout.adapter, num_labels=2)
    merged = AutoModelForSequenceClassification.from_pretrained(layout.student)
    np.testing.assert_allclose(
        logits_of(adapter, layout.student, texts), logits_of(merged, layout.student, texts), atol=1e-4
    )


def test_what_is_shipped_names_no_path_of_this_machine(experiment, layout, workshop):
    """A card with a home folder in it is published with the model."""
    secrets = [str(layout.root.parent), str(workshop.student.parent), str(workshop.train.parent)]
    for path in layout.student.iterdir():
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
    card = (layout.student / "README.md").read_text()
    assert experiment.shipped.arm in card
    assert f"`{workshop.teacher.name}`" in card


def test_the_saved_config_is_the_experiment(experiment, layout, workshop):
    """A config that lost a key on its way to disk reruns something else."""
    assert load_config(layout.config) == workshop.config({"run": {"arms": ARMS, "seeds": [0, 1]}})


def test_predictions_cover_every_validation_row_once(layout, workshop):
    """Paired intervals need the same examples in every run."""
    ids = [row["id"] for row in read_rows(workshop.validation)]
    for arm in ARMS:
        found = read_predictions(layout.run(arm, 0).predictions)
        assert list(found.ids) == ids
        assert set(found.split) == {"validation"}


def test_evaluation_of_the_validation_file_gives_the_recorded_scores(experiment, layout, workshop):
    """Other truncation or label order in `evaluate` would give other scores for the same model and rows."""
    before = snapshot(layout.root)
    rows = {row["model"]: row for row in evaluate_experiment(layout.root, str(workshop.validation))}
    recorded = {(record.arm, record.seed): record for record in experiment.records}
    student, teacher = recorded[experiment.shipped.arm, experiment.shipped.seed], recorded["fft", 0]
    assert rows["student"]["score"] == pytest.approx(student.score)
    assert rows["teacher"]["score"] == pytest.approx(teacher.score)
    assert rows["student"]["metrics"] == pytest.approx(student.metrics)
    assert rows["student"]["examples"] == 40
    assert snapshot(layout.root) == before
