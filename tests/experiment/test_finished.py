"""A finished experiment: every file, every field, and a student that is what its record says."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from experiments import ARMS, read_rows
from kdlora.configfile import load_config
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import read_record, read_results
from kdlora.report.findings import read_choice
from kdlora.system.environment import read_memory


@pytest.fixture(scope="module")
def layout(experiment):
    return experiment.layout


def test_the_folder_holds_what_it_promises_and_nothing_half_done(experiment, layout, workshop):
    """A missing file shows when the user needs it; leftovers of a training fill the disk."""
    for path in (layout.results, layout.report_md, layout.report_html, layout.student):
        assert path.exists(), path
    assert layout.adapter.exists() == experiment.shipped.arm.endswith("lora")
    assert (layout.teacher / "model.safetensors").exists()
    assert list(layout.teacher_logits.iterdir())
    assert load_config(layout.config) == workshop.config({"run": {"arms": ARMS, "seeds": [0, 1]}})
    ids = [row["id"] for row in read_rows(workshop.validation)]
    for place in (layout.run(arm, seed) for arm in ARMS for seed in (0, 1)):
        found = read_predictions(place.predictions)  # paired intervals need the same examples in every run
        assert (list(found.ids), set(found.split)) == (ids, {"validation"})
        arm = place.root.name.rpartition("-")[0]
        assert place.adapter.exists() == arm.endswith("lora")  # an arm without weights could never ship,
        assert place.model.exists() == (arm in ("kd-fft", "student-fft"))  # and a model for each would fill the disk
        assert not place.checkpoints.exists()
    assert not [path for path in layout.root.rglob("*") if ".tmp-" in path.name]


def test_results_and_records_are_complete(layout):
    """`results.json` is the interface to other programs; a figure that one arm lacks is in no comparison."""
    runs = json.loads(layout.results.read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs[:3]] == [("fft", 0), ("fft", 1), ("lora", 0)]
    assert len(runs) == 12
    timed = ("trainable_parameters", "total_parameters", "train_seconds", "evaluation_seconds", "examples_per_second")
    for run, record in zip(runs, read_results(layout.results), strict=True):
        assert run["status"] == "finished", run["error"]
        assert run["score"] == pytest.approx(100 * run["metrics"]["accuracy"])
        assert all(run[key] > 0 for key in timed)
        assert (run["peak_memory_bytes"] is None) if read_memory() is None else run["peak_memory_bytes"] > 0
        assert read_record(layout.run(record.arm, record.seed).record) == record
        assert record.rows == {"train": 64, "validation": 40}
        assert record.trainable_parameters == record.adapter_parameters + record.head_parameters or (
            record.adapter_parameters == 0 and record.trainable_parameters == record.total_parameters
        )
        assert (record.adapter_parameters > 0) == record.arm.endswith("lora")
        assert [entry.batch_size for entry in record.latency] == [1, 32]
        assert set(record.fingerprints) >= {"config", "data"}
        assert set(record.versions) >= {"torch", "transformers", "peft"}
        assert record.machine
        assert record.precision == "fp32"
        assert record.started <= record.finished
        assert [entry["epoch"] for entry in record.history] == [1.0, 2.0]
        distilled = record.arm.startswith("kd-")
        assert all(("soft_loss" in entry) == distilled for entry in record.history), record.arm

    # Arms that loaded the wrong model would still train and score; and compactness is a headline.
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
    assert "the last call" not in choice.sentence  # which named all
    for text in (layout.report_md.read_text(), (layout.student / "README.md").read_text()):
        assert choice.sentence.partition(" was shipped")[2] in text


def test_student_and_adapter_reload_and_say_what_was_recorded(experiment, layout, workshop):
    """Merged with the wrong scale, or saved before the merge, a student loads and errs."""
    recorded = read_predictions(layout.run(experiment.shipped.arm, experiment.shipped.seed).predictions)
    assert recorded.label_names == ("negative", "positive")
    student = AutoModelForSequenceClassification.from_pretrained(layout.student)
    assert student.config.id2label == {0: "negative", 1: "positive"}
    assert student.config.problem_type == "single_label_classification"
    texts = [row["text"] for row in read_rows(workshop.validation)]
    batch = AutoTokenizer.from_pretrained(layout.student)(texts, padding=True, return_tensors="pt")
    place = layout.run("kd-lora", 0)
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(place.adapter, num_labels=2)
    for model, said in ((student, recorded), (adapted, read_predictions(place.predictions))):
        with torch.no_grad():
            np.testing.assert_allclose(model.eval()(**batch).logits.numpy(), said.logits, atol=1e-4)
    classify = pipeline("text-classification", model=str(layout.student), device="cpu")
    assert classify("what a wonderful film")[0]["label"] in {"negative", "positive"}  # `LABEL_1` is no answer


def test_what_is_shipped_names_no_path_of_this_machine(experiment, layout, workshop):
    """A card with a home folder in it is published with the model."""
    secrets = [str(layout.root.parent), str(workshop.student.parent), str(workshop.train.parent)]
    for path in layout.student.iterdir():
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
    card = (layout.student / "README.md").read_text()
    assert experiment.shipped.arm in card
    assert f"`{workshop.teacher.name}`" in card
