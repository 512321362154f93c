"""The tagger: entities that are where they say, in every text, by every file; and what redaction puts there."""

import csv
import io
import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from deploy_folders import TEXTS, build_classifier
from experiments import edit_json
from kdlora.data.batches import WordCollator
from kdlora.data.tags import Words, decode, split_words
from kdlora.data.tasks import Task
from kdlora.deploy.calibrate import save_temperature
from kdlora.deploy.export import ParityError, export_onnx
from kdlora.deploy.gates import LabelledTexts, count_spans
from kdlora.deploy.predict import MOST_CHARACTERS
from kdlora.deploy.redact import redact, redact_file
from kdlora.deploy.stream import predict_file
from kdlora.deploy.tagger import Entity, Tagger, word_offsets
from kdlora.errors import ConfigError, DataError, ModelError
from sentences import fuzzed_texts

NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
TASK = Task("tokens", ("text",), ("tags",), NAMES, ("entity_f1",))


def places(entities):
    """Leave the scores out."""
    return [(entity.start, entity.end, entity.label) for entity in entities]


@pytest.fixture(scope="module")
def tagger(exported):
    return Tagger.load(exported("bert", "tokens"), precision="fp32")


@pytest.fixture(scope="module")
def labelled(tagger):
    """Texts that the model itself has labelled, and the task."""
    texts = [Words(text, *split_words(text)) for text in TEXTS]
    return LabelledTexts(texts, decode(tagger.predict_logits(texts), word_offsets(texts)), TASK)


def test_offsets_point_at_the_text_they_claim(tagger, tmp_path):
    """Prevents offsets into normalised text, in bytes or UTF-16: a redaction that leaves half a name, everywhere."""
    texts = fuzzed_texts()
    found = tagger.predict(texts)
    assert sum(map(len, found)) > 1000
    for text, entities in zip(texts, found, strict=True):
        assert [entity.text for entity in entities] == [text[entity.start : entity.end] for entity in entities]
        edges = [edge for entity in entities for edge in (entity.start, entity.end)]
        assert edges == sorted(edges)
        assert all(entity.text == entity.text.strip() and 0 <= entity.score <= 1.0001 for entity in entities)
        rest = redact(text, entities, {"LOC": "", "PER": ""})
        assert len(rest) == len(text) - sum(len(entity.text) for entity in entities)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    done: list[tuple[int, float | None]] = []  # `kdlora redact` draws its bar by them
    summary = redact_file(tagger, source, tmp_path / "out.jsonl", progress=lambda *now: done.append(now))
    assert done[-1] == (summary.rows, 1.0)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["n"] for row in rows] == list(range(len(texts)))
    assert [row["text"] for row in rows] == [redact(*pair) for pair in zip(texts, found, strict=True)]
    assert sum(summary.replaced.values()) == sum(map(len, found))


def test_backends_and_batches_agree(exported, classifier_folder, tagger):
    """Prevents a graph, or a padded batch, that reads other words than the model alone does."""
    reference, texts = Tagger.load(classifier_folder("bert", "tokens")), fuzzed_texts(60)
    expected = reference.predict_logits(texts)
    np.testing.assert_allclose(tagger.predict_logits(texts), expected, atol=1e-4)
    one_by_one = np.concatenate([tagger.predict_logits([text], batch_size=1) for text in texts])
    np.testing.assert_allclose(one_by_one, expected, atol=1e-4)
    assert tagger.predict(texts[20]) == tagger.predict([texts[20]])[0]
    assert tagger.predict([]) == []
    assert tagger.predict("") == []


def test_one_window_or_many_give_the_same(tmp_path):
    """Prevents words that are read at the edge of a window, twice, or not at all."""
    folder = build_classifier("bert", tmp_path / "model", kind="tokens")
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    with torch.no_grad():  # a token's logits depend on it alone, so a window changes nothing but what is read
        model.bert.embeddings.position_embeddings.weight.zero_()
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    model.save_pretrained(folder)
    text = " ".join(TEXTS[:5])
    whole = Tagger.load(folder)
    assert len(whole._windows([Words(text, *split_words(text))])) == 1
    expected = whole.predict(text)
    assert len(expected) > 5
    for length in (3, 7, 24, 40):
        cut = Tagger.load(folder, max_length=length)
        assert len(cut._windows([Words(text, *split_words(text))])) > 1
        found = cut.predict(text)
        assert places(found) == places(expected)
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)


def test_words_that_share_a_token_go_on(exported, classifier_folder, tagger):
    """Prevents an entity for each character, where a tokenizer joins the characters of a Chinese name."""
    text = next(text for text in TEXTS if tagger.predict(text))
    tokens = {start: end for start, end in next(iter(tagger.encode([text]))).offsets if end > start + 1}
    parts = [edge for word in zip(*split_words(text), strict=True) for edge in _halves(*word, tokens)]
    halves = Words(text, *map(list, zip(*parts, strict=True)))
    assert len(parts) > len(split_words(text)[0])
    for model in (tagger, Tagger.load(classifier_folder("bert", "tokens"))):
        whole, cut = model.predict(text), model.predict([halves])[0]
        assert places(cut) == places(whole) != []


def _build_tagger(folder, tag):
    """Save a tagger that gives every word one tag."""
    build_classifier("bert", folder, kind="tokens")
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([9.0 * (name == tag) for name in NAMES]))
    model.save_pretrained(folder)
    return folder


def test_a_sign_that_nobody_sees_tears_no_name(tmp_path):
    """A word that the tokenizer drops was outside, so that half of a name could stay unredacted."""
    tagger = Tagger.load(_build_tagger(tmp_path / "model", "I-LOC"))
    for text in ("Xq\u200cYq", "Xq \u200bYq"):
        (entity,) = tagger.predict(text)
        assert (entity.text, entity.label) == (text, "LOC")
        assert 0.99 < entity.score <= 1.0001


def test_a_symbol_beside_a_name_is_outside(tmp_path):
    """BERT reads `Anna♥` as one unknown word: the name had the symbol's tag, or went on with it."""
    folder = _build_tagger(tmp_path / "model", "B-LOC")
    tagger = Tagger.load(folder)
    found = [[one.text for one in tagger.predict(text)] for text in ("Xq♥", "♥Xq", "Xq♥Yq")]
    assert found == [["Xq"], ["Xq"], ["Xq", "Yq"]]
    row = {"id": "a", "text": "♥Xq", "starts": [0, 1], "ends": [1, 3], "label": [0, 1]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert WordCollator(tokenizer, max_length=16)([row])["labels"].tolist() == [1], "the name is what is learnt"


def _halves(start, end, tokens):
    """Cut a word within its first sub-token."""
    return [(start, start + 1), (start + 1, end)] if start in tokens else [(start, end)]


def test_score_is_the_probability_of_the_type(exported, tmp_path):
    """Prevents the score of one tag of a span, and a temperature that is stored and never applied."""
    folder = shutil.copytree(exported("bert", "tokens"), tmp_path / "model")
    first = Tagger.load(folder, precision="fp32").predict(TEXTS[0])[0]
    save_temperature(folder, 3.0)
    model = Tagger.load(folder, precision="fp32", verify=False)
    entity = model.predict(TEXTS[0])[0]
    starts, ends = split_words(TEXTS[0])
    logits = model.predict_logits([TEXTS[0]])[starts.index(entity.start) : ends.index(entity.end) + 1] / 3.0
    table = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    column = NAMES.index(f"B-{entity.label}")
    assert entity.score == pytest.approx(table[:, column : column + 2].sum(axis=1).mean(), abs=1e-6)
    assert (entity.start, entity.end) == (first.start, first.end)
    assert entity.score < first.score


def test_labels_in_another_order_and_in_none(classifier_folder, tmp_path):
    """Prevents entities of the wrong type by a model of somebody else, and a scheme that is misread."""
    folder = shutil.copytree(classifier_folder("bert", "tokens"), tmp_path / "model")
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    order = [4, 2, 0, 1, 3]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order])
        model.classifier.bias.copy_(model.classifier.bias[order])
    model.config.id2label = {place: NAMES[column] for place, column in enumerate(order)}
    model.config.label2id = {name: place for place, name in model.config.id2label.items()}
    model.save_pretrained(folder)
    expected = Tagger.load(classifier_folder("bert", "tokens")).predict(TEXTS)
    found = Tagger.load(folder).predict(TEXTS)
    assert list(map(places, found)) == list(map(places, expected))
    with pytest.raises(ModelError, match=r"labels O, B-X, I-X, B-Y, I-Y in this order"):
        export_onnx(folder, tmp_path / "out", texts=TEXTS)
    edit_json(folder / "config.json", id2label={str(column): f"LABEL_{column}" for column in range(5)})
    with pytest.raises(ModelError, match=r"expected the labels O, and B-TYPE and I-TYPE"):
        Tagger.load(folder)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fine", ("one", "two")], "text 1: expected a text, got tuple"),
        (["x" * (MOST_CHARACTERS + 1)], "1,048,577 characters, more than 1,048,576 in one text. Split it"),
        ([Words("two words", [0, 4], [5, 9])], "words that follow each other within the text"),
        ([Words("Ada met", [0, 4], [3])], "words that follow each other within the text"),
        ([Words("two", [0], [4])], "words that follow each other within the text"),
    ],
)
def test_bad_texts_are_named(tagger, texts, message):
    """Prevents entities of what is no text, and a machine that runs out of memory."""
    with pytest.raises(DataError, match=message):
        tagger.predict(texts)


@pytest.mark.usefixtures("traced_once")
def test_gates_on_entities_and_on_recall(tmp_path, classifier_folder, labelled):
    """Prevents an int8 file whose entities were never compared, and a type that is lost without a word."""
    folder, wide = classifier_folder("bert", "tokens"), {"min_agreement": 0.0, "max_metric_drop": 100}
    result = export_onnx(folder, tmp_path / "a", texts=labelled, min_recall={"per": 0.2}, **wide)
    first, second, int8 = result.stages
    assert (first.score, second.score, first.agreement) == (100, 100, 1)
    assert first.recall == second.recall == {"PER": 1.0}
    assert int8.rows == len(TEXTS)
    right, wanted, marked = count_spans(labelled, Tagger.load(folder))
    assert right == wanted == marked
    assert marked.total() > 20
    assert int8.drop == pytest.approx(100 - int8.score)
    assert int8.drop_low <= int8.drop <= int8.drop_high
    assert 0.2 <= int8.recall["PER"] <= 1
    record = json.loads((tmp_path / "a" / "kdlora_export.json").read_text())
    assert record["stages"][2]["recall"] == int8.recall
    with pytest.raises(ParityError, match=r"\d+ of \d+ PER are found, \d+\.\d\d% and not 100\.00%"):
        export_onnx(folder, tmp_path / "b", texts=labelled, min_recall={"PER": 1.0}, **wide)
    assert (tmp_path / "b" / "model.onnx").is_file()
    assert not (tmp_path / "b" / "model_quantized.onnx").exists()


def test_a_recall_that_the_model_lacks_exports_nothing(tmp_path, classifier_folder, labelled):
    """Prevents a folder beside a config that promises more than the model can do."""
    folder = classifier_folder("bert", "tokens")
    wrong = np.where(labelled.labels == 3, 1, labelled.labels)  # LOC where the model says PER
    given = LabelledTexts(labelled.texts, wrong, TASK)
    with pytest.raises(ModelError, match=r"not exported, .* min_recall asks \d+ of \d+ LOC are found, .* not 99\.00%"):
        export_onnx(folder, tmp_path / "out", texts=given, min_recall={"LOC": 0.99})
    joined = [text.replace(" ", "-") for text in TEXTS]  # words of a file that nobody will tell the tagger
    texts = [Words(text, [0], [len(text)]) for text in joined]
    tags = decode(Tagger.load(folder).predict_logits(texts), word_offsets(texts))
    with pytest.raises(ModelError, match=r"min_recall asks 0 of \d+ PER are found"):
        export_onnx(folder, tmp_path / "out", texts=LabelledTexts(texts, tags, TASK), min_recall={"PER": 0.5})
    with pytest.raises(ConfigError, match=r"min_recall: 'LOK' is no label of the task \(LOC, PER\)"):
        export_onnx(folder, tmp_path / "out", texts=labelled, min_recall={"LOK": 0.9})
    with pytest.raises(DataError, match="wants validation texts with labelled words"):
        export_onnx(folder, tmp_path / "out", texts=TEXTS, min_recall={"LOC": 0.9})
    with pytest.raises(DataError, match="one label a word, got 3 labels for 5 words"):
        LabelledTexts([Words("a b c d e", range(0, 9, 2), range(1, 10, 2))], [0, 0, 0], TASK)
    assert not (tmp_path / "out").exists()


def test_predict_writes_entities(tagger, tmp_path):
    """Prevents entities of another row, and a table that has room for one of them."""
    source = tmp_path / "in.jsonl"
    given = [{"id": "a", "text": TEXTS[0]}, {"id": "b", "text": ""}, {"id": "c", "text": None}, {"id": "d"}]
    given.append({"text": TEXTS[1]})
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    summary = predict_file(tagger, source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (summary.rows, summary.errors) == (5, 1)
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", ""]
    assert rows[1]["entities"] == rows[2]["entities"] == []
    assert "column 'text' is empty or missing" in rows[3]["error"]
    for row, text in ((rows[0], TEXTS[0]), (rows[4], TEXTS[1])):
        expected = tagger.predict(text)
        assert [one["text"] for one in row["entities"]] == [one.text for one in expected]
        assert set(row["entities"][0]) == {"text", "start", "end", "label", "score"}
        assert set(row) == {"id", "entities"}
    with pytest.raises(DataError, match=r"any number of entities; name a \.jsonl file"):
        predict_file(tagger, source, tmp_path / "out.csv")
    with pytest.raises(DataError, match="trained on single texts, got the text 'text' and 'id'"):
        predict_file(tagger, source, tmp_path / "out.jsonl", text=("text", "id"))


@pytest.mark.parametrize("suffix", [".conll", ".jsonl"])
def test_entities_of_words_come_with_their_text(tagger, tmp_path, suffix):
    """Prevents places in a text that is in no file."""
    lists, source = [text.split() for text in TEXTS[:5]], tmp_path / f"in{suffix}"
    if suffix == ".conll":
        source.write_text("\n".join("".join(f"{word}\tO\n" for word in words) for words in lists))
    else:
        source.write_text("".join(json.dumps({"words": words}) + "\n" for words in lists))
    predict_file(tagger, source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [" ".join(words) for words in lists]
    entities = [(row["text"], one) for row in rows for one in row["entities"]]
    assert len(entities) > 5
    assert all(text[one["start"] : one["end"]] == one["text"] for text, one in entities)


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


def test_entities_of_several_models_hide_all_that_they_cover():
    """Entities in another order, or one in another, gave names back in clear."""
    names = [
        Entity("Alan", 14, 18, "PER", 0.9),
        Entity("Ada", 0, 3, "NAME", 0.9),
        Entity("Ada Smith", 0, 9, "PER", 0.9),
    ]
    assert redact("Ada Smith met Alan", names) == "[PER] met [PER]"
    assert redact("Ada Smith met Alan", [names[1], Entity("a Smith", 2, 9, "PER", 0.9)]) == "[NAME] met Alan"


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
    with pytest.raises(DataError, match=r"out\.jsonl: what is redacted stays tsv"):
        redact_file(tagger, tmp_path / "in.tsv", tmp_path / "out.jsonl")
    (tmp_path / "head.csv").write_text("text,b\n")
    assert redact_file(tagger, tmp_path / "head.csv", tmp_path / "none.csv").rows == 0
    assert (tmp_path / "none.csv").read_text() == "text,b\n"


def test_a_count_of_words_is_no_text(classifier_folder, tmp_path):
    """Of a model that learnt from a column `tokens`, a CSV's counts were redacted, and its texts passed on in clear."""
    folder = shutil.copytree(classifier_folder("bert", "tokens"), tmp_path / "model")
    edit_json(folder / "config.json", kdlora_task=replace(TASK, text=("tokens",)).to_dict())
    tagger = Tagger.load(folder)
    text = next(text for text in TEXTS if tagger.predict(text))
    (tmp_path / "in.csv").write_text(f'id,text,tokens\n7,"{text}",153\n')
    redact_file(tagger, tmp_path / "in.csv", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["7", redact(text, tagger.predict(text)), "153"]
    predict_file(tagger, tmp_path / "in.csv", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["entities"]
    (tmp_path / "in.csv").write_text(f'id,body,tokens\n7,"{text}",153\n')
    with pytest.raises(DataError, match="Name the text column"):
        redact_file(tagger, tmp_path / "in.csv", tmp_path / "out.csv")


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
    # float64 rounds these, or takes them for infinite, which is no JSON.
    numbers = '{"text": "", "n": [0.12345678901234567890123, 1E+400, 1.10, 12345678901234567890, -7]}\n'
    (tmp_path / "in.jsonl").write_text(numbers)
    redact_file(tagger, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == numbers


def test_lists_of_words_in_csv_are_no_texts(tagger, tmp_path):
    """A cell of a list is a text to CSV: entities were marked among its brackets and quotes, with a warning at most."""
    (tmp_path / "in.csv").write_text('id,words\n7,"[""Ada"", ""met""]"\n')
    with pytest.raises(DataError, match="Lists of words are read from JSON Lines and Parquet alone"):
        predict_file(tagger, tmp_path / "in.csv", tmp_path / "out.jsonl")


def test_a_notebook_shows_what_is_written(tagger, tmp_path, monkeypatch):
    """Its output takes text alone, and ended both after some rows; under pythonw there is no input to begin with."""
    (tmp_path / "in.txt").write_text(TEXTS[0])
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    redact_file(tagger, tmp_path / "in.txt")
    predict_file(tagger, tmp_path / "in.txt")
    redacted, predicted = sys.stdout.getvalue().splitlines()
    assert redacted == redact(TEXTS[0], tagger.predict(TEXTS[0]))
    assert json.loads(predicted)["id"] == "0"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b'{"text": "fine"}\n{broken\n', "row 2: not JSON"),
        ("in.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', "row 2: column 'text' is empty or missing"),
        ("in.jsonl", b'{"text": ["a", "b"]}\n', "row 1: expected a text, got list"),
        ("in.txt", b"fine\ncaf\xe9\n", "row 2: the text is not valid UTF-8"),
        ("in.csv", b"text,text\na,b\n", "two columns 'text'"),
        ("in.csv", b"text,a,a\nb,c,d\n", "two columns 'a'"),
        ("in.csv", b"text,a\nb\n", "1 columns where 2 are expected"),
        ("in.csv", b"body,a\nb,c\n", "Name the text column"),
        ("in.csv", b"Ada lives in Oslo\nAlan too\n", "Name the text column"),  # no header
        ("in.jsonl", b'{"a": "Hi"}\n{"a": "Hi", "text": "Ada"}\n', "row 1: column 'text' is empty or missing"),
        ("in.parquet", b"PAR1", "a parquet file is not redacted"),
    ],
)
def test_what_cannot_be_read_is_not_passed_on(tagger, tmp_path, name, content, message):
    """Prevents a name that gets through in a row that nobody could read, and half a file that looks whole."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        redact_file(tagger, tmp_path / name, tmp_path / f"out{name[2:]}")
    assert ".. " not in str(caught.value)
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
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ConfigError, match="is a folder, a pipe or a device; name a file with --to"):
            redact_file(tagger, source, tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
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
    rows = "".join(f"{json.dumps({'id': name, 'text': text})}\n" for name, text in zip("abcd", TEXTS, strict=False))
    for verb in ("redact", "predict"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.encode())))
        done = cli(verb, folder, "-", "--input-format", "jsonl")
        assert [json.loads(line)["id"] for line in done.out.splitlines()] == [*"abcd"], "not the lines themselves"
    done = cli("redact", folder, source, "--to", tmp_path / "o.txt", "--types", "PER", "--with", "LOC=x", code=2)
    assert "'LOC' is none of the types to replace, PER" in done.err
    for sentence, *arguments in (
        ("marks no entities", "redact", exported(), source),
        ("any number of entities", "predict", folder, source, "--to", tmp_path / "o.csv"),
        ("marks entities", "benchmark", folder, exported(), "--cascade", "--data", source),
    ):
        assert sentence in cli(*arguments, code=2).err
