"""Schemes of tags, spans as tags and back; rows of words, from files to tokens in windows."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest

from kdlora.config import DataConfig, TaskConfig
from kdlora.data.augment import augment_texts
from kdlora.data.batches import Collator, tokenise
from kdlora.data.load import Splits, load_examples, load_splits
from kdlora.data.spool import label_array
from kdlora.data.tags import (
    decode,
    entity_bounds,
    normalise,
    parse_tags,
    spans_of,
    split_words,
    tag_names,
    tags_from_spans,
)
from kdlora.data.word_tokens import split_row, word_offsets, words_seen
from kdlora.errors import DataError
from sentences import tagged_rows, write_conll, write_words
from tiny import train_tokenizer

TYPES = ("LOC", "PER")
NAMES = tag_names(TYPES)
SENTENCE = [(0, 1, "PER"), (1, 4, "PER"), (5, 6, "LOC"), (6, 8, "PER")]  # of nine words
WRITTEN = {
    "IOB2": "B-PER B-PER I-PER I-PER O B-LOC B-PER I-PER O",
    "IOB1": "I-PER B-PER I-PER I-PER O I-LOC I-PER I-PER O",
    "BILOU": "U-PER B-PER I-PER L-PER O U-LOC B-PER L-PER O",
    "IOBES": "S-PER B-PER I-PER E-PER O S-LOC B-PER E-PER O",
    "BMEWO": "W-PER B-PER M-PER E-PER O W-LOC B-PER E-PER O",
}


def read(*rows: str):
    """Bring rows of tags into IOB2: their names by row, the scheme, and the rows that broke it."""
    tags = [row.split() for row in rows]
    distinct = sorted({tag for row in tags for tag in row})
    codes = np.array([distinct.index(tag) for row in tags for tag in row], np.int64)
    offsets = np.cumsum([0, *map(len, tags)])
    parsed = parse_tags(distinct)
    numbers, scheme, broken = normalise(codes, [parsed[tag] for tag in distinct], TYPES, offsets)
    bounds = pairwise(offsets)
    return [" ".join(NAMES[tag] for tag in numbers[a:b]) for a, b in bounds], scheme, len(broken)


@pytest.mark.parametrize("scheme", WRITTEN)
def test_every_scheme_says_the_same_spans(scheme):
    """A scheme that is read as another merges two names that stand side by side, or cuts one in two."""
    (found,), told, repaired = read(WRITTEN[scheme])
    assert found == WRITTEN["IOB2"]
    assert (told, repaired) == (scheme if scheme.startswith("IOB") and scheme != "IOBES" else "BILOU", 0)


def test_tags_without_beginnings_and_of_no_scheme():
    """Prefixes that are missing would make of every word of a name a name of its own."""
    assert read("I-PER I-PER O I-LOC I-PER") == (["B-PER I-PER O B-LOC B-PER"], "IO", 0)
    assert read("PER PER O LOC PER") == (["B-PER I-PER O B-LOC B-PER"], "IO", 0)

    # A name at the end of one row would swallow the first word of another.
    assert read("O B-PER", "I-PER O") == (["O B-PER", "B-PER O"], "IOB2", 1)

    # A column of parts of speech would be learnt as a task of entities; a slip of the pen as a new type.
    assert set(parse_tags(["NNP", "VBZ"])) == {"O"}
    assert set(parse_tags(["B-PER", "O", "PER", "b-LOC", "B-", ""])) == {"B-PER", "O"}
    assert parse_tags(["O", "person-actor"])["person-actor"] == ("I", "person-actor")
    assert parse_tags(["O", "B-a-b"])["B-a-b"] == ("B", "a-b")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("B-LOC O I-PER I-PER", "B-LOC O B-PER I-PER"),
        ("B-LOC I-PER I-LOC", "B-LOC B-PER B-LOC"),
        ("U-LOC O B-PER O", "B-LOC O B-PER O"),  # not closed
        ("U-LOC L-PER O", "B-LOC B-PER O"),  # not begun
        ("B-PER L-PER L-PER", "B-PER I-PER B-PER"),  # closed twice
        ("U-LOC B-PER B-PER L-PER", "B-LOC B-PER B-PER I-PER"),
    ],
)
def test_a_row_that_breaks_its_scheme_is_repaired_and_counted(row, found):
    """A stray tag that is passed on would be no entity in the score, and nobody would know."""
    read_rows, _, repaired = read(row, row, "O O")
    assert (read_rows, repaired) == ([found, found, "O O"], 2)


def test_spans_are_strict_and_decoding_repairs_strays():
    """An I- without its B- would be counted as an entity, which strict IOB2 does not."""
    numbers = [NAMES.index(tag) for tag in WRITTEN["IOB2"].split()]
    assert spans_of(numbers, NAMES) == SENTENCE
    assert spans_of([2, 4, 3, 2, 4, -100, 3, 4], NAMES) == [(2, 3, "PER"), (6, 8, "PER")]
    starts, ends = entity_bounds(np.array([3, 4, 4, 1]), np.array([0, 2, 2, 4]))
    assert (starts.tolist(), ends.tolist()) == ([0, 3], [2, 4])

    # Scoring, serving and gates would decide differently; a word without logits would be the first type.
    values = np.full((6, 5), -1.0)
    for word, tag in enumerate([2, 2, 4, 4, 2]):
        values[word, tag] = 1.0
    values[5] = np.nan
    found = decode(values, np.array([0, 3, 6]))
    assert [NAMES[tag] for tag in found] == ["B-LOC", "I-LOC", "B-PER", "B-PER", "B-LOC", "O"]


def test_words_of_a_text():
    """A combining mark apart from its letter is a word that tokenizers drop; a dropped emoji shifts what follows."""
    text = " Don't @foo_bar नमस्ते ❤️ e\u0301a x² שָׁלוֹם\U0001f468\u200d\U0001f469 "
    words = [text[start:end] for start, end in zip(*split_words(text), strict=True)]
    assert words == [
        *("Don", "'", "t", "@", "foo_bar", "नमस्ते", "❤️", "e\u0301a", "x²", "שָׁלוֹם"),
        *("\U0001f468\u200d", "\U0001f469"),
    ]
    assert split_words("") == ([], [])
    assert split_words("a" * 10_000) == ([0], [10_000])


def test_spans_cut_words_and_lose_the_white_space_at_their_edges():
    """A span inside of a word would take the whole word, or be lost."""
    text = "see NewYorkCity now"
    spans = [
        {"start": 7, "end": 11, "label": "B"},
        {"start": 4, "end": 7, "label": "A"},
        {"start": 15, "end": 19} | {"label": "A"},
    ]
    starts, ends, tags = tags_from_spans(text, spans, "here")
    assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == ["see", "New", "York", "City", "now"]
    assert tags == ["O", "B-A", "B-B", "O", "B-A"]


def test_any_spans_come_back_as_they_went_in():
    """An offset that slips by one points at half a name; fuzzed with marks, emoji, right-to-left and long words."""
    draw = random.Random(0)
    alphabet = [*"ab é1_-.", "e\u0301", "ש", "\u05b8", "\U0001f468", "\u200d", "\ufe0f", "\n", "नि", "\U000e0100"]
    for _ in range(500):
        text = "".join(draw.choices(alphabet, k=draw.randrange(60))) + "x" * draw.choice([0, 0, 0, 10_000])
        edges = sorted(draw.sample(range(len(text) + 1), k=min(len(text) + 1, 2 * draw.randrange(5))))
        given = [
            {"start": start, "end": end, "label": draw.choice("PQ")}
            for start, end in zip(edges[::2], edges[1::2], strict=False)
            if text[start:end].strip()
        ]
        starts, ends, tags = tags_from_spans(text, given, "here")
        assert "".join(text[a:b] for a, b in zip(starts, ends, strict=True)) == "".join(text.split())
        names = tag_names(("P", "Q"))
        found = spans_of([names.index(tag) for tag in tags], names)
        assert [(text[starts[one.start] : ends[one.end - 1]], one.type) for one in found] == [
            (text[span["start"] : span["end"]].strip(), span["label"]) for span in given
        ]


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([{"start": 5, "end": 5, "label": "A"}], "ends before it has begun"),
        ([{"start": 4, "end": 8, "label": "A"}], "leaves the text, which has 7 characters"),
        ([{"start": 0, "end": 7, "label": "A"}, {"start": 4, "end": 5, "label": "B"}], "overlap"),
        ([{"start": 3, "end": 4, "label": "A"}], "holds no word"),
        ([{"start": 0, "end": 3}], "is no span"),
        ([{"start": 0, "end": 3, "label": " "}], "is no span"),
    ],
)
def test_spans_that_no_tags_can_say_are_refused(spans, says):
    """A nested or wrong span that is dropped in silence is an error in the data that is learnt."""
    with pytest.raises(DataError, match=f"data.jsonl, row 3: .*{says}"):
        tags_from_spans("abc def", spans, "data.jsonl, row 3")


TAG_NAMES = ("O", "B-BAD", "I-BAD", "B-GOOD", "I-GOOD", "B-PLACE", "I-PLACE")


@pytest.fixture
def splits(tmp_path) -> Splits:
    train = write_conll(tmp_path / "train.conll", tagged_rows(40))
    test = write_conll(tmp_path / "test.conll", tagged_rows(20, seed=1))
    (tmp_path / "more.txt").write_text("the music, in Paris\nwhat a film\n", encoding="utf-8")
    data = DataConfig(train=str(train), test=str(test), unlabelled=str(tmp_path / "more.txt"), augment=2)
    return load_splits(TaskConfig(), data)


def test_a_conll_file_becomes_texts_with_words_and_the_kind_is_inferred(splits):
    """Silent failure: tags that belong to the words beside them."""
    assert (splits.task.kind, splits.task.label_names, splits.task.metrics) == ("tokens", TAG_NAMES, ("entity_f1",))
    assert splits.task.label_types == ("BAD", "GOOD", "PLACE")
    for row, wanted in zip(splits.test, tagged_rows(20, seed=1), strict=True):
        words = [row["text"][start:end] for start, end in zip(row["starts"], row["ends"], strict=True)]
        assert words == wanted["words"]
        assert [TAG_NAMES[tag] for tag in row["label"]] == wanted["tags"]
    assert np.array_equal(label_array(splits.test), [tag for row in splits.test["label"] for tag in row])


def test_unlabelled_texts_are_split_and_copies_have_words_where_they_say(splits):
    """Silent failure: copies whose words lie beside where they should, which a teacher answers all the same."""
    plain = [row for row in splits.unlabelled if "~" not in row["id"]]
    assert [[row["text"][a:b] for a, b in zip(row["starts"], row["ends"], strict=True)] for row in plain] == [
        ["the", "music", ",", "in", "Paris"],
        ["what", "a", "film"],
    ]
    known = {word for row in tagged_rows(40) for word in row["words"]}
    copies = [row for row in splits.unlabelled if "~" in row["id"]]
    assert len(copies) == splits.copies > 40
    for row in copies:
        words = [row["text"][start:end] for start, end in zip(row["starts"], row["ends"], strict=True)]
        assert set(words) <= known
        assert row["text"] == " ".join(words)
    assert "label" not in splits.unlabelled.column_names


def test_a_copy_keeps_words_together_that_have_no_space_between_them(tmp_path):
    """Silent failure: punctuation stands alone in every copy, as it does in no text of the user's."""
    row = {"text": "well, said (Paris)!", "spans": [{"start": 12, "end": 17, "label": "PLACE"}]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row | {"id": name}) + "\n" for name in "abcdefgh"))
    train = load_splits(TaskConfig(), DataConfig(train=str(tmp_path / "train.jsonl"))).train
    texts = augment_texts(train, 30)["text"]
    assert any("(Paris)" in text for text in texts)
    assert any("well," in text for text in texts)
    assert not any(" ," in text or "saidParis" in text for text in texts)


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


def test_a_batch_has_the_words_that_count(splits):
    """Silent failure: words that the teacher or the student cannot see teach the student nonsense."""
    tokens = tokenise(splits.train, tokenizer := train_tokenizer(), 64).dataset
    collator = Collator.of(tokenizer, "tokens", 64)
    rows = [dict(tokens[place]) for place in range(2)]
    rows[0]["label"] = [-100, *rows[0]["label"][1:]]
    count = sum(len(row["label"]) for row in rows)
    plain = collator([window for row in rows for window in split_row(row)])
    assert len(plain["labels"]) == count - 1
    ids = plain["input_ids"].flatten()[plain["words"]].tolist()
    assert ids == [row["input_ids"][place] for row in rows for place in row["places"]][1:]
    for row in rows:
        row["teacher_logits"] = np.ones((len(row["label"]), 7), np.float32)
    rows[1]["teacher_logits"][0] = np.nan
    rows[0]["places"][1] = -1
    taught = collator([window for row in rows for window in split_row(row)])
    assert len(taught["labels"]) == count - 2
    assert (~taught["labelled"]).sum() == 1
    assert taught["labels"][0] == -100
    assert taught["teacher_logits"].isfinite().all()


def test_types_that_training_lacks_are_refused_by_row(tmp_path):
    """Silent failure: entities of a type that no output stands for count as nothing, and the score looks fine."""
    train = write_words(tmp_path / "train.jsonl", tagged_rows(30))
    rows = [*tagged_rows(2, seed=1), {"words": ["Anna", "said"], "tags": ["B-PERSON", "O"]}]
    other = write_words(tmp_path / "other.jsonl", rows)
    with pytest.raises(DataError, match=r"other.jsonl, row 3: the label 'PERSON'.*BAD"):
        load_splits(TaskConfig(), DataConfig(train=str(train), validation=str(other)))
    task = load_splits(TaskConfig(), DataConfig(train=str(train))).task
    assert load_examples(str(train), task, labelled=True).num_rows == 30
    plain = write_words(tmp_path / "plain.jsonl", [{"words": ["a", "b"], "tags": ["O", "O"]}] * 3)
    with pytest.raises(DataError, match="every word is O"):
        load_splits(TaskConfig(kind="tokens"), DataConfig(train=str(plain), validation=str(plain)))
