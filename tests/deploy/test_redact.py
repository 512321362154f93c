"""Redaction: every form of input, other columns untouched, and nothing that passes unread."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest

from deploy_folders import TEXTS
from kdlora.deploy.redact import redact, redact_file
from kdlora.deploy.tagger import Entity, Tagger
from kdlora.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tagger(exported):
    return Tagger.load(exported("bert", "tokens"), precision="fp32")


def test_chosen_types_are_replaced_and_others_stay():
    """Prevents a placeholder in the wrong place once an earlier one has moved all that follows."""
    text = "Ada met Alan in Genève 🙂, near Ada"
    entities = [
        Entity("Ada", 0, 3, "PER", 0.9),
        Entity("Alan", 8, 12, "PER", 0.9),
        Entity("Genève", 16, 22, "LOC", 0.9),
        Entity("Ada", 31, 34, "PER", 0.9),
    ]
    assert all(text[one.start : one.end] == one.text for one in entities)
    assert redact(text, entities) == "[PER] met [PER] in [LOC] 🙂, near [PER]"
    assert redact(text, entities, {"PER": "someone"}) == "someone met someone in Genève 🙂, near someone"
    assert redact(text, entities, {"LOC": ""}) == "Ada met Alan in  🙂, near Ada"
    assert redact(text, []) == text


def test_text_csv_and_tsv_keep_their_other_columns(tagger, tmp_path):
    """Prevents a column that is lost or moved, a quote that is doubled, and bytes that are changed."""
    replaced = [redact(text, tagger.predict(text)) for text in TEXTS[:3]]
    (tmp_path / "in.txt").write_text(f"{TEXTS[0]}\r\n\n{TEXTS[1]}\n{TEXTS[2]}", encoding="utf-8", newline="")
    redact_file(tagger, tmp_path / "in.txt", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == f"{replaced[0]}\n\n{replaced[1]}\n{replaced[2]}\n"
    rows = [["nr", "body", "note"], *([str(n), text, 'a "quoted", one\nof two'] for n, text in enumerate(TEXTS[:3]))]
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    content = (tmp_path / "in.csv").read_bytes().replace(b"of two", b"of \xfftwo")
    (tmp_path / "in.csv").write_bytes(content)
    redact_file(tagger, tmp_path / "in.csv", tmp_path / "out.csv", text="body")
    written = (tmp_path / "out.csv").read_bytes()
    assert written.count(b"\xff") == 3
    found = list(csv.reader(io.StringIO(written.replace(b"\xff", b"").decode(), newline="")))
    assert found == [rows[0], *([one[0], text, one[2]] for one, text in zip(rows[1:], replaced, strict=True))]
    (tmp_path / "in.tsv").write_text(f'a\ttext\n"x\t{TEXTS[0]}\n', encoding="utf-8")
    redact_file(tagger, tmp_path / "in.tsv", tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text(encoding="utf-8") == f'a\ttext\n"x\t{replaced[0]}\n'
    (tmp_path / "head.csv").write_text("text,b\n")
    assert redact_file(tagger, tmp_path / "head.csv", tmp_path / "none.csv").rows == 0
    assert (tmp_path / "none.csv").read_text() == "text,b\n"


def test_json_lines_keep_every_value(tagger, tmp_path):
    """Prevents a key that is lost, a null that becomes a text, and half a surrogate that ends the run."""
    lines = [
        {"text": TEXTS[0], "deep": {"a": [1, 2.5, None, True]}, "odd": "\ud83d", "bell": "\x07"},
        {"text": None, "n": 1},
        {"text": "", "n": 2},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = redact_file(tagger, tmp_path / "in.jsonl", tmp_path / "out.jsonl", placeholders={"PER": "***"})
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    entities = tagger.predict(TEXTS[0])
    assert found == [lines[0] | {"text": redact(TEXTS[0], entities, {"PER": "***"})}, *lines[1:]]
    assert summary.replaced == {"PER": sum(one.label == "PER" for one in entities)}
    assert b"\x07" not in (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b'{"text": "fine"}\n{broken\n', "row 1: not JSON"),
        ("in.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', "row 1: column 'text' is empty or missing"),
        ("in.jsonl", b'{"text": ["a", "b"]}\n', "row 0: expected a text, got list"),
        ("in.txt", b"fine\ncaf\xe9\n", "row 1: the text is not valid UTF-8"),
        ("in.csv", b"text,text\na,b\n", "two columns 'text'"),
        ("in.csv", b"text,a,a\nb,c,d\n", "two columns have one name"),
        ("in.csv", b"text,a\nb\n", "1 columns where 2 are expected"),
        ("in.csv", b"body,a\nb,c\n", "Name the text column"),
        ("in.parquet", b"PAR1", "Parquet is not redacted"),
    ],
)
def test_what_cannot_be_read_is_not_passed_on(tagger, tmp_path, name, content, message):
    """Prevents a name that gets through in a row that nobody could read, and half a file that looks whole."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        redact_file(tagger, tmp_path / name, tmp_path / f"out{name[2:]}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name]


def test_mistakes_are_named(tagger, tmp_path):
    """Prevents a type that is misspelt and so stays in every text, and a source that is replaced by its redaction."""
    source = tmp_path / "in.txt"
    source.write_text(TEXTS[0])
    with pytest.raises(ConfigError, match=r"knows no type 'PERS'; it has LOC, PER\. Did you mean 'PER'"):
        redact_file(tagger, source, tmp_path / "out.txt", placeholders={"PERS": "x"})
    with pytest.raises(ConfigError, match="a line break or tab would make another row"):
        redact_file(tagger, source, tmp_path / "out.txt", placeholders={"PER": "a\nb"})
    with pytest.raises(ConfigError, match="would replace the rows that it is made from"):
        redact_file(tagger, source, source)
    assert source.read_text() == TEXTS[0]


def test_the_verbs(cli, exported, tagger, tmp_path, monkeypatch):
    """Prevents options that do nothing, a traceback for a folder of the other kind, and a stream that is left."""
    folder, source = exported("bert", "tokens"), tmp_path / "in.txt"
    source.write_text("".join(f"{text}\n" for text in TEXTS[:4]), encoding="utf-8")
    options = ("--types", "PER, LOC", "--with", "***", "--with", "PER=(name)")
    done = cli("redact", folder / "model.onnx", source, "--to", tmp_path / "out.txt", *options)
    expected = [redact(text, tagger.predict(text), {"LOC": "***", "PER": "(name)"}) for text in TEXTS[:4]]
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == expected, done.err
    counts = [sum(one.label == name for text in TEXTS[:4] for one in tagger.predict(text)) for name in ("PER", "LOC")]
    assert f"4 rows, replaced {counts[0]} PER, {counts[1]} LOC" in done.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    done = cli("redact", folder / "model.onnx", "-", *options)
    assert done.out.splitlines() == expected
    done = cli("redact", folder, source, "--to", tmp_path / "o.txt", "--types", "PER", "--with", "LOC=x", code=2)
    assert "'LOC' is none of the types to replace, PER" in done.err
    for verb, other, sentence in (
        ("redact", exported(), "marks no entities"),
        ("predict", folder, "any number of entities"),
        ("benchmark", folder, "marks entities"),
    ):
        more = {"predict": ("--to", tmp_path / "o.csv"), "benchmark": (exported(), "--cascade", "--data", source)}
        arguments = (other, source) if verb != "benchmark" else (other,)
        done = cli(verb, *arguments, *more.get(verb, ()), code=2)
        assert sentence in done.err
