"""Files of words with tags, and of texts with spans: CoNLL, JSON Lines, Parquet, data sets."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as Listed

from kdlora.config import TaskConfig
from kdlora.data.read import open_dataset, open_file
from kdlora.data.token_rows import infer_token_columns, read_token_rows
from kdlora.errors import DataError

NEWS = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nAnn NNP B-PER\nLee NNP I-PER\n"


@pytest.fixture
def read(tmp_path):
    """Write a file, and read it as training does: words by row with their tags, and the notes."""

    def reading(name, content, **task):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return rows_of(open_file(file, "data.train"), TaskConfig(**{"kind": "tokens"} | task))

    return reading


def rows_of(source, task=None):
    """Read a source: each row as `word/TAG ...`, and what is noted, without the file's name."""
    columns = infer_token_columns(source, task or TaskConfig())
    assert columns is not None
    notes: list[str] = []
    rows = read_token_rows(source.read(columns), *columns, notes).to_pylist()
    words = [
        [(row["text"][start:end], tag) for start, end, tag in zip(row["starts"], row["ends"], row["tags"], strict=True)]
        for row in rows
    ]
    found = [" ".join(f"{word}/{tag}" for word, tag in row) for row in words]
    return found, [note.replace(source.name, "FILE") for note in notes]


def lines(*rows):
    """Write JSON Lines."""
    return "\n".join(map(json.dumps, rows))


def test_conll_of_several_columns(read):
    """The wrong column would be learnt, and its scores would look like any others."""
    expected = ["EU/B-ORG rejects/O", "Ann/B-PER Lee/I-PER"]
    assert read("a.conll", NEWS) == (expected, [])
    assert read("a.bio", NEWS.replace(" ", "\t").replace("\n", "\r\n"), kind="auto")[0] == expected
    chunks = NEWS.replace(" NNP", " B-NP").replace(" VBZ", " O")
    assert read("a.conll", chunks, label="2")[0] == ["EU/B-NP rejects/O", "Ann/B-NP Lee/B-NP"]


def test_conll_with_odd_white_space_comments_and_words_that_look_like_these(read):
    """A hash that is a word would be lost, or a comment become a sentence; words of nothing shift the tags."""
    text = "# id 7\tdomain=x\n#\tO\nÉ \tB-LOC\n\t\n \tO\na b\tO\n \u3000\tO\n\u00a0\t\n\n\tO\n\n# id 8\tdomain=x\n-\tO"
    found, notes = read("a.conll", text)
    assert found == ["#/O É/B-LOC", "a b/O", "-/O"]
    assert notes == ["FILE: 2 words of white space alone were left out."]


def test_schemes_are_told_and_repairs_are_counted_by_row(read):
    """A file that is repaired in silence may be one that was read in the wrong scheme."""
    found, notes = read("a.conll", "a I-X\nb B-X\n\nc I-X\nd I-X\n")
    assert (found, notes) == (["a/B-X b/B-X", "c/B-X d/I-X"], ["FILE: tags in IOB1."])
    found, notes = read("a.conll", "a B-X\nb O\nc I-X\nd I-X\n\ne O\n")
    assert found == ["a/B-X b/O c/B-X d/I-X", "e/O"]
    assert notes[0].startswith("FILE: tags in IOB2; 1 of 2 rows broke this scheme and were repaired")
    mixed = "a I-X\nb O\n\n" * 10 + "a B-X\nb O\n\n" * 9 + "c O\n\n" * 99
    with pytest.raises(DataError, match=r"10 of the 19 rows with entities break this scheme, the first at .*line 1;"):
        read("a.conll", mixed)


def test_words_and_tags_of_json_parquet_and_data_sets(read, tmp_path):
    """A code that is read in another order than the names' is a type for another; -100 is not the last type."""
    expected = ["a/B-PER b/I-PER c/None", "d/O"]
    rows = [{"tokens": ["a", "b", "c"], "ner_tags": ["B-PER", "I-PER", None]}, {"tokens": ["d"], "ner_tags": ["O"]}]
    assert read("a.jsonl", lines(*rows), kind="auto")[0] == expected
    features = {"tokens": Listed(Value("string")), "ner_tags": Listed(ClassLabel(names=["O", "B-PER", "I-PER"]))}
    coded = {"tokens": [row["tokens"] for row in rows], "ner_tags": [[1, 2, -100], [0]]}
    dataset = Dataset.from_dict(coded, features=Features(features))
    assert rows_of(open_dataset(dataset, "a data set"))[0] == expected
    dataset.to_parquet(tmp_path / "a.parquet")
    assert rows_of(open_file(tmp_path / "a.parquet", "data.train"))[0] == expected


def test_texts_with_spans(read):
    """A row without spans, in a file where the first thousands have none, has words that are all outside."""
    rows = [{"text": "Go on", "spans": []}] * 5000
    found, notes = read(
        "a.jsonl", lines(*rows, {"text": "Ann Lee's", "spans": [{"start": 0, "end": 7, "label": "PER"}]}), kind="auto"
    )
    assert (found[0], found[-1], len(found), notes) == ("Go/O on/O", "Ann/B-PER Lee/I-PER '/O s/O", 5001, [])


@pytest.mark.parametrize(
    "row",
    [
        {"text": "good", "label": "positive"},
        {"text": "good", "label": ["joy", "love"]},
        {"tokens": "good", "label": "positive"},
        {"words": ["good"], "topic": "x"},
    ],
)
def test_other_tasks_are_not_taken_for_tokens(tmp_path, row):
    """A task of labels would turn into one of words because of a column's name."""
    (tmp_path / "a.jsonl").write_text(lines(row), encoding="utf-8")
    assert infer_token_columns(open_file(tmp_path / "a.jsonl", "data.train"), TaskConfig()) is None


SPAN = {"start": 0, "end": 2, "label": "A"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.conll", "a x O\nb O\n\nc x O\n", "a.conll, line 2: 2 columns where 3 are expected"),
        ("a.conll", "a\tB-X\nb\t\n", "a.conll, line 2: 1 columns where 2 are expected"),
        ("a.conll", "a\tB-X\nb\tO\tB-Y\n", "a.conll, line 2: 3 columns where 2 are expected"),
        ("a.conll", "a\tO\n\n\nb\tB-X,B-Y\n", "a.conll, line 4: the tag 'B-X,B-Y' .* keep that of one annotator"),
        ("a.conll", "a\tO\nb\tB-X\nc\tB_X\n", "a.conll, line 3: the tag 'B_X' .* Did you mean 'B-X'"),
        ("a.conll", "a NNP\nb VBZ\n", "a.conll, line 1: the tag 'NNP' .* is it the column of tags"),
        ("a.conll", "a\nb\n", "which columns hold words and tags"),
        ("a.conll", "\n-DOCSTART- O\n\n", "holds no words"),
        ("a.conll", b"a\tO\n\xff\tO\n", "a.conll, line 2: byte 0xFF"),
        ("a.jsonl", lines({"words": ["a", "b"], "tags": ["O"]}), "a.jsonl, row 1: 2 words, but 1 tags in 'tags'"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"words": [], "tags": []}), "a.jsonl, row 2: no words"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"words": ["a"]}), "a.jsonl, row 2: no tags in column"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"tags": ["O"]}), "a.jsonl, row 2: no words in column"),
        (
            "a.jsonl",
            lines({"words": ["a", "b", "c"], "tags": ["O", "x", "B-Y"]}),
            "a.jsonl, row 1, word 2: the tag 'x'",
        ),
        ("a.jsonl", lines({"words": ["a"], "tags": [3]}), "nothing says which is which"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"words": ["a", 3], "tags": ["O", "O"]}), "a.jsonl, row 2"),
        ("a.jsonl", lines({"words": ["a"], "label": [SPAN]}), "holds spans, whose offsets are those of a text"),
        ("a.jsonl", lines({"text": "ab cd", "spans": [SPAN]}, {"text": " ", "spans": []}), "a.jsonl, row 2: the text"),
        ("a.jsonl", lines({"text": "ab", "spans": [SPAN]}, {"text": "ab"}), "a.jsonl, row 2: no list of spans"),
        (
            "a.jsonl",
            lines({"text": "ab", "spans": [SPAN]}, {"text": "a", "spans": [SPAN]}),
            "a.jsonl, row 2: .* leaves",
        ),
        ("a.jsonl", lines({"text": "ab", "spans": [SPAN, SPAN]}), "a.jsonl, row 1: .* overlap"),
        ("a.jsonl", lines({"text": "ab", "spans": ["x"]}), "holds list<.*> beside texts"),
        ("a.csv", "text,label\na,b\n", "holds string beside texts"),
        ("a.csv", "phrase,sort\na,b\n", "which columns hold words and tags"),
    ],
)
def test_bad_files_are_refused_with_place_and_remedy(read, name, content, says):
    """A row that is skipped or shifted in silence teaches the wrong tags."""
    with pytest.raises(DataError, match=says):
        read(name, content)
