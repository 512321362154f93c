"""A task of tokens through whole experiments: every arm, unlabelled text, copies, tables, and what is said of it."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import AutoPeftModelForTokenClassification
from transformers import AutoModelForTokenClassification

from experiments import copy_experiment, edit_json, write_lines
from kdlora.configfile import build_config, load_config
from kdlora.data.load import load_splits
from kdlora.data.word_tokens import word_offsets
from kdlora.errors import ConfigError
from kdlora.evidence.metrics import compute_metrics
from kdlora.evidence.predictions import read_examples, read_predictions
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment import deployment
from kdlora.experiment.recording import write_card
from kdlora.experiment.run import plan_experiment, run_experiment
from kdlora.experiment.scoring import evaluate_experiment
from kdlora.experiment.settle import with_values
from kdlora.experiment.team import _experiment
from kdlora.report.shipped import BenchmarkResult
from sentences import tagged_rows, write_conll

HASHED = {"words": ["the", "music", "#Paris"], "tags": ["O", "O", "B-PLACE"]}
TRAIN = {"epochs": 5, "batch_size": 4, "learning_rate": 1e-2, "max_length": 12, "select": "auto"}


@pytest.fixture(scope="module")
def values(workshop, tmp_path_factory):
    """The sections of a config whose teacher and student read words in windows of different length."""
    folder = tmp_path_factory.mktemp("tokens")
    files = {
        "train": str(write_conll(folder / "train.conll", tagged_rows(40))),
        "validation": str(write_lines(folder / "validation.jsonl", [*tagged_rows(30, seed=1), HASHED])),
        "test": str(write_conll(folder / "test.conll", tagged_rows(30, seed=2))),
        "unlabelled": str(folder / "more.txt"),
        "augment": 1,
    }
    (folder / "more.txt").write_text("\n".join(" ".join(row["words"]) for row in tagged_rows(12, seed=3)))
    changes = {
        "data": files,
        "teacher": {"train": TRAIN | {"max_length": 64}},
        "student": {"train": TRAIN, "full_learning_rate": 5e-3},
        "run": {"arms": ["words", "fft", "kd-lora", "student-fft"]},
    }
    return workshop.values(changes)


@pytest.fixture(scope="module")
def config(values):
    return build_config(values)


@pytest.fixture(scope="module")
def result(config, tmp_path_factory):
    """A finished experiment of all arms."""
    return run_experiment(config, tmp_path_factory.mktemp("token-run") / "out")


def test_every_arm_runs_and_learns(result):
    """Silent failure: an arm that trains on words beside their labels still finishes, with a score of 0."""
    assert {one.arm for one in result.records} == {"fft", "kd-lora", "student-fft"}
    for record in result.records:
        assert record.status == "finished", record
        assert set(record.metrics) >= {"entity_f1", "entity_precision", "entity_recall", "macro_entity_f1"}
        assert record.score == pytest.approx(100 * record.metrics["entity_f1"])
        assert record.test_score > 50, record.arm
        scores = [entry["score"] for entry in record.history]
        assert record.best_epoch == record.history[scores.index(max(scores))]["epoch"], "select: auto keeps the best"
    assert any("arm words is left out" in note for note in result.notes)
    plain = re.search(r"finds itself, the student has ([0-9.]+) entity F1", " ".join(result.notes))
    assert 50 < float(plain[1]) < 100
    assert plain[0] in result.layout.report_md.read_text(encoding="utf-8"), "what a run says once, nobody finds again"


def test_predictions_lie_word_by_word_and_give_the_scores(result, config):
    """Silent failure: kept logits of other words than the labels beside them."""
    splits = load_splits(config.task, config.data)
    examples = read_examples(result.layout.examples)
    for record in result.records:
        kept = read_predictions(result.layout.run(record.arm, 0).predictions).only("test")
        assert kept.ids == tuple(splits.test["id"])
        assert np.array_equal(kept.offsets, word_offsets(splits.test))
        assert np.array_equal(kept.labels, [tag for row in splits.test["label"] for tag in row])
        metrics = compute_metrics(splits.task, kept.logits, kept.labels, offsets=kept.offsets)
        assert metrics == pytest.approx(record.test_metrics)
    for row in splits.test:
        one = examples["test", row["id"]]
        assert [one.text[a:b] for a, b in zip(one.starts, one.ends, strict=True)] == tagged_rows(30, seed=2)[
            int(row["id"])
        ]["words"]


def test_what_ships_is_a_token_classifier_and_scores_alike(result, values):
    """Silent failure: a student saved with a fresh head, or with the head of a classifier of texts."""
    model, loading = AutoModelForTokenClassification.from_pretrained(result.layout.student, output_loading_info=True)
    assert not loading["missing_keys"]
    assert model.config.id2label[1] == "B-BAD"
    assert model.config.kdlora_task["kind"] == "tokens"
    shipped, best = evaluate_experiment(result.folder, values["data"]["test"])[0], result.shipped
    record = next(one for one in result.records if (one.arm, one.seed) == (best.arm, best.seed))
    assert shipped["score"] == pytest.approx(record.test_score)
    adapter = result.layout.run("kd-lora", 0).adapter
    AutoPeftModelForTokenClassification.from_pretrained(adapter, num_labels=7)
    assert "AutoModelForTokenClassification" in (adapter / "README.md").read_text()


def test_the_pipeline_on_the_card_marks_whole_words(result, config, tmp_path):
    """Training teaches the first token of a word alone: by every token's own label, names come back in pieces."""
    layout = ExperimentLayout(copy_experiment(result.folder, tmp_path / "copy"))
    card, tokenizer = layout.student / "README.md", layout.student / "tokenizer.json"
    assert 'aggregation_strategy="first")' in card.read_text()
    edit_json(tokenizer, model=json.loads(tokenizer.read_text())["model"] | {"continuing_subword_prefix": ""})
    write_card(config, layout)  # as RoBERTa's
    assert 'aggregation_strategy="simple")' in card.read_text()
    assert "the pipeline below marks parts of words, too" in card.read_text()


def test_each_model_is_measured_at_its_own_length(result, monkeypatch):
    """A teacher that reads in windows of the student's length has another score, and another time."""
    asked = []
    monkeypatch.setattr(deployment, "benchmark", lambda *_, **given: asked.append(given) or BenchmarkResult())
    layout = ExperimentLayout(copy_experiment(result.folder, result.folder.with_name("measured")))
    settled = with_values(load_config(layout.config), {"export.benchmark": True})
    deployment.deploy_student(settled, layout, print)
    assert asked[0]["max_length"] is None
    assert asked[0]["scores"] == {"teacher": result.records[0].test_score}


def test_the_plan_says_what_it_is_about_to_do(config, tmp_path):
    """Silent failure: nobody notices that words were taken for classes, or that an arm is missing."""
    plan = plan_experiment(config, tmp_path / "out")
    told = dict(plan.lines())
    assert told["task"].startswith("tokens, words to tags; scored by")
    assert plan.labels.keys() == {"BAD", "GOOD", "PLACE"}
    assert plan.labels["PLACE"] == sum(row["tags"].count("B-PLACE") for row in tagged_rows(40))
    assert "entities in the training rows" in told["labels"]
    assert "words" not in {one.arm for one in plan.trainings}
    assert any("arm words is left out" in note for note in plan.notes)
    # Other processes of a run, which do not look at the data, would take it for another experiment.
    assert "words" in config.run.arms
    layout = ExperimentLayout(tmp_path)
    open_again = plan.config.model_copy(update={"teacher": config.teacher, "student": config.student})
    assert _experiment(open_again, layout) == _experiment(config, layout)
    only = with_values(config, {"run.arms": ("words",)})
    with pytest.raises(ConfigError, match=r"run\.arms: a bag of words"):
        plan_experiment(only, tmp_path / "out")


def test_a_table_and_layers_teach_word_by_word(result, values, tmp_path):
    """Silent failure: a table's logits on other words; a student cut from layers that has a head for texts."""
    parts = [pq.read_table(file) for file in sorted(result.layout.teacher_logits.glob("*.parquet"))]
    pq.write_table(pa.concat_tables(parts), tmp_path / "table.parquet")
    data = {key: value for key, value in values["data"].items() if key in ("train", "validation", "test")}
    changes = {
        "data": data,
        "teacher": {"model": values["teacher"]["model"], "logits": str(tmp_path / "table.parquet")},
        "student": {"from_teacher_layers": [0], "train": TRAIN, "full_learning_rate": 5e-3},
        "run": values["run"] | {"arms": ["kd-fft"]},
    }
    (record,) = run_experiment(build_config({**values, **changes}), tmp_path / "out").records
    assert record.history[-1]["soft_loss"] < record.history[0]["soft_loss"]
    assert record.test_score > 50
