"""The studies are suites that can be carried out, and their contrasts compare what they say."""

import pytest
import study

from experiments import read_rows
from kdlora import load_splits, load_suite
from kdlora.config import DataConfig
from kdlora.experiment.plan import make_plan, whole_config
from kdlora.experiment.suitefile import build_suite

SUITES = sorted(path for path in study.STUDIES.glob("*.yaml") if path.stem != "contrasts")


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_studies_are_suites(path):
    """A misspelt setting in a study would show after hours."""
    assert make_plan(load_suite(path)).runs()


def test_every_declared_side_is_planned():
    """A side that no suite has would be a contrast that is silently never printed."""
    planned = {
        path.stem: {(family, arm) for suite in [load_suite(path)] for family in suite.families for arm in suite.arms}
        for path in SUITES
    }
    planned["unlabelled"] |= planned["labelled"]
    for name in planned.keys() - {"labelled"}:
        sides = [side for pair in study.declared_contrasts(name) for side in pair]
        assert set(sides) <= planned[name], name


def test_texts_are_the_rows_that_do_not_train(workshop, tmp_path):
    """A study whose texts nobody can make cannot be repeated; a text that also trains would count twice."""
    values, texts = workshop.values(), tmp_path / "texts" / "rest.csv"
    data = {"train": str(workshop.train), "unlabelled": str(texts), "max_train_examples": 10}
    task = {"task": {"text": "text", "label": "label"}, "data": data}
    config = {key: values[key] for key in ("recipe", "teacher", "student")}
    suite = build_suite(
        {"name": "s", "tasks": {"mood": task}, "families": {"one": {}}, "arms": ["kd-lora"], "config": config}
    )
    study.write_texts(suite)
    splits = load_splits(whole_config(suite, "mood", "one").task, DataConfig(train=str(workshop.train)))
    drawn = load_splits(whole_config(suite, "mood", "one").task, whole_config(suite, "mood", "one").data)
    assert list(drawn.train["text"]) == list(splits.train["text"])[:10]
    assert [row["text"] for row in read_rows(texts)] == list(splits.train["text"])[10:]
