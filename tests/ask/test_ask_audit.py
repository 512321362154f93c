"""Whether the language model is any good: by people's labels, one half to choose by and the other to report."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from kdlora.asking.audit import audit_answers
from tiny import sentiment_rows, task, write_csv

pytest_plugins = ["experiment_fixtures"]

TASK = task()


def answers(right: np.ndarray, labels: np.ndarray, sure: float) -> np.ndarray:
    table = np.full((len(labels), 2), 1 - sure)
    table[np.arange(len(labels)), np.where(right, labels, 1 - labels)] = sure
    return table


def test_figures_are_those_of_the_half_that_chose_nothing():
    """A prompt chosen and reported on the same rows looks better than it is."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    tables = [answers(draw.random(400) < 0.7, labels, 0.99) for _ in range(6)]
    audit = audit_answers(TASK, [f"p{n}" for n in range(6)], tables, labels, seed=1)
    chosen = audit.prompts[audit.chosen]
    assert chosen.chosen_on == max(one.chosen_on for one in audit.prompts)
    right = (tables[audit.chosen].argmax(axis=1) == labels).sum()
    assert round(chosen.chosen_on * 2 + chosen.accuracy * 2) == right
    assert chosen.low < chosen.accuracy < chosen.high
    assert sum(map(sum, audit.confusion)) == 200
    others = [one.against_chosen for one in audit.prompts if one is not chosen]
    assert all(one.n_examples == 200 and one.low < one.difference < one.high for one in others)
    assert audit.temperature > 2
    assert audit.ece_after < 0.1 < audit.ece_before


def test_rows_without_an_error_fit_no_temperature():
    """However sure, right answers have them surer: the fit ran to its bound, and a table of 0.9 became one of 1.0."""
    labels = np.arange(200) % 2
    flawless, flawed = np.ones(200, bool), np.arange(200) % 10 > 0
    audit = audit_answers(TASK, ["p"], [answers(flawless, labels, 0.9)], labels, seed=0)
    assert audit.temperature == 1
    assert audit.ece_after == audit.ece_before
    assert audit.untempered == "all 100 answered rows of the half that chooses are right"
    audit = audit_answers(TASK, ["p"], [answers(flawed, labels, 0.99)], labels, seed=0)
    assert audit.temperature > 1
    assert not audit.untempered


def test_a_row_without_an_answer_counts_as_wrong():
    """A prompt that refuses what is difficult would win."""
    labels = np.arange(200) % 2
    careful, plain = answers(np.ones(200, bool), labels, 0.9), answers(np.arange(200) % 10 > 0, labels, 0.9)
    careful[np.arange(200) % 3 > 0] = np.nan
    audit = audit_answers(TASK, ["careful", "plain"], [careful, plain], labels, seed=0)
    assert audit.chosen == 1
    assert audit.prompts[0].accuracy < 50
    assert audit.prompts[0].macro_f1 == 100
    assert audit.prompts[0].unanswered == 133
    assert audit.prompts[0].against_chosen.high < 0


def test_prompts_are_compared_and_the_best_one_asks_the_rest(asking):
    """The table of a prompt that lost, or of two prompts mixed."""
    bad, good = asking.folder / "bad.j2", asking.folder / "good.j2"
    body = "Labels:\n{% for one in labels %}\n{{ one.code }}: {{ one.name }}\n{% endfor %}\n\nText: "
    bad.write_text(body + "{{ text[:3] }}")
    good.write_text(body + "{{ text }}")
    validation = write_csv(asking.folder / "validation.csv", sentiment_rows(80, 1))
    done = asking(prompts=(str(bad), str(good)), audit=str(validation))
    assert done.audit.chosen == 1
    assert done.requests == 2 * 80 + 60
    assert (done.rows, done.audit.prompts[1].accuracy) == (140, 100)
    table = pd.read_parquet(done.table)
    assert table["split"].value_counts().to_dict() == {"validation": 80, "train": 60}
    assert done.audit.temperature == 1
    assert table[["negative", "positive"]].max(axis=1).to_numpy() == pytest.approx(0.9, abs=1e-6)
    assert json.loads((asking.to / "audit.json").read_text())["chosen"] == 1


def test_audited_rows_are_no_examples(asking):
    """A model that has seen the answer of an audited row audits itself."""
    asking(audit=40, shots=6)
    lines = map(json.loads, (asking.to / "answers.jsonl").read_text().splitlines())
    ids = [line["id"] for line in lines if "id" in line]
    examples = json.loads((asking.to / "ask.json").read_text())["ingredients"]["examples"]
    assert (len(ids), len(examples)) == (60, 6)
    assert not {one["id"] for one in examples} & set(ids[:40])  # those are asked first
