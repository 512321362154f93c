from __future__ import annotations

import json

import pytest

from kdlora.data.tasks import GLUE, Task
from kdlora.errors import DataError


def test_label_order_is_the_hubs() -> None:
    """A swapped label order turns every prediction of a Hub model around without an error."""
    names = {name: glue.label_names for name, glue in GLUE.items()}
    assert names == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "stsb": ("label",),
        "qqp": ("not_duplicate", "duplicate"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "wnli": ("not_entailment", "entailment"),
        "ax": ("entailment", "neutral", "contradiction"),
    }


def test_score_metrics() -> None:
    """Accuracy in place of Matthews flatters a constant CoLA model by 70 points."""
    assert GLUE["cola"].metrics == ("matthews",)
    assert GLUE["stsb"].metrics == ("pearson", "spearman")
    assert GLUE["mrpc"].metrics == GLUE["qqp"].metrics == ("accuracy", "f1")
    assert {GLUE[name].metrics for name in ("sst2", "mnli", "qnli", "rte", "wnli")} == {("accuracy",)}


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
