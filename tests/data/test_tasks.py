from __future__ import annotations

import json

import pytest

from kdlora.data.tasks import GLUE, Task
from kdlora.errors import DataError


def test_names_and_metrics_are_the_hubs() -> None:
    """A swapped order turns every prediction of a Hub model around; accuracy flatters a constant CoLA model."""
    pair, three = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
    assert {name: (glue.label_names, glue.metrics) for name, glue in GLUE.items()} == {
        "cola": (("unacceptable", "acceptable"), ("matthews",)),
        "sst2": (("negative", "positive"), ("accuracy",)),
        "mrpc": (("not_equivalent", "equivalent"), ("accuracy", "f1")),
        "stsb": (("label",), ("pearson", "spearman")),
        "qqp": (("not_duplicate", "duplicate"), ("accuracy", "f1")),
        "mnli": (three, ("accuracy",)),
        "qnli": (pair, ("accuracy",)),
        "rte": (pair, ("accuracy",)),
        "wnli": (pair[::-1], ("accuracy",)),
        "ax": (three, ("matthews",)),
    }


def test_json_round_trip() -> None:
    """A task that comes back different from its record makes evaluation disagree with training."""
    for glue in GLUE.values():
        assert Task.from_dict(json.loads(json.dumps(glue.task.to_dict()))) == glue.task


def test_damaged_record() -> None:
    """A record without a field must say so, not fail with a KeyError far away."""
    with pytest.raises(DataError, match="lacks label_names, metrics; it has kind, text, label"):
        Task.from_dict({"kind": "regression", "text": ["t"], "label": ["l"]})
    values = GLUE["mrpc"].task.to_dict() | {"kind": "singel-label"}
    with pytest.raises(DataError, match="Did you mean 'single-label'"):
        Task.from_dict(values)
