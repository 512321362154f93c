"""The report of a task of tokens: types, what becomes of entities, and sentences with their spans marked."""

import re
from html import unescape

import numpy as np
import pytest

from fabricate import NAMES, make_experiment
from kdlora.data.tags import spans_of, tag_names
from kdlora.data.tasks import Task
from kdlora.evidence.entities import counts_from_logits, entity_rates
from kdlora.evidence.predictions import read_examples, read_predictions
from kdlora.evidence.records import read_record
from kdlora.report.card import card_metadata, student_card
from kdlora.report.outputs import OUTCOMES, outcomes
from kdlora.report.report import make_report

HOSTILE = ("<script>alert(1)</script> of <b>Rome</b>", "a|b\nc", "`*_[x](javascript:alert(3))", "שלום 👨‍👩‍👧 e\u0301")
TYPED = Task("tokens", ("words",), ("tags",), tag_names(("<i>x</i>", "PER|*a*")), ("entity_f1",))


def follow(predicted, wanted):
    """Follow the entities of one row of tags."""
    names = NAMES.label_names
    tags, labels = (np.array([names.index(tag) for tag in row.split()]) for row in (predicted, wanted))
    return outcomes(NAMES, tags, labels, np.array([0, len(labels)]))


@pytest.mark.parametrize(
    ("predicted", "outcome", "invented"),
    [
        ("B-PER I-PER O O", "right", 0),
        ("B-LOC I-LOC O O", "other type", 0),
        ("B-PER O O O", "other edges", 0),
        ("B-PER I-PER I-PER O", "other edges", 0),
        ("B-LOC O O O", "both", 0),
        ("B-LOC B-PER O O", "other edges", 0),  # that of the same type counts
        ("O O O O", "missed", 0),
        ("O O B-LOC B-PER", "missed", 2),
        ("B-PER I-PER O B-PER", "right", 1),
    ],
)
def test_what_becomes_of_an_entity(predicted, outcome, invented):
    """An error of the edge that is shown as one of the type sends its reader to the wrong labels."""
    found, taken, added = follow(predicted, "B-PER I-PER O O")
    assert found[NAMES.label_types.index("PER")].tolist() == [int(name == outcome) for name in OUTCOMES]
    assert (found.sum(), added.sum()) == (1, invented)
    assert taken.sum() == (outcome != "missed")


def test_rows_and_words_without_labels_are_kept_apart():
    """An entity at the end of a row would be met by one at the beginning of the next."""
    names = NAMES.label_names
    labels = np.array([names.index("B-PER"), -100, names.index("B-LOC"), 0])
    tags = np.array([0, names.index("B-PER"), names.index("B-LOC"), names.index("I-LOC")])
    found, _, invented = outcomes(NAMES, tags, labels, np.array([0, 2, 4]))
    by_type = {kind: found[place].tolist() for place, kind in enumerate(NAMES.label_types)}
    assert by_type["PER"] == [0, 0, 0, 0, 1]
    assert by_type["LOC"] == [0, 0, 1, 0, 0]
    assert invented.sum() == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A report of three arms, and the folder."""
    layout = make_experiment(tmp_path_factory.mktemp("spans") / "names", task=NAMES, rows=80)
    return layout, make_report(layout.root, draws=100)


def test_the_answer_is_in_entity_f1_and_every_type_has_its_figures(told):
    """An accuracy of words would be near 90% for a model that finds no name."""
    layout, report = told
    assert "entity F1 on validation, 3 seeds" in report.markdown
    runs = [read_predictions(layout.run("kd-lora", seed).predictions) for seed in range(3)]
    for place, name in enumerate(NAMES.label_types):
        counts = [counts_from_logits(one.label_names, one.logits, one.labels, one.offsets).sum(axis=0) for one in runs]
        figures = [" ± ".join(f"{figure:.1f}" for figure in (100 * np.mean(one), 100 * np.std(one, ddof=1)))
                   for one in zip(*(entity_rates(seed[place]) for seed in counts), strict=True)]  # fmt: skip
        row = f"| {name} | KD-LoRA | {counts[0][place, 2]} | {' | '.join(figures)} |"
        assert row in report.markdown.replace("\u00a0", " ")
    assert "What becomes of entities, by KD-LoRA" in report.markdown


def test_marked_sentences_are_those_of_the_predictions(told):
    """Marks that slip by a word accuse a model, or a label, of what it never said."""
    layout, report = told
    examples = read_examples(layout.examples)
    quoted = re.findall(r'<li class="wide">(.*?)</li>', report.html, re.DOTALL)
    assert len(quoted) == 8
    teacher = read_predictions(layout.run("fft", 0).predictions)
    for quotation in quoted:
        identity = re.search(r"<dt>id</dt><dd>(\d+)</dd>", quotation)[1]
        example, row = examples["validation", identity], teacher.ids.index(identity)
        lines = dict(re.findall(r'<p class="marked (\w+)"><span class="who">\w+</span>(.*?)</p>', quotation))
        assert list(lines) == ["label", "teacher", "student"]
        for line in lines.values():
            text = re.sub(r"<small>.*?</small>", "", line)
            assert unescape(re.sub(r"</?mark>", "", text)) == example.text
        own = teacher.labels[teacher.offsets[row] : teacher.offsets[row + 1]]
        expected = [
            (example.text[example.starts[one.start] : example.ends[one.end - 1]], f" {one.type}")
            for one in spans_of(own, NAMES.label_names)
        ]
        found = re.findall(r"<mark>(.*?)<small>(.*?)</small></mark>", lines["label"])
        assert [(unescape(text), kind) for text, kind in found] == expected
        listed = ", ".join(f"{text} ({kind.strip()})" for text, kind in expected)
        assert f"  - label: {listed}" in report.markdown


def test_texts_and_types_are_escaped(tmp_path):
    """A text of a stranger that runs in the reader's browser."""
    layout = make_experiment(tmp_path / "hostile", task=TYPED, rows=40, texts=HOSTILE)
    report = make_report(layout.root, draws=50)
    assert "<script>alert" not in report.html
    assert "<b>Rome" not in report.html
    assert "<i>x" not in report.html
    assert "<small> &lt;i&gt;x&lt;/i&gt;</small>" in report.html
    assert "<script>" not in report.markdown
    assert r"PER\|\*a\*" in report.markdown


def test_long_texts_are_quoted_from_before_the_first_difference(tmp_path):
    """The beginning of a long text, on which both agree, would be shown as a disagreement."""
    layout = make_experiment(tmp_path / "long", task=NAMES, rows=3, texts=("word " * 400,), arms=("fft", "kd-lora"))
    report = make_report(layout.root, draws=50)
    lines = re.findall(r'<p class="marked \w+">.*?</p>', report.html)
    assert lines
    assert all(len(re.sub(r"<.*?>", "", line)) < 1500 for line in lines)


def test_the_card_has_the_figures_of_every_type(told):
    """One figure over all types hides that a model misses every address."""
    record = read_record(told[0].run("kd-lora", 1).record)
    card = student_card(record)
    for name in NAMES.label_types:
        figures = " | ".join(f"{record.metrics[f'{what}:{name}']:.4f}" for what in ("precision", "recall", "f1"))
        assert f"| {name} | {figures} |" in card
    results = card_metadata(record)["model-index"][0]["results"][0]
    assert results["task"]["type"] == "token-classification"
    assert {"type": "recall", "name": "recall:PER", "value": round(record.metrics["recall:PER"], 4)} in results[
        "metrics"
    ]
