"""Schemes of tags, spans as tags and back, and files of words with tags, and of texts with spans."""

import json
import random
import unicodedata

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as Listed
from loading import words_of

from experiments import write_lines
from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import load_splits
from kdlora.data.read import open_dataset, open_file
from kdlora.data.tags import (
    Span,
    check_spans,
    decode,
    entity_bounds,
    join_words,
    spans_of,
    split_words,
    tag_names,
    tags_from_spans,
)
from kdlora.data.token_rows import infer_token_columns, read_token_rows
from kdlora.errors import DataError

NAMES = tag_names(("LOC", "PER"))
SENTENCE = [(0, 1, "PER"), (1, 4, "PER"), (5, 6, "LOC"), (6, 8, "PER")]  # of nine words
WRITTEN = {
    "IOB2": "B-PER B-PER I-PER I-PER O B-LOC B-PER I-PER O",
    "IOB1": "I-PER B-PER I-PER I-PER O I-LOC I-PER I-PER O",
    "BILOU": "U-PER B-PER I-PER L-PER O U-LOC B-PER L-PER O",
    "IOBES": "S-PER B-PER I-PER E-PER O S-LOC B-PER E-PER O",
    "BMEWO": "W-PER B-PER M-PER E-PER O W-LOC B-PER E-PER O",
    "IOB2 with _": "B_PER B_PER I_PER I_PER O B_LOC B_PER I_PER O",
    "BILOU behind": "PER-U PER-B PER-I PER-L O LOC-U PER-B PER-L O",
}


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
    found = [" ".join(f"{word}/{tag}" for word, tag in zip(words_of(row), row["tags"], strict=True)) for row in rows]
    return found, [note.replace(source.name, "FILE") for note in notes]


def lines(*rows):
    """Write JSON Lines."""
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def read_tags(read):
    """`read_tags("B-PER O", ...)` reads a file of such rows: their tags in IOB2, and the notes."""

    def reading(*rows):
        found, notes = read("a.conll", "\n\n".join("\n".join(f"x {tag}" for tag in row.split()) for row in rows))
        return [row.replace("x/", "") for row in found], notes

    return reading


def test_every_scheme_says_the_same_spans(read_tags):
    """A scheme that is read as another merges two names side by side, cuts one in two, or makes two types of one."""
    for scheme, tags in WRITTEN.items():
        told = scheme[:4] if scheme[:3] == "IOB" and scheme != "IOBES" else "BILOU"
        assert read_tags(tags) == ([WRITTEN["IOB2"]], [f"FILE: tags in {told}."] * (told != "IOB2")), scheme

    # Prefixes that are missing would make of every word of a name a name of its own.
    for tags in ("I-PER I-PER O I-LOC I-PER", "PER PER O LOC PER"):
        assert read_tags(tags) == (["B-PER I-PER O B-LOC B-PER"], ["FILE: tags in IO."])
    for tags, found in (
        ("O person-actor", "O B-person-actor"),
        ("B-a-b O", "B-a-b O"),
        ("b-per i-per", "B-per I-per"),
        ("O vitamin-B vitamin-E", "O B-vitamin-B B-vitamin-E"),
    ):
        assert read_tags(tags)[0] == [found]

    # A name at the end of one row would swallow the first word of another.
    assert read_tags("O B-PER", "I-PER O")[0] == ["O B-PER", "B-PER O"]

    # A file that is repaired in silence may be one that was read in the wrong scheme.
    rows = ["I-X O"] * 10 + ["B-X O"] * 9 + ["O"] * 99
    with pytest.raises(DataError, match=r"10 of the 19 rows with entities break this scheme, the first at .*line 1;"):
        read_tags(*rows)


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
def test_a_row_that_breaks_its_scheme_is_repaired_and_counted(read_tags, row, found):
    """A stray tag that is passed on would be no entity in the score, and nobody would know."""
    rows, (note,) = read_tags(row, row, "O O")
    assert rows == [found, found, "O O"]
    assert "; 2 of 3 rows broke this scheme and were repaired" in note


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

    # A sign that tokenizers drop would tear a name in two.
    values = np.full((7, 5), np.nan)
    for word, tag in {0: 1, 2: 2, 5: 2, 6: 0}.items():
        values[word] = np.eye(5)[tag]
    found = decode(values, np.array([0, 3, 7]))
    assert [NAMES[tag] for tag in found] == ["B-LOC", "I-LOC", "I-LOC", "O", "O", "B-LOC", "O"]


def test_words_of_a_text():
    """A combining mark apart from its letter is a word that tokenizers drop; a dropped emoji shifts what follows."""
    text = " Don't @foo_bar नमस्ते ❤️ e\u0301a x² שָׁלוֹם\U0001f468\u200d\U0001f469 Mül\u00adler می\u200cرود\u200c "
    words = [text[start:end] for start, end in zip(*split_words(text), strict=True)]
    assert words == [
        *("Don", "'", "t", "@", "foo_bar", "नमस्ते", "❤️", "e\u0301a", "x²", "שָׁלוֹם"),
        *("\U0001f468\u200d", "\U0001f469", "Mül\u00adler", "می\u200cرود", "\u200c"),
    ]
    assert split_words("") == ([], [])
    assert split_words("a" * 10_000) == ([0], [10_000])


def test_a_script_without_spaces_has_the_same_words_with_spans_as_without():
    """A name that training cut out of its clause, and serving does not, is scored well and never found."""
    text = "张三在北京工作，iPhone手机か\u3099กำ 서울에서"
    starts, ends, tags = tags_from_spans(text, [Span(0, 2, "PER"), Span(3, 5, "LOC")], "here")
    assert (starts, ends) == split_words(text)
    assert tags[:6] == ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"]
    words = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    assert words == [*"张三在北京工作，", "iPhone", *"手机", "か\u3099", *"กำ", "서울에서"]


def test_any_spans_come_back_as_they_went_in():
    """An offset that slips by one points at half a name; fuzzed with marks, emoji, right-to-left and long words."""
    draw = random.Random(0)
    alphabet = [*"ab é1_-.", "e\u0301", "ש", "\u05b8", "\U0001f468", "\u200d", "\ufe0f", "\n", "नि", "\U000e0100"]
    for _ in range(500):
        text = "".join(draw.choices(alphabet, k=draw.randrange(60))) + "x" * draw.choice([0, 0, 0, 10_000])
        places = [place for place, mark in enumerate(f"{text}.") if unicodedata.category(mark)[0] != "M"]
        edges = sorted(draw.sample(places, k=min(len(places), 2 * draw.randrange(5))))
        given = [
            {"start": start, "end": end, "label": draw.choice("PQ")}
            for start, end in zip(edges[::2], edges[1::2], strict=False)
            if text[start:end].strip()
        ]
        starts, ends, tags = tags_from_spans(text, check_spans(given, len(text), "here"), "here")
        assert "".join(text[a:b] for a, b in zip(starts, ends, strict=True)) == "".join(text.split())
        names = tag_names(("P", "Q"))
        found = spans_of([names.index(tag) for tag in tags], names)
        assert [(text[starts[one.start] : ends[one.end - 1]], one.type) for one in found] == [
            (text[span["start"] : span["end"]].strip(), span["label"]) for span in given
        ]


def test_a_mark_stays_with_its_letter(read):
    """A span that ends before an accent would teach that the accent is no part of a name."""
    spans = [{"start": start, "end": end, "label": "P"} for start, end in ((0, 4), (4, 7), (10, 13))]
    found, _ = read("a.jsonl", lines({"text": "Jose\u0301s o\u0301 Ana", "spans": spans}))
    assert found == ["Jose\u0301/B-P s/B-P o\u0301/O Ana/B-P"]


NEWS = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nAnn NNP B-PER\nLee NNP I-PER\n"


def test_conll_of_several_columns(read):
    """The wrong column would be learnt, and its scores would look like any others."""
    expected = ["EU/B-ORG rejects/O", "Ann/B-PER Lee/I-PER"]
    assert read("a.conll", NEWS) == (expected, [])
    assert read("a.bio", NEWS.replace(" ", "\t").replace("\n", "\r\n"), kind="auto")[0] == expected
    chunks = NEWS.replace(" NNP", " B-NP").replace(" VBZ", " O")
    assert read("a.conll", chunks, label="2")[0] == ["EU/B-NP rejects/O", "Ann/B-NP Lee/B-NP"]
    assert read("a.conll", NEWS.replace("\n\n\n", "\n-DOCSTART- -X- O\n"))[0] == expected
    with pytest.raises(DataError, match=r"a.conll has no column '3' \(task.label\); it has 'words', '2', 'tags'"):
        read("a.conll", NEWS, kind="auto", label="3")


def test_conll_with_odd_white_space_comments_and_words_that_look_like_these(read):
    """A hash that is a word would be lost, or a comment become a sentence; words of nothing shift the tags."""
    text = "# id 7\tdomain=x\n#\tO\nÉ \tB-LOC\n\t\n \tO\na b\tO\n \u3000\tO\n\u00a0\t\n\n\tO\n\n# id 8\tdomain=x\n-\tO"
    found, notes = read("a.conll", text)
    assert found == ["#/O É/B-LOC", "a b/O", "-/O"]
    assert notes == ["FILE: 2 words of white space alone were left out."]

    text = "# id 7 x domain=x\na _ _ O\n\n# text = He flew a B-52\n# NN _ ART\nb _ _ O\n\n# 12\n# a B-52\n"
    found, _ = read("a.conll", f"#begin document (x);\n{text}# _ _ PER\n\n#end document\n\nc _ _ O")
    assert found == ["a/O", "#/B-ART b/O", "#/B-PER", "c/O"]
    assert read("a.conll", "# sent1\na B-PER\n\n# B-ART\nb O")[0] == ["a/B-PER", "#/B-ART b/O"]
    text = "#\thttp://x [2009]\n1\ta\tB-PER\tO\n2\t#\tO\tO\n\n#\thttp://y [2010]\n1\tb\tO\tO\n"
    assert read("a.conll", text, label="3")[0] == ["a/B-PER #/O", "b/O"]
    assert read("a.conll", "a\tPER\n\n#\tPER\nb\tO")[0] == ["a/B-PER", "#/B-PER b/O"]
    for tag in ("PER", "B_PER", "PER-B"):  # a tag of no prefix, or of another spelling, shows by its other words
        text = f"a {tag}\nb {tag.replace('B', 'I')}\nc O\n\n# {tag}\nd O\n\n# text\nd O"
        assert read("a.conll", text)[0][1:] == ["#/B-PER d/O", "d/O"]


def test_numbers_and_languages_are_not_the_words(read):
    """A model would learn that names stand at the fourth place of a sentence, and find none where it is served."""
    text = "# text = Ada met\n1\tAda\tADA\tB-PER\n2-3\tdid\t_\t_\n2\tmet\t_\tO\n\n1\tOslo\tOSLO\tB-LOC\n"
    expected = ["Ada/B-PER met/O", "Oslo/B-LOC"]
    assert read("a.conll", text)[0] == read("a.conll", text, text="2")[0] == expected
    assert read("a.conll", text, text="3")[0] == ["ADA/B-PER _/O", "OSLO/B-LOC"]
    with pytest.raises(DataError, match=r"a.conll, line 61: the first column counts words elsewhere"):
        read("a.conll", "1 a O\n2 b O\n\n" * 20 + "a x O\n")
    with pytest.raises(DataError, match=r"a.conll, line 61: the first column counts words elsewhere"):
        read("a.conll", "1 a O\n2 b O\n\n" * 20 + "1-2 x O\n")
    assert read("a.conll", "1 a O\n2 b O\n\n" * 20 + "3 x O\n")[0][-1] == "x/O"
    text = "en:Ada\tB-PER\nen::\tO\n"
    assert read("a.conll", text) == (["Ada/B-PER :/O"], ["FILE: every word begins with 'en:', which was left out."])
    assert read("a.conll", f"{text}de:x\tO\n") == (["en:Ada/B-PER en::/O de:x/O"], [])
    rows = (["en:Ada", "en::"], ["en:Ada", "x"], ["en:Ada", None])
    assert [join_words(row, "", coded=True).text for row in rows] == ["Ada :", "en:Ada x", "Ada"]
    assert join_words(["id:7", "id:8"], "").text == "id:7 id:8", "a student reads them as it was trained"
    for text, found in (("1 CD O\n", ["1/O"]), ("1 a O\n2 b O\n\n10 x O\n", ["1/O 2/O", "10/O"])):
        assert read("a.conll", text)[0] == found


def test_words_of_scripts_without_spaces_meet(tmp_path):
    """Training and score would see a space between all words, which no text has that is served."""
    lists = [["北", "京", "。", "A", "b", "に"], ["Oslo", "is", "オ", "スロ"], ["ประ", "เทศ"]]
    (tmp_path / "a.conll").write_text("\n".join("".join(f"{word}\tO\n" for word in words) for words in lists))
    raw = open_file(tmp_path / "a.conll", "data.train").read(("words", "tags"))
    rows = read_token_rows(raw, "words", "tags", []).to_pylist()
    assert [row["text"] for row in rows] == ["北京。 A b に", "Oslo is オスロ", "ประเทศ"]
    for row, words in zip(rows, lists, strict=True):
        assert [row["text"][start:end] for start, end in zip(row["starts"], row["ends"], strict=True)] == words


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


def test_texts_with_spans_as_other_tools_write_them(read):
    """An entity that is refused for its spelling, or read twice, or as another type because of a space."""
    rows = [{"text": "Go on", "spans": []}] * 5000  # so that the first thousands have none
    last = {"text": "Ann Lee's", "spans": [{"start": 0, "end": 7, "label": "PER"}]}
    found, notes = read("a.jsonl", lines(*rows, last), kind="auto")
    assert (found[0], found[-1], len(found), notes) == ("Go/O on/O", "Ann/B-PER Lee/I-PER '/O s/O", 5001, [])
    spans = [
        {"start": 0, "end": 3, "label": "PER "},
        {"start_offset": 0, "end_offset": 3, "type": "PER"},
        {"start": 0, "end": 3, "entity_group": "PER", "score": 0.9},
        [0, 3, "PER"],
    ]
    rows = [{"text": "Ann Lee", "entities": [span] * times} for span in spans for times in (0, 1, 2)]
    found, notes = read("a.jsonl", lines(*rows), kind="auto")
    assert (found, notes) == (["Ann/O Lee/O", *["Ann/B-PER Lee/O"] * 2] * 4, [])
    assert read("a.json", json.dumps(rows[-3:]))[0] == found[:3]


def test_types_that_begin_as_tags_keep_their_names(tmp_path):
    """`B-cell` became `cell`, and every span of it was refused as unknown."""
    spans = [[{"start": 4, "end": 8, "label": f"{kind}-cell"}] for kind in "BT" * 10]
    rows = [{"text": f"the cell {number}", "spans": own} for number, own in enumerate(spans)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    given = (None, ["B-cell", "T-cell"], ["O", "B-B-cell", "I-B-cell", "B-T-cell", "I-T-cell"])
    tasks = [load_splits(TaskConfig(label_names=names), DataConfig(train=str(file))).task for names in given]
    assert [task.label_types for task in tasks] == [("B-cell", "T-cell")] * 3


def test_offsets_that_are_not_those_of_characters(read):
    """Offsets of UTF-16, of bytes, or inclusive ones teach a model to mark all but the last letter of a name."""
    right = {"text": "🙂 Anna 10mg", "spans": [{"start": 2, "end": 6, "label": "PER"}]}
    dose = {"text": "10mg 北京市", "spans": [{"start": start, "end": start + 2, "label": "X"} for start in (0, 2, 5)]}
    wrong = right | {"spans": [{"start": 3, "end": 7, "label": "PER"}]}
    assert read("a.jsonl", lines(*[right, dose] * 10))[1] == []
    note = "FILE: {} of {} spans begin or end inside a word; are offsets characters, and ends exclusive?"
    assert read("a.jsonl", lines(*[wrong] * 9))[1] == [note.format(9, 9)]
    assert read("a.jsonl", lines(*[right, wrong] * 50))[1] == [note.format(50, 100)]
    with pytest.raises(DataError, match=r"a.jsonl: 11 of 21 spans begin or end inside a word; .* JavaScript"):
        read("a.jsonl", lines(*[right, wrong] * 10, wrong))

    # Some scripts write no spaces between words, or an ending behind a name, or an article before it.
    whole = {"東京に": (0, 2), "อยู่กรุงเทพนี้": (4, 11), "서울에서": (0, 2), "وأحمد": (1, 5), "दिल्ली में": (0, 6)}
    inside = {"أحمد هنا": (0, 3), "दिल्ली में": (0, 5), "กิ": (0, 1), "cafe\u0301": (0, 4), "Αθήνα": (0, 4)}
    for texts, cut in ((whole, 0), (inside, 1)):
        for text, (start, end) in texts.items():
            row = {"text": text, "spans": [{"start": start, "end": end, "label": "X"}]}
            assert read("a.jsonl", lines(row))[1] == [note.format(1, 1)] * cut, text


def test_other_tasks_are_not_taken_for_tokens(tmp_path):
    """A task of labels would turn into one of words because of a column's name."""
    file = tmp_path / "a.jsonl"
    for row in (
        {"text": "good", "label": ["joy", "love"]},
        {"tokens": "good", "label": "positive"},
        {"words": ["good"], "topic": "x"},
        {"text": "good", "label": "positive", "entities": [{"name": "Ada"}]},
    ):
        file.write_text(lines(row))
        assert infer_token_columns(open_file(file, "data.train"), TaskConfig()) is None, row

    # Names would be learnt where classes were meant, and nothing be said of the classes.
    file.write_text(lines({"text": "good", "label": "a", "entities": [SPAN]}))
    source = open_file(file, "data.train")
    with pytest.raises(DataError, match=r"both 'entities' .* and 'label' .* task.kind to tokens, or task.label to"):
        infer_token_columns(source, TaskConfig())
    assert infer_token_columns(source, TaskConfig(label="label")) is None
    assert infer_token_columns(source, TaskConfig(label="entities")) == ("text", "entities")
    assert infer_token_columns(source, TaskConfig(kind="tokens")) == ("text", "entities")
    assert infer_token_columns(source, TaskConfig(kind="tokens", text="text")) == ("text", "entities")


SPAN = {"start": 0, "end": 2, "label": "A"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.conll", "a x O\nb O\n\nc x O\n", "a.conll, line 2: 2 columns where 3 are expected"),
        ("a.conll", "a\tB-X\nb\t\n", "a.conll, line 2: 1 columns where 2 are expected"),
        ("a.conll", "a\tO\n\n\nb\tB-X,B-Y\n", "a.conll, line 4: the tag 'B-X,B-Y' .* is of no scheme"),
        ("a.conll", "a\tO\nb\tB-X\nc\tB_X\n", "a.conll, line 3: the tag 'B_X' .* is of no scheme"),
        ("a.conll", "O ,\nB-X a\n", "a.conll, line 1: the tag ',' .* is it the column of tags"),
        ("a.conll", "a NNP\nb VBZ\n", "a.conll, line 1: the tag 'NNP' .* is it the column of tags"),
        ("a.conll", "a\nb\n", "which columns hold words and tags"),
        ("a.conll", "\n-DOCSTART- O\n\n", "holds no words"),
        ("a.conll", b"a\tO\n\xff\tO\n", "a.conll, line 2: byte 0xFF"),
        ("a.jsonl", lines({"words": ["a", "b"], "tags": ["O"]}), "a.jsonl, row 1: 2 words, but 1 tags in 'tags'"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"words": [], "tags": []}), "a.jsonl, row 2: no words"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"words": ["a"]}), "a.jsonl, row 2: no tags in column"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"tags": ["O"]}), "a.jsonl, row 2: no words in column"),
        ("a.jsonl", lines({"words": ["a", "b", "c"], "tags": ["O", "x", "B-Y"]}), "row 1, word 2: the tag 'x'"),
        ("a.jsonl", lines({"words": ["a"], "tags": [3]}), "nothing says which is which"),
        ("a.jsonl", lines({"words": ["a"], "tags": ["O"]}, {"words": ["a", 3], "tags": ["O", "O"]}), "a.jsonl, row 2"),
        ("a.jsonl", lines({"words": ["a"], "label": [SPAN]}), "holds spans, whose offsets are those of a text"),
        ("a.jsonl", lines({"text": "ab cd", "spans": [SPAN]}, {"text": " ", "spans": []}), "a.jsonl, row 2: the text"),
        ("a.jsonl", lines({"text": "ab", "spans": [SPAN]}, {"text": "ab"}), "a.jsonl, row 2: no list of spans"),
        ("a.jsonl", lines({"text": "ab", "spans": [SPAN]}, {"text": "a", "spans": [SPAN]}), "row 2: .* leaves"),
        ("a.jsonl", lines({"text": "ab", "spans": [SPAN, SPAN | {"label": "B"}]}), "a.jsonl, row 1: .* overlap"),
        ("a.jsonl", lines({"text": "ab", "spans": [SPAN | {"start": 2}]}), "row 1: .* ends before it has begun"),
        ("a.jsonl", lines({"text": "a  b", "spans": [SPAN | {"start": 1}]}), "row 1: .* holds no word"),
        ("a.jsonl", lines({"text": "ab", "spans": [{"start": 0, "end": 2}]}), "row 1: .* is no span"),
        ("a.jsonl", lines({"text": "ab", "spans": [SPAN | {"label": " "}]}), "row 1: .* is no span"),
        ("a.jsonl", lines({"text": "ab", "spans": [{"start": False, "end": True, "label": "A"}]}), "is no span"),
        ("a.jsonl", lines({"text": "ab", "spans": ["x"]}), "holds list<.*> beside texts"),
        ("a.csv", "text,label\na,b\n", "holds string beside texts"),
        ("a.csv", "phrase,sort\na,b\n", "which columns hold words and tags"),
    ],
)
def test_bad_files_are_refused_with_place_and_remedy(read, name, content, says):
    """A row that is skipped or shifted in silence teaches the wrong tags."""
    with pytest.raises(DataError, match=says):
        read(name, content)
