"""What is said before anything trains, and the length at which texts are cut."""

import json
from types import SimpleNamespace

import pytest
import yaml

from kdlora.cli import experiments as verbs
from kdlora.configfile import load_config
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.run import plan_experiment, run_experiment
from tiny import write_csv

OPEN = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3}


@pytest.fixture
def small(workshop, tmp_path):
    """A config file of one student without a teacher, `max_length` open."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(workshop.values({"student": {"train": OPEN}})), encoding="utf-8")
    return path


def test_dry_run_says_what_would_be_done_and_does_nothing(cli, small, tmp_path):
    """A day of training on the wrong column is seen at its end; and a look must leave nothing behind."""
    out = tmp_path / "out"
    said = cli("run", small, "--dry-run", "--out", out)
    assert not out.exists()
    lines = dict(line.split(maxsplit=1) for line in said.out.strip().splitlines())
    assert len(lines) <= 11
    assert lines["rows"] == "64 train, 40 validation"
    assert lines["labels"] == "2: negative 32, positive 32 training rows"
    assert lines["trainings"] == "student-lora 1 × 16 steps"
    assert "estimate" in lines["time"]
    facts = json.loads(cli("run", small, "--dry-run", "--json", "--out", out).out)
    assert facts["steps"] == 16
    assert facts["rows"] == {"train": 64, "validation": 40}
    assert facts["lengths"]["student"]["max_length"] == 24
    assert facts["hours"] > 0


def test_the_length_is_chosen_once_and_kept(workshop, tmp_path):
    """A second call, an export or an arm that reads texts otherwise than the first one measures something else."""
    layout = ExperimentLayout(tmp_path / "out")
    config, plans = workshop.config({"student": {"train": OPEN}}), []
    first = run_experiment(config, layout.root, before=plans.append)
    chosen = load_config(layout.config).student.train.max_length
    assert chosen == plans[0].lengths["student"].max_length == 24
    assert first.records[0].config["student"]["train"]["max_length"] == chosen
    assert first.records[0].history[-1]["step"] == plans[0].steps
    assert json.loads(layout.plan.read_text(encoding="utf-8"))["steps"] == plans[0].steps

    earlier = yaml.safe_load(layout.config.read_text(encoding="utf-8"))
    earlier["student"]["train"]["max_length"] = 48  # every folder of 0.1 names a figure
    layout.config.write_text(yaml.safe_dump(earlier), encoding="utf-8")
    more = workshop.config({"student": {"train": OPEN}, "run": {"seeds": [0, 1]}})
    assert plan_experiment(more, layout.root).lengths["student"].max_length == 48
    run_experiment(more, layout.root, before=plans.append)
    assert [(one.arm, one.runs) for one in plans[1].trainings] == [("student-lora", 1)]
    assert load_config(layout.config).student.train.max_length == 48


def test_an_explicit_length_stays_and_the_share_that_it_cuts_is_told(workshop, tmp_path):
    """What the user set must not be overruled, and 128 tokens of a long review are a part of it."""
    plan = plan_experiment(workshop.config({"student": {"train": OPEN | {"max_length": 8}}}))
    assert plan.config.student.train.max_length == 8
    assert plan.lengths["student"].cut > 0.5
    assert "8 tokens" in dict(plan.lines())["max_length"]

    # A test text that was trained on is no test; a pair differs from another with the same first text.
    rows = [{"text": text, "more": more, "label": label} for text, more, label in ("axc", "ayd", "bxc")]
    other = write_csv(tmp_path / "other.csv", [*rows[:2], {"text": "n", "more": "x", "label": "c"}])
    data = {"train": str(write_csv(tmp_path / "train.csv", rows)), "validation": str(other)}
    for text, found in ((["text"], (1, 1, 2)), (["text", "more"], (0, 0, 2))):
        plan = plan_experiment(workshop.config({"data": data, "task": {"text": text, "label": "label"}}))
        assert plan.duplicates == dict(zip(("train", "validation", "train and validation"), found, strict=True))
        assert plan.labels == {"c": 2, "d": 1}


def test_a_long_run_asks_where_a_person_can_answer(cli, small, tmp_path, monkeypatch):
    """A command that turns out to take a day must not begin unasked; with --yes, or in a script, it does not wait."""
    monkeypatch.setattr(verbs, "_HOURS_UNASKED", 0.0)
    monkeypatch.setattr("typer.confirm", lambda *arguments, **options: False)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(verbs, "sys", SimpleNamespace(stdin=terminal, stderr=terminal))
    for options, code in (((), 1), (("--yes",), 0)):
        assert "trainings" in cli("run", small, "--out", tmp_path / "out", *options, code=code).err
        assert (tmp_path / "out" / "results.json").exists() == (code == 0)
