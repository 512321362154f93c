"""Texts without labels, from every source, what of them is left out, and perturbed copies."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from loading import TEXTS, WORDS, load, refused, values

from experiments import write_collection, write_lines
from kdlora.config import DataConfig, TaskConfig
from kdlora.configfile import build_config
from kdlora.data import augment
from kdlora.data.augment import augment_texts, keep_unscored, share_copies
from kdlora.data.load import add_copies, load_splits
from kdlora.data.tasks import Task
from kdlora.defaults import copies_for, epochs_for
from kdlora.deploy.predict import most_characters
from kdlora.errors import ConfigError
from kdlora.experiment.settle import rows_per_epoch
from tiny import sentiment_rows, write_csv


@pytest.fixture
def files(csv_file):
    """Twenty training rows and two validation rows."""
    train = csv_file("train.csv", text=TEXTS, label=WORDS)
    return {
        "train": train,
        "validation": csv_file("validation.csv", text=["seen one", "seen two"], label=["bad", "good"]),
    }


def test_unlabelled_rows_have_ids_of_their_own_and_no_label(files, csv_file, tmp_path):
    """A label column that comes along must not teach; ids are per split, so 0 may be in both."""
    file = csv_file("more.csv", text=["new one", "new two", "new three"], label=["?", "", "bad"])
    expected = {"id": ["0", "1", "2"], "text": ["new one", "new two", "new three"]}
    assert load(**files, unlabelled=file).unlabelled.to_dict() == expected
    lines = write_lines(tmp_path / "more.jsonl", [{"id": f"k{row}", "text": f"line {row}"} for row in range(4)])
    limited = load(**files, unlabelled=lines, max_unlabelled_examples=3)
    assert values(limited.unlabelled, "id") == ["k0", "k1", "k2"]
    assert "Only the first 3 of 4 unlabelled rows are used (data.max_unlabelled_examples)." in limited.notes
    assert load(**files).unlabelled is None


def test_ids_of_copies_are_not_taken(files, csv_file):
    """The run ended after its teacher was trained, as if the ids of the file were not unique."""
    more = csv_file("more.csv", id=["a", "0~1", "1~2"], text=["new one", "new two", "new three"])
    assert "2 ids, first '0~1', are those of copies of the training texts" in refused(
        **files, unlabelled=more, augment=2
    )
    assert len(load(**files, unlabelled=more, augment=0).unlabelled) == 3


def test_scored_texts_are_left_out_and_counted(files, csv_file):
    """A validation text that the teacher answers for the student makes its score one on old texts."""
    splits = load(**files, unlabelled=csv_file("more.csv", text=["new", "seen two", "text 3", "seen one"]))
    assert splits.unlabelled.to_dict() == {"id": ["0", "2"], "text": ["new", "text 3"]}  # a training text may stay
    assert any("2 of 4 unlabelled rows hold the text of a validation or test row" in note for note in splits.notes)
    assert "(data.unlabelled): no rows are left" in refused(**files, unlabelled=csv_file("a.csv", text=["seen one"]))

    # `kdlora label` keeps the beginning of a long text, which is compared with the whole of it.
    text = "word " * 9_000
    cut = Dataset.from_dict({"text": [text[: most_characters(128)], "new"]})
    assert values(keep_unscored(cut, [Dataset.from_dict({"text": [text]})]), "text") == ["new"]

    # A premise that occurs in validation with another hypothesis is not a scored example.
    files["train"] = csv_file("train.csv", first=TEXTS, second=TEXTS, label=WORDS)
    files["validation"] = csv_file("validation.csv", first=["a", "c"], second=["b", "d"], label=["bad", "good"])
    more = csv_file("more.csv", first=["a", "a", "c"], second=["d", "b", "e"])
    splits = load({"text": ("first", "second"), "label": "label"}, **files, unlabelled=more)
    assert (values(splits.unlabelled, "text"), values(splits.unlabelled, "text_pair")) == (["a", "c"], ["d", "e"])


def test_a_split_of_a_data_set_by_name(emotions, csv_file, tmp_path):
    """The Hub's data sets bring their unlabelled part as a split; a file beside them is one still."""
    plain = Dataset.from_dict({"text": ["x y", "y z"]})
    parts = {"train": emotions, "validation": emotions.select(range(2)), "unsupervised": plain}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    file = csv_file("more.csv", text=["from a file"])
    for wanted, expected in (("unsupervised", ["x y", "y z"]), (file, ["from a file"])):
        assert values(load(path=tmp_path / "saved", unlabelled=wanted).unlabelled, "text") == expected
    message = refused(path=tmp_path / "saved", unlabelled="unsupervized")
    assert "data.unlabelled: 'unsupervized' is neither" in message
    assert "mean 'unsupervised'" in message


def test_faults_name_the_key(files, tmp_path):
    """The key tells which of five files is meant."""
    assert "(data.unlabelled) does not exist" in refused(**files, unlabelled=tmp_path / "no.csv")
    with pytest.raises(ConfigError, match=r"data\.max_unlabelled_examples limits data\.unlabelled, which is not set"):
        build_config({"data": {"train": "t.csv", "max_unlabelled_examples": 3}, "family": "bert"})

    # The copies would be missing in the table, and the run would fail after the teacher's work is done.
    sections = {"data": {"train": "a.csv", "augment": 2}, "teacher": {"logits": "t.parquet"}, "student": {"model": "m"}}
    with pytest.raises(ConfigError, match=r"data\.augment makes new texts"):
        build_config(sections)

    # A saved config must find the file again from anywhere.
    config = build_config({"data": {"train": "t.csv", "unlabelled": "u.csv"}, "family": "bert"}, base=tmp_path)
    assert config.data.unlabelled == str(tmp_path / "u.csv")


def test_plain_text_is_one_text_a_line(files, tmp_path, csv_file):
    """What most people have; a line without text is no row, and must not move the ids of those after it."""
    file = tmp_path / "more.txt"
    file.write_text('\ufefffirst, with a "quote"\n\n  \nfourth\r\nseen one\n', encoding="utf-8")
    rows = load(**files, unlabelled=file).unlabelled
    assert rows.to_dict() == {"id": ["0", "3"], "text": ['first, with a "quote"', "fourth"]}

    # Lines taken for the first text of pairs, with nothing beside them.
    train = csv_file("pairs.csv", a=TEXTS, b=TEXTS, label=WORDS)
    message = refused({"text": ("a", "b"), "label": "label"}, train=train, unlabelled=file)
    assert "one text a line, but the task has pairs (a, b)" in message


SENTENCES = [f"the {word} film lasted {number} minutes and nobody left" for number, word in enumerate("abcdefgh" * 5)]


def rows(**columns: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [str(row) for row in range(len(SENTENCES))], **columns})


def test_copies_are_new_texts_of_old_words():
    """Copies that equal their texts teach nothing new; words from elsewhere would be another task's."""
    made = augment_texts(rows(text=SENTENCES), 3, seed=1)
    assert made.column_names == ["id", "text"]
    assert len(made) == len(set(made["id"])) == 3 * len(SENTENCES)
    assert made["id"][0] == "0~1"
    same = sum(text == SENTENCES[row % len(SENTENCES)] for row, text in enumerate(made["text"]))
    assert same < len(made) / 2
    assert set(" ".join(made["text"]).split()) <= set(" ".join(SENTENCES).split())
    assert all(made["text"])

    # A pair needs both its texts, some of them close to each other; Japanese has no spaces to split at.
    pairs = augment_texts(rows(text=SENTENCES, text_pair=["other words"] * len(SENTENCES)), 2)
    assert pairs.column_names == ["id", "text", "text_pair"]
    echoes = sum("film" in text or "minutes" in text for text in pairs["text_pair"])
    assert 0 < echoes < len(pairs) / 2
    japanese = augment_texts(rows(text=["日本語のテキスト"] * len(SENTENCES)), 1)
    assert all(text and " " not in text for text in japanese["text"])
    assert len(set(japanese["text"])) > 3
    single = augment_texts(Dataset.from_dict({"id": ["a"], "text": ["x"]}), 5)
    assert all(single["text"])


def test_copies_stand_beside_the_unlabelled_rows(tmp_path):
    """A copy that equals a validation text would teach that text; an epoch that grows would cost more than stated."""
    rows = sentiment_rows(60)
    files = {"train": write_csv(tmp_path / "train.csv", rows[:40]), "unlabelled": tmp_path / "more.csv"}
    write_csv(files["unlabelled"], rows[40:50])
    files["validation"] = files["train"]  # every training text is scored on, too
    plain, with_copies = (load(**files, augment=copies) for copies in (0, 3))
    assert (plain.copies, rows_per_epoch(plain)) == (0, 40 + len(plain.unlabelled))
    assert rows_per_epoch(with_copies) == rows_per_epoch(plain)
    assert with_copies.copies == len(with_copies.unlabelled) - len(plain.unlabelled) < 3 * 40
    assert not set(with_copies.unlabelled["text"]) & set(with_copies.validation["text"])
    assert with_copies.unlabelled.column_names == ["id", "text"]
    assert with_copies.train["id"] == plain.train["id"]
    chosen = {int(name.partition("~")[2]) for name in load(**files, augment=None).unlabelled["id"] if "~" in name}
    assert chosen == set(range(1, 16))
    # 200 real texts took more from a student by the copies that they switched off than they gave it.
    write_csv(files["unlabelled"], [{"text": f"another text {number}"} for number in range(15 * 40)])
    assert load(**files, augment=None).copies == 0
    assert load(**files, augment=1).copies > 0
    # A labelled collection in place of the file cost the copies without a word.
    many, data = load(**files, augment=0), {"unlabelled": str(write_collection(tmp_path / "labelled"))}
    told = f"so 600 of them are left out beside its {len(plain.unlabelled)} texts"
    for splits, each, is_told in ((plain, None, True), (plain, 0, False), (many, None, False)):
        found = add_copies(splits, DataConfig(train=str(files["train"]), augment=each, **data))
        assert (found.copies, any(told in note for note in found.notes)) == (0, is_told)


def test_copies_that_no_student_draws_are_not_made():
    """A teacher would label a million texts of which its student sees a part."""
    assert [copies_for(None, rows) for rows in (1, 1_600, 2_700, 6_000, 60_000)] == [15, 15, 8, 4, 4]
    for rows in (1, 900, 5_000, 80_000, 10**6):
        assert copies_for(None, rows) <= epochs_for("student", rows, 0, 32)


def test_rare_labels_have_more_copies_where_they_count_alike(csv_file):
    """Of 18 texts among 2,700 a student saw so few copies that it did not learn what its teacher knew of them."""
    one = Task("single-label", ("text",), ("label",), ("a", "b"), ("macro_f1",))
    two = replace(one, kind="multi-label", metrics=("micro_f1",))

    def shared(task: Task, labels: list) -> list[int]:
        return np.broadcast_to(share_copies(task, Dataset.from_dict({"label": labels}), 4), len(labels)).tolist()

    assert shared(one, [0] * 90 + [1] * 10) == [3] * 90 + [10] * 10  # by the roots, 9.5 to 3.2
    assert shared(one, [0] * 999 + [1])[-1] == 40  # not a hundred copies of one text
    assert set(shared(one, [0, 1] * 5)) == {4}
    assert set(shared(replace(one, metrics=("accuracy",)), [0] * 90 + [1] * 10)) == {4}
    # Ten texts of both labels are of the rarer one; those with none are a class of their own.
    some = [[0.0, 0.0]] * 70 + [[1.0, 0.0]] * 20 + [[1.0, 1.0]] * 10
    assert shared(two, some) == [3] * 70 + [6] * 20 + [8] * 10

    labels = ["rare" if row % 12 == 0 else "common" for row in range(48)]
    train = csv_file("train.csv", text=[row["text"] for row in sentiment_rows(48)], label=labels)
    validation = csv_file("validation.csv", text=["new", "new"], label=["rare", "common"])
    splits = load(train=train, validation=validation, augment=4)
    copied = Counter(identity.split("~")[0] for identity in splits.unlabelled["id"])
    assert splits.copies == len(splits.unlabelled) == len(set(splits.unlabelled["id"]))
    assert copied["0"] > 8 > 4 > copied["1"] > 0


def test_copies_are_made_once(tmp_path, monkeypatch):
    """Every process of an experiment made all copies again, in memory; stale or damaged ones would be other texts."""
    calls, folder, make = [], tmp_path / "copies", augment.augment_texts
    monkeypatch.setattr(augment, "augment_texts", lambda *a, **k: calls.append(1) or make(*a, **k))
    validation = write_csv(tmp_path / "validation.csv", sentiment_rows(30, seed=1))
    data = DataConfig(train=str(write_csv(tmp_path / "train.csv", sentiment_rows(40))), validation=str(validation))

    def load(folder=folder, **settings):
        return load_splits(TaskConfig(), data.model_copy(update={"augment": 3, **settings}), copies_in=folder)

    expected = load(folder=None)
    first, second = load(), load()
    assert len(calls) == 2, "one for the reference, one for both"
    for splits in (first, second):
        assert splits.unlabelled.to_dict() == expected.unlabelled.to_dict()
        assert splits.unlabelled.features == expected.unlabelled.features
        assert splits.copies == expected.copies
    load(augment=2), load(split_seed=1), load(max_train_examples=39)
    write_csv(validation, sentiment_rows(31, seed=1))
    load()
    assert len(calls) == 6, "each is another set of copies"
    for file in folder.glob("*.arrow"):
        file.write_bytes(file.read_bytes().replace(b"film", b"fllm"))
    assert not any("fllm" in text for text in load().unlabelled["text"])
