from __future__ import annotations

import json

import numpy as np
import pytest

from fabricate import BINARY, SIMILARITY, TAGS, make_labels, make_logits, make_record
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError
from kdlora.evidence.predictions import (
    ExampleText,
    Predictions,
    read_examples,
    read_predictions,
    write_examples,
    write_predictions,
)
from kdlora.evidence.records import (
    SCHEMA_VERSION,
    ExperimentLayout,
    read_record,
    read_results,
    write_record,
    write_results,
)
from kdlora.system.environment import collect_versions, describe_machine, git_state


def test_a_record_comes_back_as_it_went(tmp_path):
    """A field that is lost on the way would be missing from every report."""
    record = make_record("kd-lora", 2)
    path = ExperimentLayout(tmp_path).run("kd-lora", 2).record
    write_record(path, record)
    assert path == tmp_path / "runs" / "kd-lora-seed2" / "run.json"
    assert read_record(path) == record
    write_results(tmp_path / "results.json", [record])
    assert read_results(tmp_path / "results.json") == [record]


def test_numbers_that_json_lacks_become_null(tmp_path):
    """Python's json writes NaN, which no other reader takes; a diverged run must still be recorded."""
    record = make_record().model_copy(
        update={"history": [{"loss": float("nan"), "score": np.float32(1.5)}], "metrics": {"f1": float("inf")}}
    )
    write_record(tmp_path / "run.json", record)
    text = (tmp_path / "run.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    back = read_record(tmp_path / "run.json")
    assert back.history == [{"loss": None, "score": 1.5}]
    assert back.metrics == {"f1": None}


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_truncated_record_names_file_and_remedy(tmp_path, length):
    """A record that was cut off must not be taken for a finished run."""
    write_record(tmp_path / "run.json", make_record())
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text[:length])
    with pytest.raises(ArtifactError, match=r"run\.json.*cut off or damaged.*Delete the run's folder"):
        read_record(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("version", "remedy"), [(0, "older kdlora: delete"), (None, "older"), (SCHEMA_VERSION + 1, "newer kdlora: upgrade")]
)
def test_a_record_of_another_version_names_the_remedy(tmp_path, version, remedy):
    """A field that changed its meaning would be read with the new one."""
    write_record(tmp_path / "run.json", make_record())
    content = json.loads((tmp_path / "run.json").read_text()) | {"schema_version": version}
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=rf"run\.json.*schema_version.*{remedy}"):
        read_record(tmp_path / "run.json")


def test_missing_and_foreign_files_are_refused(tmp_path):
    """A traceback of the JSON parser tells a user nothing."""
    with pytest.raises(ArtifactError, match=r"run\.json: there is no such file"):
        read_record(tmp_path / "run.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ArtifactError, match="expected a JSON object, found list"):
        read_record(tmp_path / "list.json")
    (tmp_path / "other.json").write_text('{"schema_version": 1, "arm": "lora", "typo": 1}')
    with pytest.raises(ArtifactError, match=r"experiment: Field required.*typo: Extra inputs"):
        read_record(tmp_path / "other.json")
    (tmp_path / "results.json").write_text('{"runs": [{"schema_version": 0}]}')
    with pytest.raises(ArtifactError, match=r"results\.json, run 0"):
        read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"runs": 3}')
    with pytest.raises(ArtifactError, match="expected a list under 'runs'"):
        read_results(tmp_path / "results.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="damaged"):
        read_record(tmp_path / "binary.json")


SPAM = Task("multi-label", ("text",), ("spam",), ("spam",), ("micro_f1",))  # a list of one value is no scalar


@pytest.mark.parametrize("task", [BINARY, SIMILARITY, TAGS, SPAM], ids=lambda task: "-".join(task.label_names))
def test_predictions_come_back_as_they_went(tmp_path, task):
    """Columns in another order, or labels in another type, would give other metrics from the same file."""
    labels = make_labels(task, 6)
    before = Predictions(
        ids=tuple("abcdef"),
        split=("validation",) * 4 + ("test",) * 2,
        logits=make_logits(task, labels, 0.5, seed=0),
        label_names=task.label_names,
        labels=labels,
    )
    write_predictions(tmp_path / "p.parquet", before)
    after = read_predictions(tmp_path / "p.parquet")
    assert after.logits.dtype == np.float32
    assert np.array_equal(after.logits, before.logits)
    assert after.labels is not None
    assert after.labels.dtype == labels.dtype
    assert np.array_equal(after.labels, labels)
    assert (after.ids, after.split, after.label_names, after.groups) == (
        before.ids,
        before.split,
        task.label_names,
        None,
    )
    assert after.only("test").ids == ("e", "f")
    assert np.array_equal(after.only("test").logits, before.logits[4:])


def test_predictions_keep_groups_and_odd_label_names(tmp_path):
    """A label may hold a colon or a slash; a row may have no label."""
    names = ("a:b", "../../x", "<script>")
    before = Predictions(("1",), ("test",), np.zeros((1, 3), np.float32), names, None, ("matched",))
    write_predictions(tmp_path / "p.parquet", before)
    after = read_predictions(tmp_path / "p.parquet")
    assert (after.label_names, after.labels, after.groups) == (names, None, ("matched",))


def test_predictions_that_do_not_fit_together_are_refused(tmp_path):
    """A shorter column would shift every row after it."""
    good = {"ids": ("1", "2"), "split": ("test",) * 2, "logits": np.zeros((2, 2)), "label_names": ("a", "b")}
    for bad in ({"logits": np.zeros((2, 3))}, {"split": ("test",)}, {"labels": np.zeros(3)}, {"groups": ("x",)}):
        with pytest.raises(ValueError, match="expected"):
            write_predictions(tmp_path / "p.parquet", Predictions(**(good | bad)))
    assert list(tmp_path.iterdir()) == []


def test_damaged_predictions_name_file_and_remedy(tmp_path):
    """An Arrow error without the path sends the user searching."""
    path = tmp_path / "p.parquet"
    with pytest.raises(ArtifactError, match=r"p\.parquet: there is no such file"):
        read_predictions(path)
    write_examples(path, [ExampleText("1", "test", "text")])
    with pytest.raises(ArtifactError, match=r"p\.parquet.*logit:<label>"):
        read_predictions(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"p\.parquet.*whole Parquet file"):
        read_predictions(path)


def test_examples_are_found_by_split_and_id(tmp_path):
    """Validation and test both count from 0: the wrong text would be quoted."""
    one, two = ExampleText("0", "validation", "first"), ExampleText("0", "test", "second", "pair")
    write_examples(tmp_path / "e.parquet", [one, two])
    assert read_examples(tmp_path / "e.parquet") == {("validation", "0"): one, ("test", "0"): two}


def test_the_environment_is_described_without_the_hosts_name(tmp_path):
    """A record that names the user's machine would travel with the report."""
    import socket

    described = describe_machine()
    assert int(described["cores"]) >= 1
    assert described["memory"].endswith("GiB")
    assert socket.gethostname() not in " ".join(described.values())
    versions = collect_versions()
    assert {"python", "numpy", "torch"} <= set(versions)
    assert git_state(tmp_path) == {}
    state = git_state()
    assert not state or (len(state["commit"]) == 40 and state["dirty"] in ("yes", "no"))
