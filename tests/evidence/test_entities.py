"""Counts of entities, and the metrics that follow from them."""

import numpy as np
import pytest

from kdlora.data.tags import tag_names
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError
from kdlora.evidence.entities import entity_counts, entity_rates, weighted_entities
from kdlora.evidence.metrics import compute_metrics, metric_names, predict_labels, score
from kdlora.evidence.stats import PairedArms, contrast

TYPES = ("LOC", "ORG", "PER")
NAMES = tag_names(TYPES)


def entities(row):
    """List a row's entities as (first, last, type), word by word, as the strict mode of seqeval does for IOB2."""
    found, begun, kind = [], None, ""
    for place, tag in enumerate([*row, "O"]):
        if begun is not None and tag != f"I-{kind}":
            found.append((begun, place - 1, kind))
            begun = None
        if tag.startswith("B-"):
            begun, kind = place, tag[2:]
    return set(found)


def count(predicted, wanted):
    """Count the entities of some rows of tags."""
    flat = [np.array([NAMES.index(tag) for row in rows for tag in row], np.int64) for rows in (predicted, wanted)]
    return entity_counts(*flat, NAMES, np.cumsum([0, *map(len, wanted)]))


def drawn_rows(seed, rows=40):
    """Draw rows of any tags, strays included, and rows that differ from them here and there."""
    draw = np.random.default_rng(seed)
    wanted = [draw.choice(NAMES, draw.integers(0, 12), p=[0.3, *[0.7 / 6] * 6]).tolist() for _ in range(rows)]
    predicted = [[tag if draw.random() < 0.8 else str(draw.choice(NAMES)) for tag in row] for row in wanted]
    return predicted, wanted


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_sets_of_entities(seed):
    """A boundary or a type that is half right would count; a stray I- would be an entity."""
    predicted, wanted = drawn_rows(seed)
    found = count(predicted, wanted)
    for row, (said, true) in enumerate(zip(predicted, wanted, strict=True)):
        for column, name in enumerate(TYPES):
            sets = [{one for one in entities(tags) if one[2] == name} for tags in (said, true)]
            assert found[row, column].tolist() == [len(sets[0] & sets[1]), len(sets[0]), len(sets[1])]


def test_words_without_a_label_are_in_neither():
    """A prediction on a word that nobody labelled would count as wrong."""
    wanted = np.array([-100, 5, 6, -100, 0, -100])
    predicted = np.array([1, 5, 6, 3, 0, 1])
    found = entity_counts(predicted, wanted, NAMES, np.array([0, 4, 6]))
    assert found.sum(axis=0).tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert found[1].sum() == 0

    # An empty row that vanishes shifts all rows after it, and pairs each with a stranger in the bootstrap.
    found = count([[], ["B-LOC"], []], [[], ["B-LOC"], []])
    assert found[:, 0, 0].tolist() == [0, 1, 0]


METRICS = ("entity_f1", "entity_precision", "entity_recall", "macro_entity_f1", "recall:PER")


@pytest.mark.parametrize("name", METRICS)
def test_draws_in_closed_form_are_those_of_rows_written_out(name):
    """An interval of a mean of the rows' F1 would be plausible, and about another figure."""
    predicted, wanted = drawn_rows(3)
    draws = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=15)
    closed = weighted_entities(name, count(predicted, wanted), TYPES)(draws.astype(float))
    for times, value in zip(draws, closed, strict=True):
        rows = np.repeat(np.arange(40), times)
        written = count([predicted[row] for row in rows], [wanted[row] for row in rows])
        precision, recall, f1 = entity_rates(written.sum(axis=(0, 1)))
        by_type = written.sum(axis=0)
        occurring = by_type[by_type[:, 1:].sum(axis=1) > 0]
        expected = {
            "entity_f1": f1,
            "entity_precision": precision,
            "entity_recall": recall,
            "macro_entity_f1": np.mean([2 * right / (said + true) for right, said, true in occurring]),
            "recall:PER": by_type[2, 0] / by_type[2, 2],
        }[name]
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_predicted_and_nothing_wanted_is_0(name):
    """NaN makes the best epoch a lottery."""
    assert weighted_entities(name, np.zeros((2, 3, 3), np.int64), TYPES)(np.ones((1, 2))).tolist() == [0.0]


TASK = Task("tokens", ("words",), ("tags",), NAMES, ("entity_f1",))


def as_logits(rows):
    """Give logits that say these tags."""
    return np.eye(len(NAMES))[[NAMES.index(tag) for row in rows for tag in row]].astype(np.float32)


def as_arrays(predicted, wanted):
    """Give logits, labels and offsets."""
    labels = np.array([NAMES.index(tag) for row in wanted for tag in row])
    return as_logits(predicted), labels, np.cumsum([0, *map(len, wanted)])


def test_metrics_of_a_task_are_those_of_its_words():
    """A metric by rows of words would be an accuracy, which `O` alone makes high."""
    logits, labels, offsets = as_arrays([["B-PER", "I-LOC", "O"], ["O"]], [["B-PER", "B-LOC", "O"], ["B-ORG"]])
    found = compute_metrics(TASK, logits, labels, offsets=offsets)
    assert set(found) == set(metric_names(TASK))
    assert found["entity_precision"] == 1.0  # the stray I-LOC begins an entity
    assert found["entity_recall"] == pytest.approx(2 / 3)
    assert score(TASK, found) == pytest.approx(80.0)
    assert predict_labels(TASK, logits, offsets).tolist() == [5, 1, 0, 0]

    # NaN of a diverged training would be read as words beyond the window, and score 0 without a word.
    logits, labels, offsets = as_arrays([["B-PER", "B-LOC"]], [["B-PER", "B-LOC"]])
    logits[1] = np.nan
    assert compute_metrics(TASK, logits, labels, offsets=offsets)["entity_recall"] == 0.5
    logits[0, 2] = np.nan
    with pytest.raises(ArtifactError, match="diverged"):
        compute_metrics(TASK, logits, labels, offsets=offsets)
    with pytest.raises(ArtifactError, match="diverged"):
        compute_metrics(TASK, np.full_like(logits, np.nan), labels, offsets=offsets)


def test_arms_are_contrasted_over_rows_and_not_over_words():
    """Words of one sentence are not independent: an interval over them is too narrow, and speaks of no example."""
    runs = [drawn_rows(seed, rows=60) for seed in (5, 6)]
    wanted = runs[0][1]
    worse = [[tag if place % 3 else "O" for place, tag in enumerate(row)] for row in wanted]
    logits, labels, offsets = as_arrays(runs[0][0], wanted)
    pair = PairedArms(TASK, labels, [logits], [as_logits(worse)], offsets=offsets)
    found = contrast([pair], draws=400)
    first, second = (compute_metrics(TASK, one, labels, offsets=offsets) for one in (logits, as_logits(worse)))
    assert found.difference == pytest.approx(100 * (first["entity_f1"] - second["entity_f1"]))
    assert found.n_examples == 60
    draw, differences = np.random.default_rng(4), []
    for _ in range(300):
        rows = draw.integers(0, 60, 60)
        f1 = [
            entity_rates(count([said[row] for row in rows], [wanted[row] for row in rows]).sum(axis=(0, 1)))[2]
            for said in (runs[0][0], worse)
        ]
        differences.append(100 * (f1[0] - f1[1]))
    assert (found.high - found.low) / 4 == pytest.approx(np.std(differences), rel=0.2)
