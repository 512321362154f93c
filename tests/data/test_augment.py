"""Perturbed copies of training texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from kdlora.config import DataConfig, TaskConfig
from kdlora.configfile import build_config
from kdlora.data import augment
from kdlora.data.augment import augment_texts
from kdlora.data.load import load_splits
from kdlora.errors import ConfigError
from kdlora.experiment.settle import rows_per_epoch
from tiny import sentiment_rows, write_csv

TEXTS = [f"the {word} film lasted {number} minutes and nobody left" for number, word in enumerate("abcdefgh" * 5)]


def rows(**columns: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [str(row) for row in range(len(TEXTS))], **columns})


def test_copies_are_new_texts_of_old_words():
    """Copies that equal their texts teach nothing new; words from elsewhere would be another task's."""
    made = augment_texts(rows(text=TEXTS), 3, seed=1)
    assert made.column_names == ["id", "text"]
    assert len(made) == len(set(made["id"])) == 3 * len(TEXTS)
    assert made["id"][0] == "0~1"
    same = sum(text == TEXTS[row % len(TEXTS)] for row, text in enumerate(made["text"]))
    assert same < len(made) / 2
    assert {word for text in made["text"] for word in text.split()} <= {word for text in TEXTS for word in text.split()}
    assert all(made["text"])


def test_copies_depend_on_the_seed_alone():
    """Copies that change from process to process would make stored teacher logits stale."""
    one, same, other = (augment_texts(rows(text=TEXTS), 2, seed=seed) for seed in (1, 1, 2))
    assert one["text"][:] == same["text"][:]
    assert one["text"][:] != other["text"][:]


def test_how_much_is_lost():
    """A share that is read as its complement leaves noise; by hand: 7.5% deleted, 7.5% replaced, before splicing."""
    texts = [" ".join(f"w{row}-{place}" for place in range(20)) for row in range(200)]
    made = augment_texts(Dataset.from_dict({"id": [str(row) for row in range(200)], "text": texts}), 1)
    kept = [
        sum(word in text.split() for word in new.split()) / 20 for text, new in zip(texts, made["text"], strict=True)
    ]
    whole = [share for share in kept if share > 0.6]  # not spliced
    assert 0.65 < len(whole) / len(kept) < 0.85
    assert 0.82 < sum(whole) / len(whole) < 0.88


def test_pairs_and_texts_without_spaces():
    """A pair needs both its texts, some of them close to each other; Japanese has no spaces to split at."""
    pairs = augment_texts(rows(text=TEXTS, text_pair=["other words"] * len(TEXTS)), 2)
    assert pairs.column_names == ["id", "text", "text_pair"]
    echoes = sum("film" in text or "minutes" in text for text in pairs["text_pair"])
    assert 0 < echoes < len(pairs) / 2
    japanese = augment_texts(rows(text=["日本語のテキスト"] * len(TEXTS)), 1)
    assert all(text and " " not in text for text in japanese["text"])
    assert len(set(japanese["text"])) > 3
    single = augment_texts(Dataset.from_dict({"id": ["a"], "text": ["x"]}), 5)
    assert all(single["text"])


def test_copies_stand_beside_the_unlabelled_rows(tmp_path):
    """A copy that equals a validation text would teach that text; an epoch that grows would cost more than stated."""
    rows = sentiment_rows(60)
    train, more = write_csv(tmp_path / "train.csv", rows[:40]), write_csv(tmp_path / "more.csv", rows[40:50])
    same = [{**row, "text": row["text"]} for row in rows[:40]]  # every training text is scored on, too
    validation = write_csv(tmp_path / "validation.csv", same)
    files = {"train": str(train), "validation": str(validation), "unlabelled": str(more)}
    plain, with_copies = (load_splits(TaskConfig(), DataConfig(**files, augment=copies)) for copies in (0, 3))
    assert (plain.copies, rows_per_epoch(plain)) == (0, 40 + len(plain.unlabelled))
    assert rows_per_epoch(with_copies) == rows_per_epoch(plain)
    assert with_copies.copies == len(with_copies.unlabelled) - len(plain.unlabelled) < 3 * 40
    assert not set(with_copies.unlabelled["text"]) & set(with_copies.validation["text"])
    assert with_copies.unlabelled.column_names == ["id", "text"]
    assert with_copies.train["id"] == plain.train["id"]


def counted(monkeypatch) -> list[int]:
    """Count how often copies are made."""
    calls = []
    make = augment.augment_texts
    monkeypatch.setattr(augment, "augment_texts", lambda *a, **k: calls.append(1) or make(*a, **k))
    return calls


def test_copies_are_made_once(tmp_path, monkeypatch):
    """Every process of an experiment made all copies again, in memory; stale or damaged ones would be other texts."""
    calls, folder = counted(monkeypatch), tmp_path / "copies"
    files = {
        "train": str(write_csv(tmp_path / "train.csv", sentiment_rows(40))),
        "validation": str(write_csv(tmp_path / "validation.csv", sentiment_rows(30, seed=1))),
    }

    def load(**settings):
        return load_splits(TaskConfig(), DataConfig(**files, **settings), copies_in=folder)

    expected = load_splits(TaskConfig(), DataConfig(**files, augment=3))
    first, second = load(augment=3), load(augment=3)
    assert len(calls) == 2, "one for the reference, one for both"
    for splits in (first, second):
        assert splits.unlabelled.to_dict() == expected.unlabelled.to_dict()
        assert splits.unlabelled.features == expected.unlabelled.features
        assert splits.copies == expected.copies
    load(augment=2), load(augment=3, split_seed=1), load(augment=3, max_train_examples=39)
    write_csv(Path(files["validation"]), sentiment_rows(31, seed=1))
    load(augment=3)
    assert len(calls) == 6, "each is another set of copies"
    for file in folder.glob("*.arrow"):
        file.write_bytes(file.read_bytes().replace(b"film", b"fllm"))
    assert not any("fllm" in text for text in load(augment=3).unlabelled["text"])


def test_a_table_cannot_label_new_texts():
    """The copies would be missing in the table, and the run would fail after the teacher's work is done."""
    values = {"data": {"train": "a.csv", "augment": 2}, "teacher": {"logits": "t.parquet"}, "student": {"model": "m"}}
    with pytest.raises(ConfigError, match=r"data\.augment makes new texts"):
        build_config(values)
