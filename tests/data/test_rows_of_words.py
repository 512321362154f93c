"""Rows of words: from files to tokens in windows, perturbed copies, and lists on disk."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from loading import load, refused, words_of

from experiments import write_lines
from kdlora.data.augment import augment_texts, keep_unscored
from kdlora.data.batches import tokenise
from kdlora.data.load import Splits, load_examples
from kdlora.data.spool import label_array
from kdlora.data.tags import split_words
from kdlora.data.word_tokens import split_row, word_offsets, words_seen
from sentences import tagged_rows, write_conll
from tiny import train_tokenizer

SPAN = {"start": 0, "end": 3, "label": "PER"}
NAMES = ("O", "B-BAD", "I-BAD", "B-GOOD", "I-GOOD", "B-PLACE", "I-PLACE")


@pytest.fixture
def splits(tmp_path) -> Splits:
    train = write_conll(tmp_path / "train.conll", tagged_rows(40))
    test = write_conll(tmp_path / "test.conll", tagged_rows(20, seed=1))
    (tmp_path / "more.txt").write_text("the music, in Paris\nwhat a film\n", encoding="utf-8")
    return load(train=train, test=test, unlabelled=tmp_path / "more.txt", augment=2)


def test_a_conll_file_becomes_texts_with_words_and_the_kind_is_inferred(splits):
    """Silent failure: tags that belong to the words beside them."""
    assert (splits.task.kind, splits.task.label_names, splits.task.metrics) == ("tokens", NAMES, ("entity_f1",))
    assert splits.task.label_types == ("BAD", "GOOD", "PLACE")
    for row, wanted in zip(splits.test, tagged_rows(20, seed=1), strict=True):
        assert words_of(row) == wanted["words"]
        assert [NAMES[tag] for tag in row["label"]] == wanted["tags"]
    assert np.array_equal(label_array(splits.test), [tag for row in splits.test["label"] for tag in row])


def test_a_drawn_validation_split_has_every_type_of_entity(tmp_path):
    """A type of five sentences in 200 was in no validation split, so nothing of it was known of a model."""
    rows = [{"words": ["at", f"w{row}"], "tags": ["O", "O" if row % 4 else "B-COMMON"]} for row in range(200)]
    for row in (3, 50, 51, 120, 199):
        rows[row] = {"words": ["the", "rare", f"thing{row}"], "tags": ["O", "B-RARE", "I-RARE"]}
    train = write_conll(tmp_path / "train.conll", rows)
    for seed in range(20):
        splits = load(train=train, split_seed=seed)
        tags = [
            {splits.task.label_names[tag] for row in part for tag in row["label"]}
            for part in (splits.train, splits.validation)
        ]
        assert all({"B-RARE", "I-RARE", "B-COMMON", "O"} <= own for own in tags)
        assert len(splits.validation) == 20
    assert any("drawn stratified by type" in note for note in splits.notes)


def test_unlabelled_texts_are_split_and_copies_have_words_where_they_say(splits, tmp_path):
    """Silent failure: copies whose words lie beside where they should, which a teacher answers all the same."""
    plain = [words_of(row) for row in splits.unlabelled if "~" not in row["id"]]
    assert plain == [["the", "music", ",", "in", "Paris"], ["what", "a", "film"]]
    known = {word for row in tagged_rows(40) for word in row["words"]}
    copies = [row for row in splits.unlabelled if "~" in row["id"]]
    assert len(copies) == splits.copies > 40
    for row in copies:
        assert set(words_of(row)) <= known
        assert row["text"] == " ".join(words_of(row))
    assert "label" not in splits.unlabelled.column_names

    # Punctuation that stands alone in every copy, as it does in no text of the user's.
    row = {"text": "well, said (Paris)!", "spans": [{"start": 12, "end": 17, "label": "PLACE"}]}
    more = {"text": "张三在北京", "spans": [{"start": 3, "end": 5, "label": "PLACE"}]}
    file = write_lines(tmp_path / "train.jsonl", [row, more] * 8)
    train = load(train=file, validation=file).train
    texts = augment_texts(train, 30)["text"]
    assert any("(Paris)" in text for text in texts)
    assert any("well," in text for text in texts)
    assert any("三在北" in text for text in texts)
    assert not any(" ," in text or "saidParis" in text for text in texts)


def test_a_scored_text_is_known_whatever_its_spaces():
    """Words are joined by spaces, and the same sentence as a text has none before its full stop."""
    words = {"starts": [[0], [0]], "ends": [[3], [3]]}
    rows = Dataset.from_dict({"id": ["a", "b"], "text": ["Ada met\u00a0Alan.", "Ada"], **words})
    scored = Dataset.from_dict({"id": ["a", "b"], "text": ["Ada met Alan .", "met"], **words})
    assert keep_unscored(rows, [scored])["text"][:] == ["Ada"]


@pytest.mark.parametrize("blind", [[-1, -1], []])
def test_a_test_split_without_tags_is_left_out(tmp_path, blind):
    """A blind split of -1 gave every arm a test score of 0, and one of empty lists ended the run."""
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-X", "I-X"]))})
    rows = [{"words": ["Ada", "met"], "tags": [1, 0]}, {"words": ["Alan"], "tags": [1]}]
    parts = {"train": rows, "validation": rows, "test": [{"words": ["a", "b"], "tags": blind}]}
    saved = {name: Dataset.from_list(part, features=features) for name, part in parts.items()}
    DatasetDict(saved).save_to_disk(tmp_path)
    assert load(path=tmp_path).test is None


def test_training_words_are_cut_as_those_of_a_served_text(tmp_path):
    """Silent failure: a model that has learnt of `#Oslo` as one word marks `#` alone, or `Oslo`, where it is served."""
    words = ["in", "#Oslo", "U.S.", "A\u0301da-Lee", "x y", "."]
    tags = ["O", "B-LOC", "I-LOC", "B-PER", "O", "O"]
    file = write_conll(tmp_path / "a.conll", [{"words": words, "tags": tags}] * 3)
    splits = load(train=file, validation=file)
    row = splits.train[1]
    assert (row["starts"], row["ends"]) == split_words(row["text"])
    parts = [  # each with its tag, and whether it begins a word of the file
        *(("in", "O", True), ("#", "B-LOC", True), ("Oslo", "I-LOC", False)),
        *(("U", "I-LOC", True), (".", "I-LOC", False), ("S", "I-LOC", False), (".", "I-LOC", False)),
        *(("A\u0301da", "B-PER", True), ("-", "I-PER", False), ("Lee", "I-PER", False)),
        *(("x", "O", True), ("y", "O", False), (".", "O", True)),
    ]
    tags = [splits.task.label_names[tag] for tag in row["label"]]
    assert [*zip(words_of(row), tags, row["given"], strict=True)] == parts
    assert words_of(splits.validation[0]) == words
    assert "given" not in splits.validation.column_names


def test_words_are_found_in_windows_as_in_one(splits):
    """Silent failure: in a text that is read in several windows a word gets the tokens of another one."""
    tokenizer = train_tokenizer("roberta")
    whole, cut = (tokenise(splits.train, tokenizer, longest).dataset for longest in (64, 8))
    assert max(map(len, cut["windows"])) > 1 == max(map(len, whole["windows"]))
    assert words_seen(cut).all()
    assert np.array_equal(word_offsets(cut), word_offsets(splits.train))
    for one, other in zip(whole, cut, strict=True):
        found = []
        for row in (one, other):
            windows = list(split_row(row))
            assert all(len(window["input_ids"]) <= (64 if row is one else 8) for window in windows)
            places = [window["input_ids"][place] for window in windows for place in window["places"]]
            found.append((places, np.concatenate([window["label"] for window in windows]).tolist()))
        assert found[0] == found[1] == (found[0][0], one["label"])


@pytest.mark.parametrize(
    ("name", "content", "task", "types"),
    [
        ("a.conll", "1 Ada NNP O B-PER\n2 met VB O O\n\n", {}, ("PER",)),
        ("a.conll", "x Ada NNP O B-PER\nx met VB O O\n\n", {"text": "2"}, ("PER",)),
        ("a.conll", "x Ada NNP B-NP _\nx met VB O _\n\n", {"text": "2", "label": "4"}, ("NP",)),
        ("a.jsonl", json.dumps({"id": 0, "text": "Ada met", "label": [SPAN]}), {}, ("PER",)),
        ("a.jsonl", json.dumps({"review": "Ada met", "labels": [SPAN]}), {}, ("PER",)),
    ],
)
def test_the_kind_is_inferred_from_what_the_columns_hold(tmp_path, name, content, task, types):
    """Silent failure: numbers learnt as words; and no failure where a list of spans says what the task is."""
    file = tmp_path / name
    file.write_text(content)
    splits = load(task, train=file, validation=file)
    assert (splits.task.label_types, splits.train[0]["text"]) == (types, "Ada met")
    assert f"1 type of entities taken from the data: {types[0]}." in splits.notes
    if "[" in content:
        assert "set task.kind to tokens" in refused({"kind": "multi-label"}, train=file, validation=file)


@pytest.mark.parametrize("kind", ["tokens", "multi-label"])
def test_a_drawn_row_that_alone_has_a_label_stays_in_training(tmp_path, kind):
    """Silent failure: the row is in both splits, or in none. A loud one: a file is refused for what the draw did."""
    names = enumerate(("A", "B", "C", "D", *"E" * 36))
    rows = [{"words": [f"x{number}", name], "tags": ["O", f"B-{name}"]} for number, name in names]
    if kind == "multi-label":
        rows = [{"text": row["words"][0], "labels": row["tags"]} for row in rows]
    file = write_lines(tmp_path / "train.jsonl", rows)
    for seed in range(5):
        splits = load(train=file, validation_fraction=0.5, split_seed=seed)
        ids = sorted([*splits.train["id"], *splits.validation["id"]], key=int)
        assert ids == [str(row) for row in range(40)]
        assert {"0", "1", "2", "3"} <= set(splits.train["id"])
        assert list(splits.train["id"]) == sorted(splits.train["id"], key=int)


def test_a_split_of_few_entities_is_told_of_and_one_of_none_refused(tmp_path):
    """Silent failure: every model scores 0 on a validation file without entities, and the first one is shipped."""
    train = write_conll(tmp_path / "train.conll", tagged_rows(60))
    none = write_conll(tmp_path / "none.conll", [{"words": ["just", "words"], "tags": ["O", "O"]}])
    few = write_lines(tmp_path / "few.jsonl", tagged_rows(3))
    assert "the validation split holds no entities" in refused(train=train, validation=none)
    one = write_conll(tmp_path / "one.conll", [{"words": ["in", "Rome"], "tags": ["O", "B-PLACE"]}])
    assert any("The test split holds 1 entity;" in note for note in load(train=train, test=one).notes)
    splits = load(train=train, validation=few, test=none)
    told = [note.split(";")[0] for note in splits.notes if "a score on so few" in note]
    count = sum(tag.startswith("B-") for row in tagged_rows(3) for tag in row["tags"])
    assert told == [f"The validation split holds {count} entities", "The test split holds no entities"]
    told = [note for note in load(train=train, validation=train, test=few).notes if "a score on so few" in note]
    assert [note.split(";")[0] for note in told] == [f"The test split holds {count} entities"]


def test_types_that_training_lacks_are_refused_by_row(tmp_path):
    """Silent failure: entities of a type that no output stands for count as nothing, and the score looks fine."""
    train = write_lines(tmp_path / "train.jsonl", tagged_rows(30))
    rows = [*tagged_rows(2, seed=1), {"words": ["Anna", "said"], "tags": ["B-PERSON", "O"]}]
    message = refused(train=train, validation=write_lines(tmp_path / "other.jsonl", rows))
    assert "other.jsonl, row 3: the label 'PERSON'" in message
    assert "BAD" in message
    named = tmp_path / "other.conll"
    named.write_text("in\tO\n\tO\nParis\tB-PLACE\n\nsaid\tO\n\tO\nAnna\tB-PERSON\n")
    assert "other.conll, line 7: the label 'PERSON'" in refused(train=train, validation=named)
    assert load_examples(str(train), load(train=train).task, labelled=True).num_rows == 30

    # Names are matched without case, so a student of the trained teacher would be refused, hours later.
    named.write_text("Paris\tB-PLACE\nOslo\tB-place\n")
    for names in (None, ("PLACE", "place")):
        assert "'PLACE', 'place' (tags) differ only in case" in refused({"label_names": names}, train=named)
