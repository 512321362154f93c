"""What is said before anything trains, lengths, the arm `words`, and the metric that decides everywhere."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from datasets import Dataset

from experiments import snapshot
from fabricate import BINARY, SIMILARITY, make_experiment
from kdlora.cli import experiments as verbs
from kdlora.configfile import build_config, load_config
from kdlora.data.load import load_splits
from kdlora.data.spool import read_texts, slice_rows, spread_rows
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError, ConfigError
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.evidence.predictions import read_predictions, write_predictions
from kdlora.evidence.records import ExperimentLayout, read_record, read_results
from kdlora.experiment import recording, stages
from kdlora.experiment.plan import identity
from kdlora.experiment.preview import count_duplicates, training_seconds
from kdlora.experiment.recording import new_record
from kdlora.experiment.run import plan_experiment, run_experiment
from kdlora.experiment.scoring import doubts_of_teacher
from kdlora.experiment.settle import Chosen, ModelLook
from kdlora.searchconfig import SearchConfig
from kdlora.system.storage import mark_folder
from tiny import sentiment_rows, write_csv

OPEN = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3}


def test_dry_run_says_what_would_be_done_and_does_nothing(cli, workshop, tmp_path):
    """A day of training on the wrong column is seen at its end; and a look must leave nothing behind.

    What was guessed of the data was told after the training.
    """
    out, small = tmp_path / "out", tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(workshop.values({"student": {"train": OPEN}})), encoding="utf-8")
    said = cli("run", small, "--dry-run", "--out", out)
    assert not out.exists()
    lines = dict(line.split(maxsplit=1) for line in said.out.strip().splitlines())
    assert len(lines) <= 12
    assert lines["note"].startswith("The 2 label names and their order were taken from the data")
    assert "unknown" not in lines
    assert lines["rows"] == "64 train, 40 validation"
    assert lines["labels"] == "2: negative 32, positive 32 training rows"
    assert lines["trainings"] == "student-lora 1 × 16 steps"
    assert "estimate" in lines["time"]
    more = ("--set", "run.arms=[student-lora,kd-lora]", "--set", "data.augment=4")
    facts = json.loads(cli("run", small, "--dry-run", "--json", "--out", out, *more).out)
    assert facts["steps"] == 3 * 16
    assert facts["rows"] == {"train": 64, "validation": 40, "copies": 255}
    assert facts["lengths"]["student"]["max_length"] == 24
    assert facts["hours"] > 0


def test_the_length_is_chosen_once_and_kept(workshop, tmp_path):
    """A second call, an export or an arm that reads texts otherwise than the first one measures something else.

    Texts of another language train without a fault, and every word of them is the same unknown token.
    """
    layout, plans = ExperimentLayout(tmp_path / "out"), []
    rows = [{**row, "text": "ภาษา ไทย"} if place % 2 else row for place, row in enumerate(sentiment_rows(64))]
    values = {"student": {"train": OPEN}, "data": {"train": str(write_csv(tmp_path / "half.csv", rows))}}
    first = run_experiment(workshop.config(values), layout.root, before=plans.append)
    assert 0.05 < plans[0].lengths["student"].unknown < 0.95
    told = dict(plans[0].lines())["unknown"]
    assert f"{plans[0].lengths['student'].unknown:.0%} by the student" in told
    chosen = load_config(layout.config).student.train.max_length
    assert chosen == plans[0].lengths["student"].max_length == 24
    assert first.records[0].config["student"]["train"]["max_length"] == chosen
    assert first.records[0].history[-1]["step"] == plans[0].steps
    assert json.loads(layout.plan.read_text(encoding="utf-8"))["steps"] == plans[0].steps

    earlier = yaml.safe_load(layout.config.read_text(encoding="utf-8"))
    earlier["student"]["train"]["max_length"] = 48  # every folder of 0.1 names a figure
    layout.config.write_text(yaml.safe_dump(earlier), encoding="utf-8")
    more = workshop.config(values | {"run": {"seeds": [0, 1]}})
    assert plan_experiment(more, layout.root).lengths["student"].max_length == 48
    run_experiment(more, layout.root, before=plans.append)
    assert [(one.arm, one.runs) for one in plans[1].trainings] == [("student-lora", 1)]
    assert load_config(layout.config).student.train.max_length == 48


def test_the_teachers_size_with_adapters_needs_no_student_beside_it(workshop, tmp_path):
    """`arms: [fft, lora]` ended with "train.max_length is null", as the length was looked for in a student alone."""
    plans, arms = [], ["fft", "lora"]
    for more in ([], ["student-lora"]):
        values = {"teacher": {"train": OPEN}, "student": {"train": OPEN}, "run": {"arms": [*arms, *more]}}
        run_experiment(workshop.config(values), tmp_path / "out", before=plans.append)
    assert [[one.arm for one in plan.trainings] for plan in plans] == [arms, ["student-lora"]]
    assert plans[0].trainings[1].steps > 0


def test_texts_that_occur_twice_are_counted(workshop, tmp_path):
    """A test text that was trained on is no test; nothing learns a text that has two labels.

    A pair differs from another with the same first text.
    """
    rows = [{"text": text, "more": more, "label": label} for text, more, label in ("axc", "ayd", "bxc")]
    other = write_csv(tmp_path / "other.csv", [*rows[:2], {"text": "n", "more": "x", "label": "c"}])
    data = {"train": str(write_csv(tmp_path / "train.csv", rows)), "validation": str(other)}
    for text, found in ((["text"], (1, 1, 2, 1)), (["text", "more"], (0, 0, 2, 0))):
        plan = plan_experiment(workshop.config({"data": data, "task": {"text": text, "label": "label"}}))
        names = ("train", "validation", "train and validation", "train with another label")
        assert plan.duplicates == dict(zip(names, found, strict=True))
        assert plan.labels == {"c": 2, "d": 1}
        assert dict(plan.lines())["labels"].endswith("only 1 of 'd' in validation, which chooses what ships")


def test_texts_are_counted_without_being_held():
    """Copies of all texts have the plan of millions of rows killed, and with it the run."""
    draw, usual = np.random.default_rng(0), pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    texts = [f"{number:0500}" for number in draw.integers(0, 60_000, 100_000)]
    rows = Dataset(pa.table({"text": texts, "label": draw.integers(0, 2, 100_000)}))
    train, other = rows.select(draw.permutation(100_000)), rows.select(range(0, 100_000, 9))
    pa.set_memory_pool(pool)
    try:
        found = count_duplicates({"train": train, "validation": other})
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 100_000 * 500 / 2
    frame = pd.DataFrame({"text": texts, "label": rows["label"][:]})
    twice = frame["text"].duplicated().sum()
    assert found["train"] == twice
    assert found["validation"] == frame["text"][::9].duplicated().sum()
    assert found["train and validation"] == len(other)
    assert found["train with another label"] == twice - frame.duplicated().sum()


def test_it_is_recorded_told_and_resumed_and_never_ships(workshop, tmp_path, monkeypatch):
    """A bag of words in `student/` is no model; one that is fitted again on every call changes a finished folder."""
    config = workshop.config({"data": {"test": str(workshop.validation)}, "run": {"arms": ["words", "student-lora"]}})
    result = run_experiment(config, tmp_path / "out")
    words, _ = read_results(result.layout.results)
    assert (words.arm, words.status, words.model) == ("words", "finished", "bag of words")
    assert words.trainable_parameters == words.total_parameters > 100
    assert words.train_seconds > 0
    assert words.score == words.test_score
    kept = result.layout.run("words", 0)
    assert {path.name for path in kept.root.iterdir()} <= {"run.json", "predictions.parquet", "run.log"}
    assert read_predictions(kept.predictions).only("test").logits.shape == (40, 2)
    assert (result.shipped.arm, result.shipped.seed) == ("student-lora", 0)
    assert not result.layout.run("words", 0).model.exists()
    report = result.layout.report_md.read_text(encoding="utf-8")
    assert report.count("bag of words") > 3
    assert f"{words.score:.2f}" in report

    # To ask for the best format of a GPU begins CUDA there, whose memory was recorded in place of its own: 0.
    with monkeypatch.context() as patch:
        patch.delattr(recording, "settle_precision")
        begun = new_record(config, ExperimentLayout(tmp_path), load_splits(config.task, config.data), "words", 0)
    assert (begun.precision, begun.device) == (words.precision, words.device) == ("fp32", "cpu")

    # Hours of distillation from a teacher that seconds of counting words beat are doubted before it labels.
    taught = workshop.config({"run": {"arms": ["words", "kd-lora"]}})
    teacher = words.model_copy(update={"arm": "fft", "score": words.score - 10.0})
    (doubt,) = doubts_of_teacher(taught, ExperimentLayout(tmp_path), [words, teacher])
    assert doubt.startswith("The teacher is below a control without a teacher, bag of words: on validation it has")
    student = words.model_copy(update={"arm": "kd-lora"})  # taught by it, so no control: nothing is told
    assert doubts_of_teacher(taught, ExperimentLayout(tmp_path), [student, teacher]) == []

    # Of three seeds one has luck.
    for scores, told in (((84.0, 85.0, 88.5), 0), ((89.0, 89.0, 88.5), 1)):
        update = [{"arm": "student-lora", "seed": seed, "score": one} for seed, one in enumerate(scores)]
        records = [words.model_copy(update=one) for one in ({"arm": "fft", "score": 88.0}, *update)]
        assert len(doubts_of_teacher(taught, ExperimentLayout(tmp_path), records)) == told

    scored = make_experiment(tmp_path / "pairs", task=SIMILARITY, arms=("fft", "student-lora"), seeds=(0,))
    records = [read_record(scored.run(arm, 0).record) for arm in ("fft", "student-lora")]
    assert doubts_of_teacher(taught, scored, records) == []
    file = scored.run("fft", 0).predictions
    told = read_predictions(file)
    write_predictions(file, replace(told, logits=told.logits / 5))  # correlation sees no units
    assert "If they are in other units, bring them to" in doubts_of_teacher(taught, scored, records)[0]

    before = snapshot(kept.root)
    run_experiment(config, result.folder)
    assert snapshot(kept.root) == before


def test_a_bag_of_words_needs_no_model_and_a_long_run_asks(cli, workshop, tmp_path, monkeypatch):
    """A user who asks for nothing else must not be sent for a teacher; three equal runs are no spread over seeds.

    A command that turns out to take a day must not begin unasked; with --yes, or in a script, it does not wait.
    """
    values = workshop.values({"run": {"arms": ["words"], "seeds": [5, 6]}})
    del values["teacher"], values["student"]
    path, out = tmp_path / "words.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr(verbs, "_HOURS_UNASKED", 0.0)
    monkeypatch.setattr("typer.confirm", lambda *arguments, **options: False)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(verbs, "sys", SimpleNamespace(stdin=terminal, stderr=terminal))
    assert "words in about" in cli("run", path, "--out", out, code=1).err
    assert not out.exists()
    said, guess = cli("run", path, "--out", out, "--yes"), "The 2 label names and their order were taken"
    assert "words in about" in said.err
    assert (said.err.count(guess), said.out.count(guess)) == (1, 0), "told once, before"
    (record,) = read_results(out / "results.json")
    assert (record.arm, record.seed, record.status) == ("words", 5, "finished")
    assert not (out / "student").exists()

    # An hour for documents was told as a minute.
    looks = {"student": ModelLook(np.array([40, 2960]), 512, 16)}
    short, long = (training_seconds(load_config(path), "words", {"train": 100}, one) for one in ({}, looks))
    assert long == pytest.approx(30 * short)

    # Thirty equal trials look like a search.
    with pytest.raises(ValueError, match="words"):
        SearchConfig(arm="words")
    with pytest.raises(ConfigError, match="no student"):
        build_config({"data": {"train": "a.csv"}, "run": {"arms": ["words", "student-lora"]}})


def test_words_read_no_more_than_they_learn_from(workshop, tmp_path, monkeypatch):
    """What takes seconds on 1,000 rows takes an hour and all memory on 10 million, in an arm that runs unasked."""
    config, read, slices, found = workshop.config({"run": {"arms": ["words"]}}), [], [], []
    monkeypatch.setattr(stages, "MOST_ROWS", 20)
    monkeypatch.setattr(stages, "read_texts", lambda rows: read.append(len(rows)) or read_texts(rows))
    for size in (64, 20):

        def slice_some(rows, names, size=size):
            return (slices.append(len(part)) or part for part in slice_rows(rows, names, size))

        monkeypatch.setattr(stages, "slice_rows", slice_some)
        layout = ExperimentLayout(tmp_path / str(size))
        record = stages.train_run(config, layout, "words", 0, None)
        assert record.notes[-1].endswith("learnt from 20 of 64 rows")
        found.append(read_predictions(layout.run("words", 0).predictions).logits)
    assert (read, slices) == ([20] * 4, [40, 20, 20])
    np.testing.assert_array_equal(*found)
    alternating = spread_rows(Dataset.from_dict({"label": [0, 1] * 100}), 100)["label"]
    assert 20 < sum(alternating) < 80, "an even step took one class alone"


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
    assert config.student.train.model_copy(update={"select": "auto"}).selection("single-label") == "last"
    kept = read_predictions(result.layout.run("student-lora", 0).predictions)
    task = Task.from_dict(record.task)
    assert record.score == pytest.approx(score(task, compute_metrics(task, kept.logits, kept.labels)))
    shipped = json.loads((result.layout.student / "config.json").read_text(encoding="utf-8"))
    assert shipped["kdlora_task"]["metrics"] == [name], "gates and later exports read it there"
    report = result.layout.report_md.read_text(encoding="utf-8")
    assert "Table 1. Score: recall of positive at precision 0.6" in report
    assert "| positive | student LoRA | 20 |" in report


def test_a_folder_keeps_the_metric_that_its_runs_were_scored_by(uneven, tmp_path):
    """Seeds scored by accuracy beside seeds scored by macro F1 have a mean that means nothing."""
    words = {"arms": ["words"], "seeds": [0]}
    first = run_experiment(uneven(run=words, task={"metric": "accuracy"}), tmp_path / "old")
    layout = ExperimentLayout(first.folder)
    earlier = yaml.safe_load(layout.config.read_text(encoding="utf-8"))
    del earlier["task"]["metric"]  # version 0.2 had no such key, and always took accuracy
    layout.config.write_text(yaml.safe_dump(earlier), encoding="utf-8")
    mark_folder(layout.root, "experiment")  # nor did it note which keys were open
    with pytest.raises(ArtifactError, match=r"task.metric: 'accuracy' there, 'macro_f1' here"):
        run_experiment(uneven(run=words, task={"metric": "macro_f1"}), layout.root)
    more = run_experiment(uneven(run={"arms": ["words", "student-lora"], "seeds": [0]}), layout.root)
    assert [record.task["metrics"] for record in more.records] == [["accuracy"]] * 2


def test_weights_follow_the_metric_where_they_are_auto(uneven, workshop, tmp_path):
    """A model that is scored by its rare classes, and trained as if they did not count, never says them."""
    train = workshop.values()["student"]["train"]
    for metric, given, expected in (
        ("balanced_accuracy", "auto", "balanced"),
        ("accuracy", "auto", None),
        ("macro_f1", None, None),
        ("accuracy", "balanced", "balanced"),
    ):
        config = uneven(student={"train": train | {"class_weights": given}})
        chosen = Chosen({}, {"train": 44}, replace(BINARY, metrics=(metric,)))
        assert chosen.fill_in(config).student.train.class_weights == expected
        assert chosen.fill_in(config).teacher.train.class_weights is None, "they cost a teacher of two classes more"
    many = replace(BINARY, label_names=("a", "b", "c"), metrics=("macro_f1",))
    config = uneven(teacher=workshop.values()["teacher"] | {"train": train | {"class_weights": "auto"}})
    assert Chosen({}, {"train": 44}, many).fill_in(config).teacher.train.class_weights == "balanced"
    config, plans = uneven(student={"train": train | {"class_weights": "auto"}}), []
    layout = run_experiment(config, tmp_path / "out", before=plans.append).layout
    told = dict(plans[0].lines())
    assert "scored by macro F1, because the classes are uneven (task.metric)" in told["task"]
    assert "weights" in told
    assert load_config(layout.config).student.train.class_weights == "balanced"
    again = run_experiment(config, layout.root)  # of an open config, the same is made of it
    assert [record.status for record in again.records] == ["finished"]


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
    path, train = tmp_path / "e.yaml", workshop.values()["student"]["train"]
    rows = [{"text": row["text"], "label": str(place / 7)} for place, row in enumerate(sentiment_rows(40))]
    numbers = {"train": str(write_csv(tmp_path / "numbers.csv", rows)), "validation": None}
    for role, weights, changes, told in [
        ("student", {"postive": 5}, {}, "Did you mean 'positive'?"),
        ("teacher", {"postive": 5}, {}, "Did you mean 'positive'?"),
        ("student", "balanced", {"task": {"kind": "regression"}, "data": numbers}, "a regression has no classes"),
    ]:
        values = workshop.values(changes | {role: {"train": train | {"class_weights": weights}}})
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        said = cli("run", path, "--out", tmp_path / "none", code=2)
        assert "train.class_weights" in said.err
        assert told in " ".join(said.err.split())
        assert not (tmp_path / "none").exists()
