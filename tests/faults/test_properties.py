"""Formats, tables, stages and predictions on rows that nobody would think of.

`tests/data/test_readers.py` has the readers, `tests/test_config.py` the config and `tests/distil/test_losses.py` the
losses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from experiments import write_lines
from kdlora.config import DataConfig, StudentTrainConfig, TaskConfig
from kdlora.data.load import load_examples, load_splits
from kdlora.deploy.export import export_onnx
from kdlora.deploy.predict import Classifier
from kdlora.deploy.stream import predict_file
from kdlora.distil.logits import attach_teacher
from kdlora.distil.teacher import teacher_logits
from kdlora.distil.teacher_table import read_teacher_table
from kdlora.experiment.arms import train_student
from kdlora.experiment.scoring import evaluate
from kdlora.models.adapters import merge_student
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


NAMES = st.lists(SPOKEN, min_size=2, max_size=2, unique_by=str.strip)


@example(names=["\x85a", "b "], rows=[(f"{number} ", f"text {number}") for number in range(6)])
@settings(parent=SOON, max_examples=1, phases=[Phase.explicit, Phase.generate])  # to shrink would take minutes
@given(
    names=NAMES, rows=st.lists(st.tuples(SPOKEN, SPOKEN), min_size=6, max_size=10, unique_by=lambda row: row[0].strip())
)
def test_ids_texts_and_labels_come_through_every_stage(workshop, folder, names, rows):
    """A row that changes its id, or a label its name, between two stages is answered for by another one."""
    place = folder / "stages"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    ids, texts = zip(*rows, strict=True)
    data = [{"id": name, "text": text, "label": names[n % 2]} for n, (name, text) in enumerate(rows)]
    file = str(write_lines(place / "data.jsonl", data))
    splits = load_splits(TaskConfig(kind="single-label"), DataConfig(train=file, validation=file))
    teacher = load_encoder(str(workshop.teacher), splits.task, seed=0)
    options = {"max_length": 32, "device": "cpu"}
    stored = teacher_logits(teacher, [0, 1], splits.train, splits.task, place / "logits", rows_per_shard=4, **options)
    assert stored.ids.to_pylist() == list(ids)
    said = evaluate(teacher.model, teacher.tokenizer, splits.train, splits.task, max_length=32)
    np.testing.assert_allclose(stored.logits, said.logits, atol=1e-5)
    fast = StudentTrainConfig(epochs=1, batch_size=4, max_length=32)
    trained = train_student(
        str(workshop.student),
        attach_teacher(splits, stored),
        fast,
        folder=place / "steps",
        precision="fp32",
        device="cpu",
    )
    trained.encoder.model = merge_student(trained.model)
    trained.encoder.model.config.kdlora_task = splits.task.to_dict()
    save_encoder(trained.encoder, place / "student")
    export_onnx(place / "student", place / "onnx", texts=texts, formats=("onnx",))
    served = Classifier.load(place / "onnx")
    predict_file(served, file, place / "answers.jsonl")
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [answer["id"] for answer in answers] == list(ids)
    assert {answer["label"] for answer in answers} <= set(names)
    merged = evaluate(trained.encoder.model, trained.encoder.tokenizer, splits.train, splits.task, max_length=32)
    np.testing.assert_allclose(served.predict_logits(texts), merged.logits, atol=1e-3)
