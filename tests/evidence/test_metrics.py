"""Metrics beside those of scikit-learn and SciPy, and counts of entities."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from fabricate import BINARY, MNLI, PAIRS, SIMILARITY, TAGS, TOPICS, make_labels, make_logits
from kdlora.data.tags import tag_names
from kdlora.data.tasks import Task, full_metric
from kdlora.errors import ArtifactError, ConfigError
from kdlora.evidence.metrics import compute_metrics, metric_names, predict_labels, probabilities, score
from kdlora.evidence.ranking import entity_counts, entity_rates, weighted_entities
from kdlora.evidence.stats import PairedArms, contrast

COLA = Task("single-label", ("text",), ("label",), ("unacceptable", "acceptable"), ("matthews",), "cola")


def test_scores_ties_and_groups():
    """An extra metric that leaks into the score would change every GLUE figure."""
    assert score(PAIRS, {"accuracy": 0.8, "f1": 0.9, "macro_f1": 0.1}) == pytest.approx(85.0)
    assert metric_names(TOPICS) == ("macro_f1", "accuracy")

    # A tie that depends on the platform would make runs differ.
    assert predict_labels(TOPICS, np.zeros((2, 4))).tolist() == [0, 0]
    assert predict_labels(TAGS, np.zeros((1, 3))).tolist() == [[0, 0, 0]]

    # Scikit-learn takes one column for a binary task, where micro F1 is accuracy.
    task = Task("multi-label", ("text",), ("spam",), ("spam",), ("micro_f1",))
    found = compute_metrics(task, np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.array([[1], [0], [0], [0]]))
    assert found["micro_f1"] == pytest.approx(2 / 3)

    # MNLI's score is the mean of two accuracies, not the accuracy of the pooled rows.
    found = compute_metrics(MNLI, np.eye(3)[[0] * 4], np.array([0, 0, 0, 1]), ["matched"] * 3 + ["mismatched"])
    assert (found["accuracy_matched"], found["accuracy_mismatched"]) == (1.0, 0.0)
    assert score(MNLI, found) == pytest.approx(50.0)


def test_regression_metrics_are_those_of_scipy():
    """A hand-written correlation that drifts from SciPy's would go unnoticed."""
    labels = make_labels(SIMILARITY, 150)
    logits = make_logits(SIMILARITY, labels, 0.7, seed=2)
    found = compute_metrics(SIMILARITY, logits, labels)
    errors = labels.astype(float) - logits[:, 0]
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, logits[:, 0])[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, logits[:, 0])[0], abs=1e-12)
    assert (found["mse"], found["mae"]) == pytest.approx((np.mean(errors**2), np.mean(np.abs(errors))))
    assert compute_metrics(SIMILARITY, logits[:, 0], labels) == found
    said, true = 1000 + logits[:, 0].astype(float), 1000 + labels.astype(float)
    found = compute_metrics(replace(SIMILARITY, metrics=("r2",)), said, true)
    assert found["r2"] == pytest.approx(sk.r2_score(true, said))


@pytest.mark.parametrize("task", [COLA, PAIRS])
@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 1, 1]])
@pytest.mark.parametrize("said", [0, 1])
def test_constant_predictions_and_labels_have_defined_metrics(task, labels, said):
    """A division by zero would give NaN, and NaN makes the best seed a lottery."""
    found = compute_metrics(task, np.eye(2)[[said] * 3], np.array(labels))
    assert all(np.isfinite(value) for value in found.values())
    assert found.get("matthews", 0.0) == 0.0


def test_classes_that_do_not_occur_have_defined_metrics():
    """A rare class is missing from many a small split: its F1 is 0 where it was said, and left out where it was not."""
    said, labels = np.eye(4)[[0, 0, 1, 1]], np.array([0, 0, 1, 2])
    assert compute_metrics(TOPICS, said, labels)["macro_f1"] == pytest.approx((1.0 + 2 / 3 + 0.0) / 3)
    assert compute_metrics(TOPICS, np.eye(4)[[3] * 4], np.zeros(4, dtype=int))["macro_f1"] == 0.0
    for marked in (0, 1):
        found = compute_metrics(TAGS, np.full((4, 3), -1.0), np.full((4, 3), marked))
        assert (found["micro_f1"], found["macro_f1"]) == (0.0, 0.0)
        assert found["subset_accuracy"] == 1.0 - marked

    # A binary F1 of three classes, or a sigmoid of a rating, is a number between 0 and 1 all the same.
    task = Task("single-label", ("text",), ("label",), ("a", "b", "c"), ("f1",))
    with pytest.raises(ValueError, match="'f1' is not defined"):
        compute_metrics(task, np.eye(3), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="a regression task has no probabilities"):
        probabilities(np.zeros((2, 1)), "regression")
    with pytest.raises(ValueError, match="expected the metrics"):
        score(PAIRS, {"accuracy": 0.8})


@pytest.mark.parametrize("constant", [1.0, 0.1 + 0.2])
def test_constant_regression_correlates_with_nothing(constant):
    """Rounding noise around a constant must not turn into a correlation."""
    for rows in (1, 5):
        found = compute_metrics(SIMILARITY, np.full(rows, constant), np.arange(1.0, rows + 1))
        assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_refused_with_the_row(bad):
    """Argmax of NaN is a class: a diverged run would get a score."""
    logits = np.zeros((3, 2))
    logits[1, 0] = bad
    with pytest.raises(ArtifactError, match=r"finite logits.*row 1.*lower the learning rate"):
        compute_metrics(BINARY, logits, np.array([0, 1, 0]))
    with pytest.raises(ArtifactError, match="finite labels"):
        compute_metrics(SIMILARITY, np.zeros(3), np.array([0.0, bad, 1.0]))


def drawn_task(draw, kind):
    """A task of two to five labels with rows and logits that have ties, rare classes and missing ones."""
    names = tuple("abcde"[: draw.integers(2, 6)])
    rows = int(draw.integers(5, 60))
    logits = np.round(2 * draw.normal(size=(rows, len(names))), int(draw.integers(0, 3)))
    if kind == "multi-label":
        labels = (draw.random((rows, len(names))) < draw.uniform(0.1, 0.9)).astype(int)
    else:
        labels = draw.choice(len(names), rows, p=draw.dirichlet(np.ones(len(names))))
    return Task(kind, ("text",), ("label",), names, ("average_precision",)), logits, labels


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
def test_metrics_are_those_of_scikit_learn(kind, seed):
    """A swapped positive class, micro averages for macro ones, a tie cut in two, costs of the transposed table."""
    draw = np.random.default_rng(seed)
    task, logits, labels = drawn_task(draw, kind)
    several = kind == "multi-label"
    shares = probabilities(logits, kind)
    said, columns = predict_labels(task, logits), range(task.num_labels)
    has = [labels[:, one] == 1 if several else labels == one for one in columns]
    decided = [said[:, one] == 1 if several else said == one for one in columns]
    # Rows of equal log-odds differ in the last digit of their probability.
    precision = [
        sk.average_precision_score(has[one], np.round(shares[:, one], 12)) for one in columns if has[one].any()
    ]
    found = compute_metrics(task, logits, labels)["average_precision"]
    if several or task.num_labels > 2:
        assert found == pytest.approx(np.mean(precision) if precision else 0.0)
    elif has[1].any():
        assert found == pytest.approx(precision[-1])
    f1 = partial(sk.f1_score, labels, said, zero_division=0)
    own = {"macro_f1": f1(average="macro")}
    if several:
        own |= {"micro_f1": f1(average="micro"), "subset_accuracy": sk.accuracy_score(labels, said)}
    else:
        own |= {"accuracy": sk.accuracy_score(labels, said), "matthews": sk.matthews_corrcoef(labels, said)}
        own |= {"f1": f1()} if task.num_labels == 2 else {}
        recall = sk.recall_score(labels, said, labels=np.unique(labels), average="macro", zero_division=0)
        costs = np.round(5 * draw.random((task.num_labels, task.num_labels)), 1)
        mean = (costs * sk.confusion_matrix(labels, said, labels=columns)).sum() / len(labels)
        own |= {"balanced_accuracy": recall, f"cost:{json.dumps(costs.tolist())}": 1 - mean / costs.max()}
    found = compute_metrics(replace(task, metrics=tuple(own)), logits, labels)
    assert {name: found[name] for name in own} == pytest.approx(own)
    for one, name in enumerate(task.label_names):
        names = (f"f1:{name}", f"average_precision:{name}", f"recall@0.7:{name}")
        found = compute_metrics(replace(task, metrics=names), logits, labels)
        assert found[names[0]] == pytest.approx(sk.f1_score(has[one], decided[one], zero_division=0))
        if has[one].any():
            shown = np.round(shares[:, one], 12)
            assert found[names[1]] == pytest.approx(sk.average_precision_score(has[one], shown))
            exact, recall, _ = sk.precision_recall_curve(has[one], shown)
            assert found[names[2]] == pytest.approx(recall[exact >= 0.7].max())  # the last point is (1, 0)
        else:
            assert found[names[1]] == found[names[2]] == 0.0


@pytest.mark.parametrize(
    ("given", "kind", "full"),
    [
        ("macro_f1", "single-label", "macro_f1"),
        ("f1", "single-label", "f1"),
        ("recall@0.95:SPAM", "single-label", "recall@0.95:spam"),
        ("average_precision:ham", "multi-label", "average_precision:ham"),
        ({"cost": {"spam": {"ham": 5.0}}}, "single-label", "cost:[[0.0, 1.0], [5.0, 0.0]]"),
        ("r2", "regression", "r2"),
    ],
)
def test_a_metric_has_one_full_name(given, kind, full):
    """A cost at the transposed place would punish the harmless error."""
    assert full_metric(given, kind, ("ham", "spam")) == full


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ("macrof1", "single-label", "no metric of a single-label task.*Did you mean 'macro_f1'"),
        ("mse", "regression", "r2 ranks models as the mean squared error does"),
        ("accuracy", "multi-label", "expected one of micro_f1"),
        ("recall@0:spam", "single-label", "no metric"),
        ({"cost": {"spam": {"eggs": 1.0}}}, "single-label", "'eggs' is no label"),
        ({"cost": {"spam": {"ham": 0.0}, "ham": {"spam": 0.0}}}, "single-label", "every cost is 0"),
        ({"cost": {"spam": {"ham": 1.0}}}, "multi-label", "single-label"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(given, kind, told):
    """A metric that is misspelt or of another kind must not end a run after its first epoch."""
    with pytest.raises(ConfigError, match=rf"task\.metric: .*{told}"):
        full_metric(given, kind, ("ham", "spam"))


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
    """An interval of a mean of the rows' F1 would be about another figure; NaN makes the best epoch a lottery."""
    assert weighted_entities(name, np.zeros((2, 3, 3), np.int64), TYPES)(np.ones((1, 2))).tolist() == [0.0]
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
