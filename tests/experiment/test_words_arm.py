"""The arm `words` in an experiment: a control that needs no model, is in every table and never ships."""

import json

import pytest

from experiments import snapshot
from kdlora.configfile import build_config
from kdlora.errors import ConfigError
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout, read_results
from kdlora.experiment.run import plan_experiment, run_experiment
from kdlora.experiment.scoring import doubts_of_teacher
from kdlora.report.collect import load_experiment
from kdlora.report.tables import arm_table
from kdlora.searchconfig import SearchConfig


def test_it_is_recorded_told_and_resumed_and_never_ships(workshop, tmp_path):
    """A bag of words in `student/` is no model; one that is fitted again on every call changes a finished folder."""
    config = workshop.config({"data": {"test": str(workshop.validation)}, "run": {"arms": ["words", "student-lora"]}})
    result = run_experiment(config, tmp_path / "out")
    words, student = read_results(result.layout.results)
    assert (words.arm, words.status, words.model) == ("words", "finished", "bag of words")
    assert words.trainable_parameters == words.total_parameters > 100
    assert words.train_seconds > 0
    assert words.score == words.test_score
    kept = result.layout.run("words", 0)
    assert {path.name for path in kept.root.iterdir()} <= {"run.json", "predictions.parquet", "run.log"}
    assert read_predictions(kept.predictions).only("test").logits.shape == (40, 2)
    assert (result.shipped.arm, result.shipped.seed) == ("student-lora", 0)
    assert not result.layout.run("words", 0).model.exists()

    experiment = load_experiment(result.folder)
    assert experiment.student_arm == "student-lora"
    report = result.layout.report_md.read_text(encoding="utf-8")
    assert report.count("bag of words") > 3
    assert f"{words.score:.2f}" in report
    assert [row[0] for row in arm_table([words, student]).rows] == ["words", "student-lora"]

    before = snapshot(kept.root)
    run_experiment(config, result.folder)
    assert snapshot(kept.root) == before


def test_it_needs_no_model_and_runs_once(workshop, tmp_path):
    """A user who asks for nothing else must not be sent for a teacher; three equal runs are no spread over seeds."""
    values = workshop.values({"run": {"arms": ["words"], "seeds": [5, 6]}})
    del values["teacher"], values["student"]
    config = build_config(values)
    plan = plan_experiment(config)
    assert [(one.arm, one.runs, one.steps) for one in plan.trainings] == [("words", 1, 0)]
    assert "words in about" in dict(plan.lines())["trainings"]
    result = run_experiment(config, tmp_path / "out")
    assert [(record.arm, record.seed, record.status) for record in result.records] == [("words", 5, "finished")]
    assert result.shipped is None

    # Thirty equal trials look like a search.
    with pytest.raises(ValueError, match="words"):
        SearchConfig(arm="words")
    with pytest.raises(ConfigError, match="no student"):
        build_config({"data": {"train": "a.csv"}, "run": {"arms": ["words", "student-lora"]}})


def test_a_teacher_below_it_is_told_before_it_labels(workshop, tmp_path):
    """Hours of distillation from a teacher that seconds of counting words beat."""
    layout = ExperimentLayout(tmp_path)
    config = workshop.config({"run": {"arms": ["words", "kd-lora"]}})
    result = run_experiment(workshop.config({"run": {"arms": ["words"]}}), layout.root)
    (words,) = result.records
    teacher = words.model_copy(update={"arm": "fft", "score": words.score - 10.0})
    (doubt,) = doubts_of_teacher(config, layout, [words, teacher])
    assert doubt.startswith("The teacher is below a bag of words: on validation it has")
    student = words.model_copy(update={"arm": "kd-lora"})  # taught by it, so no control: nothing is told
    assert doubts_of_teacher(config, layout, [student, teacher]) == []
    assert json.loads(layout.run("words", 0).record.read_text())["score"] == words.score
