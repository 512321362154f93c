"""Schemes of tags, spans as tags and back, and the words of a text."""

import random
from itertools import pairwise

import numpy as np
import pytest

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
from kdlora.errors import DataError

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
    assert parse_tags(["O", "b-per", "i-per"]) == {"b-per": ("B", "per"), "i-per": ("I", "per"), "O": ("O", "")}


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
