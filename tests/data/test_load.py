"""What becomes of a user's data: columns, kinds, labels, splits and ids."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from loading import TEXTS, WORDS, labels, load, refused

from experiments import write_lines
from kdlora.configfile import absolute_paths
from kdlora.data.load import draw_rows, load_examples
from kdlora.data.tasks import Task, find_joined, match_labels
from kdlora.errors import ConfigError, DataError


def test_what_is_inferred_is_said(csv_file) -> None:
    """What was inferred and drawn has to be said, or nobody can check it."""
    splits = load(train=csv_file("a.csv", text=TEXTS, label=WORDS))
    assert splits.task == Task("single-label", ("text",), ("label",), ("bad", "good"), ("accuracy",))
    assert (len(splits.train), len(splits.validation)) == (18, 2)
    assert splits.test is None
    assert splits.train.features == Features({"id": Value("string"), "text": Value("string"), "label": Value("int64")})
    said = " ".join(splits.notes)
    for part in (
        "Text column inferred: text",
        "Label column inferred: label",
        "single-label, was inferred",
        "bad, good",
        "2 of 20 training rows became the validation split, drawn stratified by label",
        "data.split_seed 0).",
    ):
        assert part in said
    assert "Not read" not in said
    pairs = {"question": TEXTS, "answer": TEXTS, "label": WORDS, "idx": range(20)}
    assert any("question. Not read: answer; name" in told for told in load(train=csv_file("p.csv", **pairs)).notes)

    # A forum's votes or a model's confidence would be learnt in place of the labels, for hours.
    numbers = {"id": [f"r{n}" for n in range(20)], "text": TEXTS, "score": [n / 8 for n in range(20)]}
    inferred = load(train=csv_file("a.csv", **numbers)).task
    assert (inferred.kind, inferred.label) == ("regression", ("score",))
    assert load(train=csv_file("b.csv", **numbers, label=WORDS)).task.label == ("label",)
    assert "which column is the label" in refused(train=csv_file("c.csv", **numbers, team=WORDS))


def test_the_only_column_left_is_inferred_and_never_a_row_number(csv_file) -> None:
    """Whoever has the columns `question` and `topic` gives all there is; the numbers of rows are no ratings."""
    task = load(train=csv_file("a.csv", **{"Unnamed: 0": range(20), "question": TEXTS, "topic": WORDS})).task
    assert (task.kind, task.text, task.label) == ("single-label", ("question",), ("topic",))
    amounts = csv_file("amounts.csv", amount=[f"{row}.5" for row in range(20)], label=WORDS)
    assert "the column 'amount' holds nothing but numbers; is it the text?" in refused(train=amounts)
    assert load({"text": "amount"}, train=amounts).task.text == ("amount",)
    for name in ("", "idx", "split"):
        assert "which column is the label" in refused(train=csv_file("b.csv", **{name: range(20), "text": TEXTS}))
    assert "which column is the text" in refused(train=csv_file("c.csv", label=WORDS, idx=range(20)))
    flags = {"text": TEXTS, "rude": [0, 1] * 10, "a threat": [1, 0] * 10}
    assert "name each: --label 'rude' --label 'a threat'" in refused(train=csv_file("d.csv", id=range(20), **flags))


def test_a_drawn_split_keeps_ids_and_follows_seed_fraction_and_limit(csv_file):
    """Teacher logits are attached by id; ids that are renumbered after the split attach those of other texts."""
    path = csv_file("a.csv", text=TEXTS, label=WORDS)
    splits = load(train=path, validation_fraction=0.3)
    for part in (splits.train, splits.validation):
        assert [TEXTS[int(row["id"])] for row in part] == list(part["text"])
        assert [WORDS[int(row["id"])] for row in part] == [splits.task.label_names[row["label"]] for row in part]
    assert sorted(int(i) for part in (splits.train, splits.validation) for i in part["id"]) == list(range(20))

    # An option without effect.
    first, again, other = (
        list(load(train=path, validation_fraction=0.4, split_seed=seed).validation["id"]) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 8

    # A limit that acts before the split changes the validation rows, so that runs are not comparable.
    whole, limited = load(train=path), load(train=path, max_train_examples=6)
    assert list(limited.validation["id"]) == list(whole.validation["id"])
    assert list(limited.train["id"]) == list(whole.train["id"])[:6]
    assert any("first 6 of 18" in note for note in limited.notes)

    # A given validation file that is ignored in favour of a drawn one.
    path = csv_file("a.csv", key=[f"k{row}" for row in range(20)], text=TEXTS, label=WORDS)
    other = csv_file("b.csv", label=["good", "bad"], key=["x", "k1"], text=["t", "u"])
    splits = load(train=path, validation=other, test=other, id_column="key")
    assert list(splits.train["id"]) == [f"k{row}" for row in range(20)]
    for part in (splits.validation, splits.test):
        assert (list(part["id"]), labels(part)) == (["x", "k1"], [1, 0])
    assert [note for note in splits.notes if "validation split" in note] == [
        "The validation split holds 2 rows; a score on so few says little."
    ]


def test_a_column_of_splits_that_is_not_followed_is_told(csv_file, tmp_path) -> None:
    """Test rows of a file with all splits, as Kaggle has them, were learnt from without a word."""
    for last, told in (("Test", True), ("train", False)):
        path = csv_file("a.csv", text=TEXTS, label=WORDS, Split=["train"] * 15 + [last] * 5)
        notes = " ".join(load(train=path).notes)
        assert ("a.csv: its column 'Split' (train, Test) is not followed, and every row is a" in notes) == told
    odd = [{"text": text, "label": label, "split": "test"} for text, label in zip(TEXTS, WORDS, strict=True)]
    odd[3]["split"] = 3  # nobody asked for it, so it refuses no file
    assert len(load(train=write_lines(tmp_path / "a.jsonl", odd)).train) > 0


def test_pairs_several_labels_and_kinds_that_are_set(csv_file):
    """The second text of a pair is dropped in silence by tools that know one column."""
    path = csv_file("a.csv", premise=TEXTS, hypothesis=TEXTS[::-1], label=WORDS)
    splits = load(train=path)
    assert splits.task.text == ("premise", "hypothesis")
    assert splits.train["text_pair"][0] == TEXTS[::-1][int(splits.train["id"][0])]
    swapped = load({"text": ["hypothesis", "premise"]}, train=path)
    assert swapped.train["text"][:] == splits.train["text_pair"][:]

    # Several label columns must not be cut to the first.
    path = csv_file("a.csv", text=TEXTS, joy=[0, 1] * 10, anger=["1.0", "0"] * 10, fear=["true", "False"] * 10)
    splits = load({"label": ["joy", "anger", "fear"]}, train=path, validation=path)
    assert (splits.task.kind, splits.task.label_names) == ("multi-label", ("joy", "anger", "fear"))
    assert splits.train.features["label"] == List(Value("float32"))
    assert labels(splits.train)[:2] == [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    task = {"label": ["joy", "anger", "fear"], "label_names": ["fear", "joy", "anger"]}
    assert labels(load(task, train=path, validation=path).train)[:2] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]

    # Ratings of 1 to 5 are classes or a scale; only the user knows.
    many = csv_file("b.csv", text=TEXTS * 2, label=range(40))
    assert load({"kind": "single-label"}, train=many, validation=many).task.num_labels == 40
    path = csv_file("a.csv", text=TEXTS, label=[1, 2, 3, 4] * 5)
    splits = load(train=path)
    assert splits.task.label_names == ("1", "2", "3", "4")
    assert "a quantity, as ratings are, set task.kind to regression." in " ".join(splits.notes)
    regression = load({"kind": "regression"}, train=path, validation=path)
    assert regression.task.metrics == ("pearson", "spearman")
    assert labels(regression.train) == [1.0, 2.0, 3.0, 4.0] * 5
    assert regression.train.features["label"] == Value("float32")


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        (WORDS, "single-label", ("bad", "good")),
        ([0, 1] * 10, "single-label", ("0", "1")),
        ([2, 10, -1, 2] * 5, "single-label", ("-1", "2", "10")),
        (["--1", "1"] * 10, "single-label", ("--1", "1")),
        ([" 0", " 1"] * 10, "single-label", (" 0", " 1")),
        ([True, False] * 10, "single-label", ("False", "True")),
        ([0.5, 1.0] * 10, "regression", ("label",)),
    ],
)
def test_kinds_in_every_format(tmp_path: Path, extension: str, values: list, kind: str, names: tuple[str, ...]) -> None:
    """One data set has to be one task, whatever format it is stored in."""
    frame, path = pd.DataFrame({"text": TEXTS, "label": values}), tmp_path / f"a.{extension}"
    if extension == "parquet":
        frame.to_parquet(path)
    elif extension == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if extension == "tsv" else ",")
    splits = load(train=path, validation=path)
    assert (splits.task.kind, splits.task.label_names) == (kind, names)
    found = labels(splits.train)
    assert found == (values if kind == "regression" else [names.index(str(value)) for value in values])


def test_column_types_of_other_tools(tmp_path: Path) -> None:
    """Categories (pandas) and large strings (polars) are text and names like any other."""
    path = tmp_path / "a.parquet"
    words = pa.array(WORDS).dictionary_encode()
    columns = {"id": pa.array(range(20), pa.int16()), "text": pa.array(TEXTS, pa.large_string()), "label": words}
    for text in (columns["text"], pa.array(TEXTS).dictionary_encode(), pa.array(TEXTS, pa.string_view())):
        pq.write_table(pa.table(columns | {"text": text}), path)
        splits = load(train=path, validation=path)
        assert splits.train["text"][:] == TEXTS
        assert splits.train.features["text"] == Value("string")
        assert splits.train["id"][:] == [str(row) for row in range(20)]
        assert labels(splits.train) == [0, 1] * 10
    for kind in (pa.int8(), pa.uint64()):
        pq.write_table(pa.table(columns | {"label": pa.array([3, 7] * 10, kind)}), path)
        assert load(train=path).task.label_names == ("3", "7")


@pytest.mark.parametrize("values", [WORDS, [0, 1] * 10, [False, True] * 10, ["0", "1"] * 10])
def test_label_names_set_the_order_and_name_codes(csv_file, values: list) -> None:
    """The order of the outputs is the user's, or a teacher's columns mean other labels; codes need names to ship."""
    path = csv_file("a.csv", text=TEXTS, label=values)
    splits = load({"label_names": ["good", "bad"]}, train=path, validation=path)
    assert splits.task.label_names == ("good", "bad")
    assert labels(splits.train) == ([1, 0] if values == WORDS else [0, 1]) * 10


@pytest.mark.parametrize(
    ("trained", "given", "expected", "said"),
    [
        (["1.0", "2.0", "3.0"], [1, 2, 3], [0, 1, 2], ""),
        (["0", "1"], ["1.0", "0.00"], [1, 0], ""),
        (["1", "1.0", "2"], ["2.0", "1"], [1, 0], ""),  # were three classes
        (["1.0", "2.0"], [0, 1], None, "the label '0' ('label') is not among the labels '1.0', '2.0'"),
        (["1.1", "1.10"], ["1.100"], None, "row 1: the label '1.100'"),  # sections of a text are no numbers
        (["real", "fake"], [1, 0], None, "b.csv: the labels are 0, 1, the labels of the training rows are fake, real"),
        (["no", "yes"], ["True", "False"], None, "b.csv: the labels are False, True"),
        (["good", "Good", "bad"], None, None, "a.csv: the labels 'Good', 'good' (label) differ only in case"),
        (["good", "bad", "good "], None, None, "the labels 'good', 'good ' (label) differ only in"),
        (["caf\xe9", "tea", "cafe\u0301"], None, None, r"the labels 'cafe\u0301', 'caf\xe9' (label) differ only in"),
        (["big cat", "dog", "big\xa0cat"], None, None, r"'big cat', 'big\xa0cat' (label) differ only in"),
        (["cat", "dog", "cat\u200b"], None, None, r"'cat', 'cat\u200b' (label) differ only in"),
    ],
)
def test_labels_of_another_spelling(csv_file, trained: list, given: list | None, expected, said: str) -> None:
    """A test file scored by other labels than it has; or two spellings of one, which fail after the teacher's hours.

    Where a file says 1 for what the alphabet puts first, its score is turned upside down.
    """
    path = csv_file("a.csv", text=TEXTS[:18], label=(trained * 9)[:18])
    other = {} if given is None else {"test": csv_file("b.csv", text=TEXTS[: len(given)], label=given)}
    if expected is None:
        assert said in refused({"kind": "single-label"}, train=path, **other)
        return
    assert labels(load({"kind": "single-label"}, train=path, **other).test) == expected


@pytest.mark.parametrize(
    ("values", "names"), [([["b"], ["a", "b"], []], ("a", "b")), ([[0, 1], [1, 1], [0, 0]], ("0", "1"))]
)
def test_multi_label_lists(tmp_path: Path, values: list, names: tuple[str, ...]) -> None:
    """A row without any label is a valid row, not a missing one."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": "t", "labels": value} for value in values])
    splits = load(train=path, validation=path)
    assert (splits.task.kind, splits.task.label_names) == ("multi-label", names)
    assert labels(splits.train) == [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    test = write_lines(tmp_path / "b.jsonl", [{"text": "t", "labels": [0, 1]}])  # perhaps in the order of its maker
    if names == ("a", "b"):
        assert "places in lists of 0 and 1 are 0, 1, the labels of the training rows are a, b" in refused(
            train=path, validation=path, test=test
        )
        notes = load({"label_names": ["b", "a"]}, train=path, validation=path, test=test).notes
        assert f"{test}: the places in lists of 0 and 1 were read as positions: 0 = b, 1 = a." in notes
    else:
        assert labels(load(train=path, validation=path, test=test).test) == [[0.0, 1.0]]


@pytest.mark.parametrize(("more", "told"), [(["a"], True), ([], False), (["a", "b"], False)])
def test_lists_of_one_label_each_are_doubted(tmp_path: Path, more: list[str], told: bool) -> None:
    """Labels of which each text has one, in lists as doccano writes them, got a model that may name none or two."""
    rows = [{"text": text, "label": [word]} for text, word in zip(TEXTS, "ab" * 10, strict=True)]
    path = write_lines(tmp_path / "a.jsonl", [*rows, {"text": "t", "label": more}])
    for task, doubted in ((None, told), ({"kind": "multi-label"}, False)):
        notes = load(task, train=path, validation=path).notes
        assert any(note.startswith("Every training row has exactly one label") for note in notes) == doubted


def test_columns_of_lists_and_of_texts_are_not_mixed(tmp_path: Path, csv_file):
    """Lists of labels in one file and `a;b` in another, as a spreadsheet saves them, ended in a traceback."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": "t", "labels": value} for value in (["b"], ["a", "b"])])
    for test in (csv_file("b.csv", text=["t", "u"], labels=["a;b", "a"]), csv_file("b.csv", text=["t"], labels=[1])):
        message = refused(train=path, validation=path, test=test)
        assert "b.csv: the task is multi-label, but the column 'labels' holds" in message
    path = write_lines(tmp_path / "c.jsonl", [{"text": "t", "labels": ["b"], "topic": 1}])
    message = refused({"label": ["labels", "topic"]}, train=path, validation=path)
    assert "'labels' is ['b'], but a multi-label column holds only 0 and 1" in message
    path = write_lines(tmp_path / "d.jsonl", [{"text": "t", "a": 1, "b": 0}, {"text": "u", "a": None, "b": 1}])
    # Who removes the rows throws away the texts that have no label.
    told = refused({"label": ["a", "b"]}, train=path, validation=path)
    assert "row 2: no label in column 'a' (1 of 2 rows); write 0 where a text does not have 'a'" in told
    path = write_lines(tmp_path / "e.jsonl", [{"text": "t", "labels": ["a", "b"]}, {"text": "u", "labels": None}])
    assert "(1 of 2 rows); write [] for a text without any label" in refused(train=path, validation=path)


def test_thousands_of_labels_that_do_not_fit_are_not_all_listed():
    """Each name took a search for a similar one, and a thousand of them most of a minute."""
    found, wanted = ([f"{one} {number}" for number in range(400)] for one in ("Category", "category no"))
    with pytest.raises(DataError, match="and 390 more") as caught:
        match_labels(found, wanted, "the model", "Rename them.")
    assert len(str(caught.value)) < 2000


def test_names_with_commas_are_one_label_and_joined_names_several(csv_file):
    """Silent failure: each combination of labels is a class, or classes whose names have a comma are refused."""
    assert find_joined(["a", "b", "a, b", "c", "a, c"]) == "a, b"
    assert find_joined(["['a', 'b']", "['a']", "['b']", "['b', 'c']", "['c']"]) == "['a', 'b']"
    assert find_joined(["a", "b", "a|b"]) == "a|b"
    for names in (["[0, 1, 0]", "[1, 0, 0]"], ["[0 1\n 0]", "[1 0\n 0]"], ["['a', 'b']", "['b', 'c']", "[]"]):
        assert find_joined(names) == names[0]
    pairs = ["a;b", "a;c", "b;c", "a;d", "b;d", "c;d"]
    assert find_joined(pairs) is None  # perhaps they are languages, from one to another
    assert find_joined(pairs, alone=False) == find_joined(["none", *pairs], alone=False) == "a;b"
    assert find_joined([pair.replace(";", ",") for pair in pairs], alone=False) is None
    assert find_joined([f"{place}|{kind}" for place in "ABC" for kind in "xyz"], alone=False) is None
    doubted = load(train=csv_file("a.csv", text=[f"text {number}" for number in range(18)], label=pairs * 3))
    assert any("'a;b' is read as one label" in note for note in doubted.notes)
    for names in (["bed, bath", "toys", "toys, games"], ["a > x", "a > y"], ["x, 1", "x, 2", "y, 1", "y, 2", "z, 1"]):
        assert find_joined(names) is None


def test_what_a_score_cannot_tell_is_told(csv_file, caplog):
    """A macro F1 of 33, or a correlation of 0, would be the model's fault, though the file allows no other."""
    task = Task("multi-label", ("text",), ("a", "b", "c"), ("a", "b", "c"), ("macro_f1",))
    load_examples(csv_file("a.csv", text=["t", "u"], a=[1, 0], b=[0, 0], c=[0, 0]), task, labelled=True)
    load_examples(csv_file("b.csv", text=["t", "u"], a=[1, 0], b=[0, 1], c=[0, 1]), task, labelled=True)
    number = Task("regression", ("text",), ("label",), ("label",), ("pearson",))
    load_examples(csv_file("c.csv", text=["t", "u"], label=[1.5, 1.5]), number, labelled=True)
    topic = Task("single-label", ("text",), ("label",), ("a", "b", "c"), ("macro_f1",))
    load_examples(csv_file("d.csv", text=["t", "u"], label=["a", "b"]), topic, labelled=True)
    told = [message.rpartition("/")[2] for message in caplog.messages]
    assert told == [
        "a.csv: no row has 'b', 'c' (2 of 3 labels). Macro F1 counts these as 0, and their own figures are 0.",
        "c.csv: every label is 1.5, so correlations are 0.",
        "d.csv: no row has 'c' (1 of 3 labels). Macro F1 counts these as 0 where they are predicted, and their own "
        "figures are 0.",
    ]
    # One wrong decision costs a third of the score, and it was told of other files alone.
    train = csv_file("e.csv", text=[f"text {row}" for row in range(80)], label=["a"] * 60 + ["b", "c"] * 10)
    lacking = f"The test split: {told[-1].removeprefix('d.csv: ')}"
    test = csv_file("f.csv", text=["t", "u"], label=["a", "b"])
    for metric in (None, "accuracy"):
        assert lacking in load({"metric": metric}, train=train, test=test).notes


def test_a_validation_split_on_which_all_models_score_alike_is_refused(csv_file):
    """Every checkpoint had the same score, so the first one was kept, and what ships was left to chance."""
    train = csv_file("a.csv", text=[f"text {row}" for row in range(60)], label=["a", "b", "c"] * 20)
    only, two = (csv_file(f"{name}.csv", text=["t", "u"], label=[*name]) for name in ("aa", "ab"))
    assert "the validation split holds one class only, 'a', so that" in refused(train=train, validation=only)
    for metric in ("f1:c", "average_precision:c", "recall@0.9:c"):
        assert "no row with 'c', which the score is of" in refused({"metric": metric}, train=train, validation=two)
        assert load({"metric": metric.replace(":c", ":b")}, train=train, validation=two)
    path = csv_file("m.csv", text=TEXTS, a=[1, 0] * 10, b=[0, 1] * 10)
    lacking = csv_file("n.csv", text=["t", "u"], a=[1, 1], b=[0, 0])
    several = {"label": ["a", "b"], "metric": "f1:b"}
    assert "no row with 'b', which the score is of" in refused(several, train=path, validation=lacking)


def test_numbers_that_32_bits_cannot_tell_apart(csv_file):
    """Eight times of one minute became two, and a model that knew these two was perfect."""
    path = csv_file("a.csv", text=TEXTS, label=[f"{1_700_000_000 + row}.5" for row in range(20)])
    told = refused({"kind": "regression"}, train=path)
    assert "such as 1700000000.5, so that 32 bits round their differences away; subtract a fixed number" in told
    path = csv_file("a.csv", text=TEXTS, label=[f"{1_700 + row}.5" for row in range(20)])
    assert labels(load({"kind": "regression"}, train=path, validation=path).train)[0] == 1700.5


def test_load_examples(csv_file):
    """Evaluation on a file with other columns or codes than training must mean the same labels."""
    task = Task("single-label", ("text",), ("label",), ("negative", "positive"), ("accuracy",))
    path = csv_file("a.csv", id=["a", "b"], text=["t", "u"], label=["positive", "negative"])
    assert labels(load_examples(path, task, labelled=True)) == [1, 0]
    assert load_examples(path, task, labelled=False).column_names == ["id", "text"]
    codes = csv_file("b.csv", text=["t", "u"], label=[0, 1])
    assert labels(load_examples(codes, task, labelled=True, ordered=True)) == [0, 1]
    with pytest.raises(DataError, match="nobody said which is which"):
        load_examples(codes, task, labelled=True)
    assert list(load_examples(codes, task, labelled=False)["id"]) == ["0", "1"]

    # A label that is misspelt would be told after the first epoch, or never found and scored 0.
    path = csv_file("a.csv", text=TEXTS, label=WORDS)
    with pytest.raises(ConfigError, match=r"task.metric: 'goood' is no label of the task \(bad, good\).*'good'"):
        load({"metric": "recall@0.9:goood"}, train=path)
    assert load({"metric": "recall@0.9:Good"}, train=path).task.metrics == ("recall@0.9:good",)


# Folders and the Hub


def test_saved_folder(tmp_path: Path, emotions: Dataset) -> None:
    """Names of a ClassLabel that are lost become LABEL_0 and LABEL_1 in the shipped model."""
    saved = tmp_path / "saved"
    DatasetDict({"train": emotions, "test": emotions.select([3, 2])}).save_to_disk(saved)
    splits = load(path=saved)
    assert splits.task.label_names == ("sad", "glad")
    assert splits.test.to_dict() == {"id": ["0", "1"], "text": ["text 3", "text 2"], "label": [1, 0]}
    assert len(splits.validation) == 2
    assert labels(load({"label_names": ["glad", "sad"]}, path=saved, validation="test").validation) == [0, 1]
    assert "its splits are train, test. Did you mean 'test'" in refused(path=saved, validation="tset")
    DatasetDict({"train": emotions, "test": emotions.select([])}).save_to_disk(tmp_path / "empty")
    assert "empty/test has no rows" in refused(path=tmp_path / "empty")

    # Parts that were saved one by one had to be written as files first.
    for whole in ({"train": saved / "train"}, {"path": saved}):
        splits = load(**whole, validation=saved / "test")
        assert (len(splits.train), labels(splits.validation)) == (20, [1, 0])
    assert "holds the splits train, test; give the folder of one of them" in refused(train=saved)
    values = {"data": {"path": "x/y", "test": "saved/test"}}
    assert absolute_paths(values, tmp_path, has_source=True)["data"]["test"] == str(saved / "test")
    DatasetDict().save_to_disk(tmp_path / "none")
    assert "none/dataset_dict.json: expected names of folders beside it" in refused(train=tmp_path / "none")

    # Codes in lists are label numbers, not values.
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=["x", "y", "z"]))})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "labels": [[2], [0, 1], []]}, features)
    data.save_to_disk(tmp_path / "single")
    data.to_parquet(tmp_path / "a.parquet")
    for source in ({"path": tmp_path / "single"}, {"train": tmp_path / "a.parquet"}):
        splits = load(**source, validation=tmp_path / "a.parquet")
        assert splits.task.label_names == ("x", "y", "z")
        assert labels(splits.train) == [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
        assert "set task.kind: multi-label" in refused({"kind": "single-label", "label": "labels"}, **source)


def test_hub_splits_without_labels_are_not_scored(monkeypatch: pytest.MonkeyPatch, emotions: Dataset) -> None:
    """The Hub marks hidden labels with -1; scored as a class they give a figure that means nothing."""
    hidden = emotions.map(lambda _: {"label": -1})
    loaded = DatasetDict({"train": emotions, "dev": emotions, "test": hidden})
    asked = []
    monkeypatch.setattr("kdlora.data.opening.load_dataset", lambda *args, **more: asked.append((args, more)) or loaded)
    splits = load(path="owner/name", subset="small", revision="abc")
    assert asked == [(("owner/name", "small"), {"revision": "abc"})]
    assert splits.test is None
    assert len(splits.validation) == 20
    assert any("has no labels" in note for note in splits.notes)
    assert "no label in column 'label' (20 of 20 rows)" in refused(path="owner/name", test="test")

    # Texts as labels are hidden by an empty one.
    named = Dataset.from_dict({"text": TEXTS, "label": WORDS})
    loaded = DatasetDict({"train": named, "dev": named, "test": named.map(lambda row: row | {"label": " "})})
    assert load(path="owner/name").test is None
    loaded = DatasetDict({"train": named, "dev": named, "test": named})
    assert len(load(path="owner/name").test) == 20


def test_negative_labels_are_labels(tmp_path: Path) -> None:
    """A folder's test split of bad reviews alone was left out, as if nobody knew its labels."""
    rows = Dataset.from_dict({"text": [f"text {n}" for n in range(20)], "label": [-3, -2] * 10})
    DatasetDict(dict.fromkeys(("train", "validation", "test"), rows)).save_to_disk(tmp_path / "set")
    assert load(path=tmp_path / "set").test is not None


def test_a_mark_for_no_label_is_no_class(csv_file) -> None:
    """SNLI's `-` and the Hub's -1 became a small class, for whose sake macro F1 and class weights were taken."""
    for absent in ("NULL", "nan"):
        path = csv_file("a.csv", text=TEXTS, label=[absent, "a"] * 10)
        assert any(note.startswith(f"{absent} became a class;") for note in load(train=path).notes)
    path = csv_file("a.csv", text=TEXTS, label=["-", "a", "b", "a"] * 5)
    assert "the label column 'label' holds '-', by which SNLI and MNLI mark a row" in refused(train=path)
    assert load({"label_names": ["a", "b", "-"]}, train=path).task.num_labels == 3
    for names, doubted in (([-1, 0, 1, 2], True), ([-1, 0, 1, 1], False), ([-2, -1, 1, 2], False), ("+--+", False)):
        notes = load(train=csv_file("b.csv", text=TEXTS, label=list(names) * 5)).notes
        assert any(note.startswith("-1 became a class;") for note in notes) == doubted


def test_decimals_of_a_data_base_are_numbers(tmp_path: Path) -> None:
    """DuckDB, Spark and Snowflake write a score as DECIMAL; it was "no number"."""
    path, scores = tmp_path / "a.parquet", pa.array([Decimal(row) / 4 for row in range(20)], pa.decimal128(5, 2))
    pq.write_table(pa.table({"text": TEXTS, "score": scores}), path)
    splits = load({"label": "score"}, train=path)
    assert splits.task.kind == "regression"
    assert set(labels(splits.train)) <= {row / 4 for row in range(20)}
    codes = pa.array([Decimal(row % 3) for row in range(20)], pa.decimal128(38, 0))
    pq.write_table(pa.table({"text": TEXTS, "score": codes}), path)
    assert load({"label": "score", "kind": "single-label"}, train=path).task.label_names == ("0", "1", "2")


def test_what_is_neither_hub_nor_folder(tmp_path, csv_file):
    """Offline machines need to know what to bring, not a stack of retries."""
    message = refused(path="owner/no-such-data-set")
    assert "cannot be reached" in message
    assert "save_to_disk" in message
    assert "neither a folder that exists nor the id" in refused(path="./no/such/folder")

    # A folder of files, or a file as a folder: the config keys are easily mixed up.
    path = csv_file("a.csv", text=TEXTS, label=WORDS)
    assert "set data.train" in refused(path=tmp_path)
    assert "put files into data.train" in refused(path=path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{}")
    assert "save it again" in refused(path=tmp_path / "damaged")


@pytest.mark.parametrize(("counts", "metric"), [((50, 10), "accuracy"), ((51, 10), "macro_f1"), ((12, 2), "macro_f1")])
def test_uneven_classes_are_scored_by_macro_f1_and_it_is_said(csv_file, counts, metric) -> None:
    """Where one class is 95% of the rows, accuracy calls a model that says nothing else nearly perfect."""
    words = ["spam"] * counts[1] + ["ham"] * counts[0]
    path = csv_file("a.csv", text=[f"text {row}" for row in range(len(words))], label=words)
    names = ["ham", "spam", "scam"]  # a name without rows makes nothing uneven
    splits = load({"label_names": names}, train=path, max_train_examples=40, validation_fraction=0.2)
    assert splits.task.metrics == (metric,)
    said = [note for note in splits.notes if note.startswith("Scored by macro F1")]
    assert len(said) == (metric == "macro_f1")
    assert all(f"{counts[0] / counts[1]:.1f} times" in note and "task.metric" in note for note in said)
    assert load({"metric": "accuracy"}, train=path).task.metrics == ("accuracy",)


@pytest.mark.parametrize("questions", [40, 400])
def test_pairs_that_share_a_text_are_told(csv_file, questions: int) -> None:
    """Ten answers to a question fell into both splits, and a score on known questions was taken for one on new ones."""
    asked = [f"question {row % questions}" for row in range(400)]
    path = csv_file("a.csv", question=asked, answer=[f"answer {row}" for row in range(400)], label=["no", "yes"] * 200)
    told = [note for note in load({"text": ["question", "answer"]}, train=path).notes if "of a training row" in note]
    assert told == (
        [
            "40 of 40 validation rows have the 'question' of a training row: their score is of known ones. "
            "Where new ones count, give data.validation (and data.test) with others."
        ]
        if questions == 40
        else []
    )


def test_a_regression_that_scores_0_in_every_model_is_refused(csv_file) -> None:
    """Of ten rows one was drawn, every correlation was 0, and nobody said why."""
    few = csv_file("a.csv", text=TEXTS[:10], score=[row / 4 for row in range(10)])
    assert "the validation split holds one value only" in refused(train=few)
    several, same = (csv_file(f"{name}.csv", text=TEXTS[:2], score=[0.5, name]) for name in (0.25, 0.5))
    splits = load(train=few, validation=several, test=same)
    told = [note.split(";")[0] for note in splits.notes if "a score on so few" in note]
    assert told == ["The validation split holds 2 rows", "The test split holds one value only, 0.5 (rows: 2)"]


def test_a_validation_split_has_labels_where_few_rows_have_any(tmp_path: Path) -> None:
    """Of 200 comments ten had a label, every third drawn split none, and every model scored 0."""
    rows = [{"text": f"text {row}", "labels": [["a"], ["a", "b"]][row % 2] * (row < 10)} for row in range(200)]
    train, none = (write_lines(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows), ("b", rows[10:])))
    for seed in range(20):
        splits = load(train=train, split_seed=seed)
        assert len(splits.validation) == 21
        assert f"data.split_seed {seed}); that is more than the share, so" in " ".join(splits.notes)
        assert np.sum(labels(splits.validation), axis=0).tolist() == [2, 1]
    assert "the validation split holds no rows with labels" in refused(train=train, validation=none)
    every = [{"text": f"new text {row}", "labels": ["a", "b", "c"]} for row in range(20)]
    few = load(train=write_lines(tmp_path / "c.jsonl", every), validation=write_lines(tmp_path / "d.jsonl", every[:12]))
    assert "The validation split holds 12 rows with labels; a score on so few says little." in few.notes


@given(
    classes=st.lists(st.integers(0, 4), min_size=2, max_size=300),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_split(classes: list[int], fraction: float, seed: int) -> None:
    """A row in both parts leaks; a class that is missing from training can't be learnt."""
    labels = np.array(classes)
    validation = draw_rows(len(labels), fraction, seed, labels)
    assert len(set(validation)) == len(validation)
    counts = np.bincount(labels, minlength=5)
    drawn = np.bincount(labels[validation], minlength=5)
    for count, share in zip(counts, drawn, strict=True):
        assert share < max(count, 1)
        assert count < 2 or abs(share - count * fraction) <= 1 + 1e-9
        assert share or count < 2 or len(labels) < 25  # five classes are a fifth of 25 rows
    validation = draw_rows(len(labels), fraction, seed)  # without classes
    assert len(set(validation)) == min(len(labels) - 1, max(1, round(len(labels) * fraction)))


def test_equal_texts_are_on_one_side_of_a_drawn_split(csv_file) -> None:
    """All validation rows were training texts, so the epoch and what ships were chosen by what was learnt by heart."""
    texts = [f"text {row % 60}" for row in range(300)]
    for seed in range(5):
        splits = load(train=csv_file("a.csv", text=texts, label=[row % 60 % 3 for row in range(300)]), split_seed=seed)
        assert not set(splits.train["text"]) & set(splits.validation["text"])
        assert (len(splits.train), len(splits.validation)) == (270, 30)
        # A label that stands at one text beside another one: both rows stay in training.
        named = ["rare" if row == 7 else "ab"[row % 2] for row in range(300)]
        splits = load(train=csv_file("b.csv", text=texts, label=named), split_seed=seed)
        assert "text 7" not in splits.validation["text"]
    # A first try of two lines, many times: better a note than a refusal.
    splits = load(train=csv_file("c.csv", text=["good", "bad"] * 20, label=["p", "n"] * 20))
    assert len(splits.validation) == 4
    assert [note for note in splits.notes if "says nothing of new texts" in note]


def test_a_truth_value_is_no_rating(tmp_path: Path) -> None:
    """The row was learnt as 1.0 without a word."""
    rows = [{"text": f"text {row}", "label": 4.5 + row / 10} for row in range(20)]
    rows[7]["label"] = True
    file = write_lines(tmp_path / "a.jsonl", rows)
    assert "row 8: 'label' is a truth value among numbers" in refused({"kind": "regression"}, train=file)


def test_a_split_that_is_named_serves_once(tmp_path: Path) -> None:
    """`data.validation: test` chose what ships on the rows of the headline, which were the test split too."""
    parts = {name: Dataset.from_dict({"text": [f"{name} {row}" for row in range(20)], "label": WORDS}) for name in "ab"}
    DatasetDict({"train": parts["a"], "test": parts["b"]}).save_to_disk(tmp_path / "saved")
    splits = load(path=tmp_path / "saved", validation="test")
    assert splits.test is None
    assert list(splits.validation["text"]) == list(parts["b"]["text"])
    splits = load(path=tmp_path / "saved", train="test")
    assert splits.test is None
    assert len(splits.train) + len(splits.validation) == 20


@given(rows_a_class=st.integers(2, 5), classes=st.integers(1, 80), seed=st.integers(0, 50))
def test_few_rows_a_class_stay_for_training(rows_a_class: int, classes: int, seed: int) -> None:
    """A row of every class took half of a set with two rows a class, which then had one each to learn from."""
    labels = np.repeat(np.arange(classes), rows_a_class)
    validation = draw_rows(len(labels), 0.1, seed, labels)
    assert 0 < len(validation) <= max(1, np.ceil(len(labels) / 5))
    assert len(validation) >= 0.1 * len(labels) - 1
    assert set(np.delete(labels, validation)) == set(range(classes))
    if classes > 20 and rows_a_class == 2:
        assert labels[validation].max() > classes // 2  # not of the first classes alone
