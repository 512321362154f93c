"""Tasks of tokens in collections, searches and suites."""

import pytest

from kdlora.configfile import build_search
from kdlora.data.load import load_splits
from kdlora.data.tags import split_words
from kdlora.distil.teacher_table import read_collection
from kdlora.errors import ConfigError
from kdlora.experiment.labelling import LabelSettings, label_collection
from kdlora.experiment.search import run_search
from kdlora.experiment.suite import run_suite
from kdlora.experiment.suitefile import build_suite
from kdlora.models.encoders import load_encoder, save_encoder
from sentences import tagged_rows, write_conll

TRAIN = {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """A training and a validation file."""
    folder = tmp_path_factory.mktemp("tokens")
    rows = {"train": tagged_rows(32), "validation": tagged_rows(12, seed=1)}
    return {name: str(write_conll(folder / f"{name}.conll", part)) for name, part in rows.items()}


def test_a_collection_is_labelled_word_by_word_and_teaches(workshop, data, tmp_path):
    """Silent failure: logits of whole texts, of texts cut at max_length, or of words that the collection lacks."""
    task = load_splits(workshop.config({"data": data}).task, workshop.config({"data": data}).data).task
    encoder = load_encoder(str(workshop.teacher), task, seed=0)
    encoder.model.config.kdlora_task = task.to_dict()
    save_encoder(encoder, tmp_path / "teacher")
    texts = [" ".join(row["words"] * 8) + "!" for row in tagged_rows(20, seed=4)]
    (tmp_path / "more.txt").write_text("\n".join(texts), encoding="utf-8")
    settings = LabelSettings(max_length=24, rows_per_shard=8, precision="fp32")
    summary = label_collection(str(tmp_path / "teacher"), str(tmp_path / "more.txt"), tmp_path / "set", settings)
    assert (summary.rows, summary.rejected, summary.truncated, summary.shards) == (20, 0, 0, 3)
    found = read_collection(tmp_path / "set", task, "data.unlabelled")
    assert (found.offsets[1:] - found.offsets[:-1]).tolist() == [len(split_words(text)[0]) for text in texts]
    config = workshop.config({"data": data | {"unlabelled": str(tmp_path / "set")}})
    splits = load_splits(config.task, config.data)
    assert splits.unlabelled["text"][:] == texts
    assert len(found.attach(splits.unlabelled)) == 20


def test_a_search_tries_on_held_out_sentences(workshop, data, tmp_path):
    """Silent failure: trials that are scored by something else than entities."""
    values = workshop.values({"data": data, "student": {"train": TRAIN}, "teacher": {"train": TRAIN}})
    values["search"] = {"space": {"lora.rank": [2]}, "trials": 1, "arm": "kd-lora"}
    found = run_search(*build_search(values), tmp_path / "search")
    assert found.finished == 1
    assert found.best


def test_a_suite_compares_arms_on_a_task_of_tokens(workshop, data, tmp_path):
    """Silent failure: tables of another metric; a bag of words whose runs all fail after the others have trained."""
    values = workshop.values()
    suite = {
        "name": "entities",
        "tasks": {"places": {"task": {}, "data": data}},
        "families": {
            "tiny": {
                "teacher": values["teacher"] | {"train": TRAIN},
                "student": values["student"] | {"train": TRAIN},
            }
        },
        "config": {"recipe": "paper", "run": {"precision": "fp32", "threads": 1}},
        "arms": ["fft", "kd-lora", "student-lora"],
        "seeds": [0],
    }
    with pytest.raises(ConfigError, match="a bag of words has one answer a text"):
        run_suite(build_suite(suite | {"arms": ["words", "student-lora"]}), tmp_path / "words")
    result = run_suite(build_suite(suite), tmp_path / "suite")
    assert {record.status for record in result.records.values()} == {"finished"}
    assert all("entity_f1" in record.metrics for record in result.records.values())
