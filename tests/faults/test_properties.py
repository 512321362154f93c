"""Tables and answers on rows that nobody would think of.

`tests/data/test_readers.py` has the readers, `tests/test_config.py` the config, `tests/distil/test_losses.py` losses
and `test_hostile.py` a whole experiment.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlora.deploy.predict import Classifier
from kdlora.distil.teacher_table import read_teacher_table
from tiny import save_classifier, task

SOON = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

# All that UTF-8 can hold, but for the zero byte; a bare carriage return ends a line for every CSV reader.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00\r"), min_size=1, max_size=40)
SPOKEN = TEXT.filter(lambda text: text.strip() != "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


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
    return Classifier.load(save_classifier(tiny_model_folder("bert"), tmp_path_factory.mktemp("shipped")))


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
