"""The metric that the user names, or that the data ask for, decides everywhere; an earlier folder keeps its own."""

import json

import pytest
import yaml

from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.plan import identity
from kdlora.experiment.run import plan_experiment, run_experiment
from kdlora.report.report import make_report
from tiny import sentiment_rows, write_csv


@pytest.fixture
def uneven(workshop, tmp_path):
    """`uneven(section changes)` gives a config with ten rows of one class for one of the other."""
    rows = sentiment_rows(80)
    few = [row for row in rows if row["label"] == "positive"][:4]
    train = write_csv(tmp_path / "train.csv", [row for row in rows if row["label"] == "negative"] + few)

    def give(**changes):
        return workshop.config({"data": {"train": str(train), "validation": str(workshop.validation)}, **changes})

    return give


def test_the_named_metric_selects_the_epoch_and_heads_the_report(uneven, workshop, tmp_path):
    """A metric that is printed while another one chooses epoch, arm and export would ship a model nobody asked for."""
    name = "recall@0.6:positive"
    train = workshop.values()["student"]["train"] | {"epochs": 3, "select": "best", "class_weights": "balanced"}
    config = uneven(task={"metric": name}, student={"train": train})
    result = run_experiment(config, tmp_path / "out")
    (record,) = result.records
    assert record.status == "finished", record.error
    scores = [entry["score"] for entry in record.history]
    assert scores == pytest.approx([100 * entry[name] for entry in record.history])
    assert record.best_epoch == record.history[scores.index(max(scores))]["epoch"]
    kept = read_predictions(result.layout.run("student-lora", 0).predictions)
    task = Task.from_dict(record.task)
    assert record.score == pytest.approx(score(task, compute_metrics(task, kept.logits, kept.labels)))
    shipped = json.loads((result.layout.student / "config.json").read_text(encoding="utf-8"))
    assert shipped["kdlora_task"]["metrics"] == [name], "gates and later exports read it there"
    report = make_report(result.folder, draws=50).markdown
    assert "Table 1. Score: recall of positive at precision 0.6" in report
    assert "| positive | student LoRA | 20 |" in report


def test_a_folder_keeps_the_metric_that_its_runs_were_scored_by(uneven, tmp_path):
    """Seeds scored by accuracy beside seeds scored by macro F1 have a mean that means nothing."""
    assert plan_experiment(uneven(), tmp_path / "new").task.metrics == ("macro_f1",)
    told = dict(plan_experiment(uneven(), tmp_path / "new").lines())["task"]
    assert told.endswith("scored by macro F1, because the classes are uneven (task.metric)")
    words = {"arms": ["words"], "seeds": [0]}
    first = run_experiment(uneven(run=words, task={"metric": "accuracy"}), tmp_path / "old")
    layout = ExperimentLayout(first.folder)
    earlier = yaml.safe_load(layout.config.read_text(encoding="utf-8"))
    del earlier["task"]["metric"]  # version 0.2 had no such key, and always took accuracy
    layout.config.write_text(yaml.safe_dump(earlier), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"task.metric: 'accuracy' there, 'macro_f1' here"):
        run_experiment(uneven(run=words, task={"metric": "macro_f1"}), layout.root)
    more = run_experiment(uneven(run={"arms": ["words", "student-lora"], "seeds": [0]}), layout.root)
    assert [record.task["metrics"] for record in more.records] == [["accuracy"]] * 2
    fresh = run_experiment(uneven(run=words), tmp_path / "fresh")
    assert [record.task["metrics"] for record in fresh.records] == [["macro_f1"]]
    assert any("Scored by macro F1" in note for note in fresh.notes)


def test_what_earlier_versions_did_hashes_as_it_did(uneven):
    """A key that hashes anew where it says nothing would repeat every finished run of every suite."""
    plain, accuracy = identity(uneven()), identity(uneven(task={"metric": "accuracy"}))
    assert plain == accuracy
    assert "metric" not in plain["task"]
    assert "tuning" not in plain["teacher"]
    assert "class_weights" not in plain["student"]["train"] | plain["teacher"]["train"]
    weighed = uneven(student={"train": {"class_weights": {"metric": 2}}})
    assert identity(weighed)["student"]["train"]["class_weights"] == {"metric": 2.0}
    assert identity(uneven(task={"metric": "macro_f1"})) != plain


def test_weights_that_do_not_fit_are_refused_before_anything_trains(cli, workshop, uneven, tmp_path):
    """A weight for a label that does not exist would be without effect, and shown as if it had one."""
    path = tmp_path / "e.yaml"
    for changes, told in [
        ({"student": {"class_weights": {"postive": 5}}}, "Did you mean 'positive'?"),
        ({"teacher": {"class_weights": {"postive": 5}}}, "Did you mean 'positive'?"),
        ({"student": {"class_weights": "balanced"}, "kind": "regression"}, "a regression has no classes"),
    ]:
        values = workshop.values()
        for role in ("teacher", "student"):
            values[role]["train"] = values[role]["train"] | changes.get(role, {})
        if "kind" in changes:
            rows = [{"text": row["text"], "label": str(place / 7)} for place, row in enumerate(sentiment_rows(40))]
            numbers = str(write_csv(tmp_path / "numbers.csv", rows))
            values |= {"task": {"kind": "regression"}, "data": {"train": numbers}}
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        said = cli("run", path, "--out", tmp_path / "none", code=2)
        assert "train.class_weights" in said.err
        assert told in " ".join(said.err.split())
        assert not (tmp_path / "none").exists()
