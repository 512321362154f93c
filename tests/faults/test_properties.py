"""Formats, tables and predictions on rows that nobody would think of; `tests/data/test_readers.py` has the readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlora.data.load import load_examples
from kdlora.deploy.predict import Classifier
from kdlora.distil.tables import read_teacher_table
from kdlora.models.encoders import load_encoder, save_encoder
from tiny import task

pytest_plugins = ["experiment_fixtures"]

SOON = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

# All that UTF-8 can hold, but for the zero byte; a bare carriage return ends a line for every CSV reader.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00\r"), min_size=1, max_size=40)
SPOKEN = TEXT.filter(lambda text: text.strip() != "")
ROWS = st.lists(st.tuples(SPOKEN, st.sampled_from(["a", "b"])), min_size=2, max_size=12)


def frame(rows) -> pd.DataFrame:
    """Rows with ids."""
    return pd.DataFrame(rows, columns=["text", "label"]).assign(id=[f"r{number}" for number in range(len(rows))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


@SOON
@given(rows=ROWS, form=st.sampled_from(["csv", "jsonl", "parquet"]), ids=st.permutations(range(12)))
def test_every_row_keeps_id_text_and_label_in_every_format(folder, rows, form, ids):
    """The same rows must be the same examples, whatever they are stored in."""
    values = frame(rows).assign(id=[f"ü|{ids[number]}" for number in range(len(rows))])
    path = folder / f"examples.{form}"
    if form == "csv":
        values.to_csv(path, index=False, lineterminator="\n")
    elif form == "jsonl":
        values.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        values.to_parquet(path)
    found = load_examples(str(path), task(names=("a", "b")), labelled=True)
    assert list(found["id"]) == list(values["id"])
    assert list(found["text"]) == list(values["text"])
    assert ["ab"[code] for code in found["label"]] == list(values["label"])


NUMBERS = st.floats(-(2.0**90), 2.0**90, width=32)


@SOON
@given(
    rows=st.lists(st.tuples(SPOKEN, NUMBERS, NUMBERS), min_size=1, max_size=8, unique_by=lambda row: row[0]),
    turned=st.booleans(),
)
def test_a_table_gives_every_id_its_own_numbers(folder, rows, turned):
    """Columns in another order, and ids of any kind, must not exchange what the teacher said."""
    path = folder / "table.parquet"
    columns = {"id": [row[0] for row in rows], "b": [row[2] for row in rows], "a": [row[1] for row in rows]}
    pd.DataFrame(dict(reversed(columns.items())) if turned else columns).to_parquet(path)
    found = read_teacher_table(path, task(names=("a", "b")), values="logits", split="train")
    assert found.ids.to_pylist() == columns["id"]
    np.testing.assert_array_equal(found.logits, np.array([row[1:] for row in rows], np.float32))


@pytest.fixture(scope="module")
def classifier(tiny_model_folder, tmp_path_factory) -> Classifier:
    encoder, folder = load_encoder(str(tiny_model_folder("bert")), task(), seed=0), tmp_path_factory.mktemp("shipped")
    encoder.model.config.kdlora_task = task().to_dict()
    save_encoder(encoder, folder)
    return Classifier.load(folder)


@settings(parent=SOON, max_examples=40)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=200).filter(str.strip), min_size=1, max_size=6
    )
)
def test_any_text_gets_an_answer_that_does_not_depend_on_its_neighbours(classifier, texts):
    """A text that the tokenizer turns into nothing, or that shifts the others of its batch."""
    together = classifier.predict_logits(texts)
    assert np.isfinite(together).all()
    alone = np.concatenate([classifier.predict_logits([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-4)
