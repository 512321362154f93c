"""What a suite file may say, and how its faults are told."""

from __future__ import annotations

import pytest
import yaml

from kdlora.errors import ConfigError
from kdlora.experiment.plan import make_plan
from kdlora.experiment.suite import check_size, run_suite
from kdlora.experiment.suitefile import build_suite, configurations, load_suite, save_suite

GLUE = {"name": "s", "tasks": ["cola", "SST-2"], "families": ["bert", "roberta"], "config": {"data": {"path": "x/y"}}}


def suite(**changes):
    return build_suite(GLUE | changes)


def test_names_stand_for_sections():
    """The benchmark's own spelling of a task must not become a second task."""
    found = suite()
    assert found.tasks == {"cola": {"task": {"name": "cola"}}, "sst2": {"task": {"name": "sst2"}}}
    assert found.families["roberta"] == {"family": "roberta"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ["cloa"]}, "unknown task 'cloa'.*Did you mean 'cola'"),
        ({"tasks": ["ax"]}, "ax.*no training data"),
        ({"families": ["rberta"]}, "unknown family 'rberta'.*Did you mean 'roberta'"),
        ({"arms": ["kdlora"]}, "arms.0: input should be 'words', .*, got 'kdlora'. Did you mean 'kd-lora'"),
        ({"tasks": ["sst2", "SST-2"]}, "'sst2' stands twice, so two runs would share one folder"),
        ({"families": {"Tiny": {}, "tiny": {}}}, "'tiny' stands twice, so two runs would share one folder"),
        ({"families": {"a/b": {}}}, "cannot name a folder"),
        ({"seeds": [1, 1]}, "seeds holds a value twice, so two runs would share one folder"),
        ({"grids": {"adapters": {"lora.rank": [8, 8]}}}, "stands twice, so two runs would share one folder"),
        ({"grids": {"adapters": {"lora.rank": 8}}}, "expected a list of values, got 8"),
        ({"grids": {"adapters": {"lora.rank": []}}}, "an axis has no values"),
        ({"grids": {"lora": {}}}, "grids.lora: unknown key"),
        ({"taks": []}, "taks: unknown key. Did you mean 'tasks'"),
        ({"config": {"data": {"path": "x"}, "run": {"seeds": [1]}}}, "set `seeds` at the top level"),
    ],
)
def test_faults_are_told(changes, expected):
    """A slip that passes costs a week of wrong runs."""
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        suite(**changes)


def test_faults_of_a_configuration_name_its_cell():
    """Among thousands of configurations, "rank: greater than 0" alone helps nobody."""
    with pytest.raises(ConfigError, match=r"(?s)s: cola, bert, lora.*lora\.rank"):
        make_plan(suite(grids={"adapters": {"lora.rank": [8, 0]}}))
    with pytest.raises(ConfigError, match=r"lora\.rnak: unknown key. Did you mean 'rank'"):
        make_plan(suite(grids={"adapters": {"lora.rnak": [8]}}))


def test_a_given_teacher_is_refused():
    """One teacher for every task of a suite would be the teacher of the wrong labels."""
    with pytest.raises(ConfigError, match="a suite trains its teachers"):
        make_plan(suite(config={"data": {"path": "x/y"}, "teacher": {"fine_tuned": "somewhere"}}))


def test_a_huge_grid_asks_first(tmp_path):
    """A slip of the pen in a grid must show before it fills a disk or a cluster's queue."""
    grids = {"adapters": {"lora.rank": list(range(1, 1001)), "lora.alpha": list(range(1, 126))}}
    huge = suite(grids=grids, arms=["lora", "kd-lora"])
    assert huge.count_runs() == 1_000_000
    with pytest.raises(ConfigError, match=r"1,000,000 runs .* add --yes"):
        run_suite(huge, tmp_path / "suite")
    assert not (tmp_path / "suite").exists()
    check_size(huge, confirmed=True)


def test_axes_multiply_and_joint_settings_stay_together():
    """A grid that is read otherwise than it was written runs other configurations than the table claims."""
    grid = [{"lora.rank": [8, 16]}, [{"lora.alpha": 16, "lora.dropout": 0.0}, {"lora.alpha": 32, "lora.dropout": 0.1}]]
    found = list(configurations(suite(grids={"adapters": grid}).grids.adapters))
    assert found == [
        {"lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0.0},
        {"lora.rank": 8, "lora.alpha": 32, "lora.dropout": 0.1},
        {"lora.rank": 16, "lora.alpha": 16, "lora.dropout": 0.0},
        {"lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.1},
    ]
    assert list(configurations(())) == [{}]


def test_paths_resolve_where_they_were_written(tmp_path, monkeypatch):
    """A saved suite that is carried out from another folder must read the same data."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "glue").mkdir()
    file = tmp_path / "suites" / "s.yaml"
    file.write_text(yaml.safe_dump(GLUE | {"config": {"data": {"path": "../glue"}}}), encoding="utf-8")
    loaded = load_suite(file)
    assert loaded.config["data"]["path"] == str(tmp_path / "glue")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_suite(file, ["config.data.path=./other"]).config["data"]["path"] == str(tmp_path / "other")
    again = build_suite(yaml.safe_load(save_suite(loaded)), base=tmp_path / "other")
    assert again == loaded


def test_a_missing_file_is_told(tmp_path):
    """The bare message of the system does not say what was expected there."""
    with pytest.raises(ConfigError, match=r"suite file .* does not exist"):
        load_suite(tmp_path / "none.yaml")
