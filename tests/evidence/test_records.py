import re
import socket
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import edit_json
from fabricate import BINARY, SIMILARITY, TAGS, make_predictions, make_record
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
from kdlora.evidence.records import ExperimentLayout, read_record, read_results, write_record, write_results
from kdlora.system.environment import describe_machine, git_state


def test_a_record_comes_back_as_it_went(tmp_path):
    """A field that is lost on the way would be missing from every report."""
    record = make_record("kd-lora", 2)
    path = ExperimentLayout(tmp_path).run("kd-lora", 2).record
    write_record(path, record)
    assert path == tmp_path / "runs" / "kd-lora-seed2" / "run.json"
    assert read_record(path) == record
    write_results(tmp_path / "results.json", [record])
    assert read_results(tmp_path / "results.json") == [record]

    # A record that names the user's machine would travel with the report.
    described = describe_machine()
    assert int(described["cores"]) >= 1
    assert described["memory"].endswith("GiB")
    assert socket.gethostname() not in " ".join(described.values())
    assert git_state(tmp_path) == {}


def test_odd_numbers_and_truncated_records(tmp_path):
    """Python's json writes NaN, which no other reader takes; a diverged run must still be recorded."""
    record = make_record().model_copy(
        update={"history": [{"loss": float("nan"), "score": np.float32(1.5)}], "metrics": {"f1": float("inf")}}
    )
    path = tmp_path / "run.json"
    write_record(path, record)
    text = path.read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    back = read_record(path)
    assert (back.history, back.metrics) == ([{"loss": None, "score": 1.5}], {"f1": None})

    # A record that was cut off must not be taken for a finished run.
    for length in (0, 10, 500):
        path.write_text(text[:length])
        with pytest.raises(ArtifactError, match=r"run\.json is damaged.*Delete the run's folder"):
            read_record(path)


@pytest.mark.parametrize("version", [None, 99])
def test_a_record_of_another_version_names_the_remedy(tmp_path, version):
    """A field that changed its meaning would be read with the new one."""
    write_record(tmp_path / "run.json", make_record())
    edit_json(tmp_path / "run.json", schema_version=version)
    with pytest.raises(ArtifactError, match=r"run\.json.*schema_version.*newer kdlora.*upgrade.*delete the run's"):
        read_record(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("read", "content", "match"),
    [
        (read_record, None, r"a\.json: there is no such file"),
        (read_record, b"[]", "expected a JSON object, found list"),
        (read_record, b'{"schema_version": 1, "typo": 1}', r"experiment: Field required.*typo: Extra inputs"),
        (read_results, b'{"runs": [{"schema_version": 0}]}', r"a\.json, run 0"),
        (read_results, b'{"runs": 3}', "expected a list under 'runs'"),
    ],
)
def test_missing_and_foreign_files_are_refused(tmp_path, read, content, match):
    """A traceback of the JSON parser tells a user nothing."""
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=match):
        read(tmp_path / "a.json")


SPAM = Task("multi-label", ("text",), ("spam",), ("spam",), ("micro_f1",))  # a list of one value is no scalar


@pytest.mark.parametrize("task", [BINARY, SIMILARITY, TAGS, SPAM], ids=lambda task: "-".join(task.label_names))
def test_predictions_come_back_as_they_went(tmp_path, task):
    """Columns in another order, or labels in another type, would give other metrics from the same file."""
    before = replace(make_predictions(task, 6), split=("validation",) * 4 + ("test",) * 2, shift=-0.85)
    write_predictions(tmp_path / "p.parquet", before)
    after = read_predictions(tmp_path / "p.parquet")
    for ours, theirs in ((after.logits, before.logits), (after.labels, before.labels)):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    names = "ids", "split", "label_names", "groups"
    assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]
    assert after.only("test").ids == ("4", "5")
    assert np.array_equal(after.only("test").logits, before.logits[4:])
    assert np.array_equal(after.only("test").decided, before.logits[4:] + np.float32(0.85))
    for damaged in ("none", "inf"):
        table = pq.read_table(tmp_path / "p.parquet").replace_schema_metadata({"kdlora_shift": damaged})
        pq.write_table(table, tmp_path / "q.parquet")
        with pytest.raises(ArtifactError, match=r"q\.parquet: its threshold is no number"):
            read_predictions(tmp_path / "q.parquet")


def test_predictions_and_examples_on_disk(tmp_path):
    """A shorter column would shift every row after it; an Arrow error without the path sends the user searching."""
    path = tmp_path / "p.parquet"
    good = {"ids": ("1", "2"), "split": ("test",) * 2, "logits": np.zeros((2, 2)), "label_names": ("a", "b")}
    good["labels"] = np.zeros(2, np.int64)
    for bad in ({"logits": np.zeros((2, 3))}, {"split": ("test",)}, {"labels": np.zeros(3)}, {"groups": ("x",)}):
        with pytest.raises(ValueError, match="expected"):
            write_predictions(path, Predictions(**(good | bad)))
    assert not path.exists()
    with pytest.raises(ArtifactError, match=r"p\.parquet: there is no such file"):
        read_predictions(path)
    write_examples(path, [ExampleText("1", "test", "text")])
    with pytest.raises(ArtifactError, match=r"p\.parquet.*logit:<label>"):
        read_predictions(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"p\.parquet.*whole Parquet file"):
        read_predictions(path)

    # A label may hold a colon or a slash.
    names = ("a:b", "../../x", "<script>")
    before = Predictions(("1",), ("test",), np.zeros((1, 3), np.float32), names, np.array([2]), ("matched",))
    write_predictions(tmp_path / "p.parquet", before)
    after = read_predictions(tmp_path / "p.parquet")
    assert (after.label_names, after.labels.tolist(), after.groups) == (names, [2], ("matched",))

    # Validation and test both count from 0: the wrong text would be quoted.
    one, two = ExampleText("0", "validation", "first"), ExampleText("0", "test", "second", "pair")
    write_examples(tmp_path / "e.parquet", [one, two])
    assert read_examples(tmp_path / "e.parquet") == {("validation", "0"): one, ("test", "0"): two}
