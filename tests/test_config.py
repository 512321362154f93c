"""Configuration: every fault at once, no key without effect, and a file that reruns the experiment."""

import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kdlora.config import Config, DistilConfig, LoraSettings, StudentTrainConfig, TaskConfig
from kdlora.configfile import build_config, load_config, save_config
from kdlora.errors import ConfigError

ROOT = Path(__file__).parents[1]
MINIMAL = {"family": "bert", "task": {"name": "mrpc"}, "data": {"path": "nyu-mll/glue"}}


def faults_of(values, *overrides):
    with pytest.raises(ConfigError) as caught:
        build_config(values, overrides)
    return str(caught.value).splitlines()


def test_five_faults_are_reported_at_once():
    """A user who learns of one fault per attempt needs five attempts."""
    faults = {
        "task": {"name": "mrpcc"},
        "data": {"path": "x", "max_trian_examples": 5},
        "teacher": {"model": "m", "train": {"epochs": "three"}},
        "lora": {"rank": 0},
        "run": {"seeds": [1, 1]},
    }
    first, *lines = faults_of(MINIMAL | faults)
    assert first == "config: 5 faults"
    places = {"task.name", "data.max_trian_examples", "teacher.train.epochs", "lora.rank", "run"}
    assert {line.removeprefix("  - ").split(":")[0] for line in lines} == places


def test_a_value_of_several_types_has_one_fault():
    """A misspelt metric was three faults, and one of a label four."""
    for value, key in (("f2", "export.thresholds"), ({"spam": "f2"}, "export.thresholds.spam")):
        first, *lines = faults_of(MINIMAL | {"export": {"thresholds": value}})
        assert (first, len(lines)) == ("config: 1 fault", 1)
        assert lines[0].startswith(f"  - {key}: input should be 'f1', ")
        assert " Or input should be a valid number, " in lines[0]


def test_a_family_yields_to_what_is_set_and_a_key_of_0_1_is_known():
    """A family that overrode teacher.model would train another model; a folder of 0.1 could not be resumed."""
    config = build_config(MINIMAL | {"teacher": {"model": "my/teacher"}})
    assert (config.teacher.model, config.student.model) == ("my/teacher", "distilbert-base-uncased")
    assert build_config(MINIMAL | {"run": {"shard_teacher": False}}) == build_config(MINIMAL)
    assert "run.shard_teacher: unknown key" in "\n".join(faults_of(MINIMAL | {"run": {"shard_teacher": True}}))


def test_overrides_are_yaml_and_reach_nested_keys():
    """`5e-5` must be a number, although plain YAML reads it as text."""
    config = build_config(
        MINIMAL, ["student.train.learning_rate=5e-5", "run.seeds=[3, 4]", "lora.targets=[query, key]", "name=x"]
    )
    assert config.student.train.learning_rate == pytest.approx(5e-5)
    assert config.student.train.epochs == build_config(MINIMAL).student.train.epochs
    assert config.run.seeds == (3, 4)
    assert config.lora.targets == ("query", "key")
    assert config.name == "x"
    weights = {"student": {"train": {"class_weights": {"spam": 5}}}}
    found = build_config(MINIMAL | weights, [("student.train.class_weights", {"ham": 3})]).student.train.class_weights
    assert found == {"ham": 3}, "a trial of a search is told by these weights alone"
    for changes, expected in (
        (["student.train.class_weights={ham: 3}"], {"ham": 3}),
        (["student.train.class_weights.ham=3"], {"spam": 5, "ham": 3}),
        (["student.train.class_weights={1: 3}", "student.train.class_weights.b=2"], {"1": 3, "b": 2}),
    ):
        assert build_config(MINIMAL | weights, changes).student.train.class_weights == expected, changes
    # Labels of a survey, in YAML 1.1 booleans: "'true' is no label of the task (no, yes)".
    own = {"family": "bert", "data": {"train": "rows.csv"}}
    words = build_config(
        own, ["task.label_names=[no, yes]", "student.train.class_weights={yes: 5}", "run.fail_fast=on"]
    )
    assert (words.task.label_names, words.student.train.class_weights) == (("no", "yes"), {"yes": 5})
    assert words.run.fail_fast is True
    assert build_config(own, ["task.label_names=[0, 1, 010]"]).task.label_names == ("0", "1", "010")

    # A slip in the file, a value in place of a section, would be gone without a word.
    assert faults_of(MINIMAL | {"student": 5}, "student.train.epochs=2")[0] == (
        "config: student: expected keys such as 'model:', got 5"
    )

    # Two configs with one fingerprint would share a folder and mix their runs.
    base = build_config(MINIMAL)
    for override in ("lora.rank=4", "distil.alpha=0.7", "run.seeds=[9]", "data.split_seed=1", "teacher.train.epochs=1"):
        assert build_config(MINIMAL, [override]).fingerprint() != base.fingerprint(), override
    assert build_config(MINIMAL, ["name=other"]).fingerprint() == base.fingerprint()


def test_relative_paths_resolve_against_the_config_file(tmp_path, monkeypatch):
    """A saved config that only works from one folder does not rerun the experiment."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "glue").mkdir()
    file = tmp_path / "sub" / "c.yaml"
    file.write_text(
        "task: {name: mrpc}\ndata: {path: ../glue}\nfamily: bert\n"
        "teacher: {fine_tuned: ./mine}\nrun: {arms: [fft, kd-lora]}\n"
    )
    monkeypatch.chdir("/")
    config = load_config(file)
    assert config.data.path == str(tmp_path / "glue")
    assert config.teacher.fine_tuned == str(tmp_path / "sub" / "mine")
    assert config.student.model == "distilbert-base-uncased"  # a Hub id stays one
    (tmp_path / "loop").symlink_to("loop")
    assert load_config(file, [f"data.path={tmp_path / 'loop'}"]).data.path == str(tmp_path / "loop")


def values_of(field):
    """Values of a key's own type and range; None where that is the default."""
    is_union = get_origin(field.annotation) in (Union, types.UnionType)
    kinds = get_args(field.annotation) if is_union else (field.annotation,)
    limits = [limit for limit in field.metadata if type(limit).__module__ == "annotated_types"]
    drawn = [st.none() if kind is type(None) else st.from_type(Annotated[kind, *limits, ""]) for kind in kinds]
    return st.one_of(drawn).filter(lambda value: not isinstance(value, float) or math.isfinite(value))


def leaves(model, *path):
    """Every key with its field, as a path."""
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from leaves(field.annotation, *path, name)
        elif name != "name":
            yield (*path, name), field


LEAVES = dict(leaves(Config)) | {("task", "name"): TaskConfig.model_fields["name"]}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(keys=st.sets(st.sampled_from(sorted(LEAVES)), min_size=1, max_size=5), draw=st.data())
def test_any_config_reads_back_equal(tmp_path, keys, draw):
    """Of some eighty keys, one that is written in another form than it is read in is found by nobody."""
    values = {"family": "bert", "data": {"train": "a.csv"}}
    for path in sorted(keys):
        *sections, key = path
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = draw.draw(values_of(LEAVES[path]), label=".".join(path))
    try:
        config = build_config(values)
    except ConfigError:
        assume(False)
    file = tmp_path / "c.yaml"
    file.write_text(save_config(config), encoding="utf-8")
    assert load_config(file) == config
    assert load_config(file).fingerprint() == config.fingerprint()


def test_shipped_configs_are_valid():
    """An example that no longer parses is the first thing that a stranger meets; a test of suites has the paper's."""
    for file in (ROOT / "configs").glob("*.yaml"):
        assert file.name.startswith("paper") or load_config(file).title()


def test_the_reference_page_is_true():
    """Generated pages go stale the day after, and an option without a description has no place in the reference."""
    assert [".".join(path) for path, field in LEAVES.items() if not field.description] == []
    subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], check=True)


def test_a_recipe_fills_in_what_is_not_set():
    """A recipe that overrides the user's key, or that does not reach the resolved config, would run something else."""
    paper, tuned, config = (build_config({**MINIMAL, "recipe": name}) for name in ("paper", "paper-tuned", "default"))
    assert build_config(MINIMAL) == config, "the recipe that won the comparison is what a user gets who names none"
    assert (tuned.student.train.epochs, tuned.student.train.learning_rate) == (10, 3e-3)
    assert tuned.student.train.weight_decay == paper.student.train.weight_decay
    assert paper.run.arms == tuned.run.arms == tuple(arm for arm in config.run.arms if arm != "kd-fft")
    empty = {"lora": None, "export": None, "student": {"train": None}}
    assert build_config({**MINIMAL, "recipe": "paper", **empty}) == paper, "empty sections"
    with pytest.raises(ConfigError, match="studnet"):
        build_config({**MINIMAL, "studnet": None})
    own = build_config({**MINIMAL, "recipe": "paper-tuned", "student": {"train": {"epochs": 2}}}, ["lora.rank=4"])
    assert (own.student.train.epochs, own.student.train.learning_rate, own.lora.rank) == (2, 3e-3, 4)
    assert yaml.safe_load(save_config(own))["student"]["train"]["learning_rate"] == 3e-3
    changed = build_config({**MINIMAL, "student": {"train": {"learning_rate": 1e-3}}}, ["recipe=paper-tuned"])
    assert (changed.student.train.epochs, changed.student.train.learning_rate) == (10, 1e-3)
    # The paper's are what the keys' own defaults are: a baseline that drifts with the product is none.
    assert (paper.student.train, paper.lora, paper.distil) == (StudentTrainConfig(), LoraSettings(), DistilConfig())


def test_the_default_recipe_makes_no_copies_that_nobody_can_label():
    """The user of a table would be stopped by a key that they never set."""
    changes = {"teacher": {"logits": "t.parquet"}}
    assert build_config(MINIMAL | changes).data.augment == 0
    assert build_config(MINIMAL | changes).run.arms == ("words", "fft", "kd-lora", "kd-fft", "student-lora")
    assert build_config(MINIMAL | changes).distil.temperature == 1.0
    assert build_config(MINIMAL | {"data": {"path": "x", "unlabelled": "more.txt"}}).data.augment is None


@pytest.mark.parametrize("name", ["reviews.csv", "names.conll", "mpqa.all"])
def test_data_given_in_place_of_a_config(tmp_path, name):
    """A line and a column of YAML say nothing to somebody who gave a file of data."""
    (file := tmp_path / name).write_text("The\tB-object\nback\tI-object: of\n")
    with pytest.raises(ConfigError, match="kdlora run by --train FILE"):
        load_config(file)
