"""Metrics beside those of scikit-learn and SciPy, and counts of entities."""

import json
import tracemalloc
from dataclasses import replace
from functools import partial
from itertools import compress, pairwise, product

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from fabricate import BINARY, MNLI, PAIRS, SIMILARITY, TAGS, TOPICS, make_labels, make_logits
from kdlora.data.tags import decode, tag_names
from kdlora.data.tasks import Task, full_metric
from kdlora.errors import ArtifactError, ConfigError
from kdlora.evidence.metrics import compute_metrics, fit_shift, metric_names, predict_labels, probabilities, score
from kdlora.evidence.ranking import counts_from_logits, weighted_entities
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


def test_one_threshold_for_all_labels_is_the_best_on_these_rows():
    """At 0.5 a model that is never sure says nothing, and a bag of words looked far worse than it is."""
    labels = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], np.float32)
    logits = np.where(labels == 1, -0.9, -2.0)
    task = Task("multi-label", ("text",), ("label",), ("a", "b"), ("micro_f1",))
    assert compute_metrics(task, logits, labels)["micro_f1"] == 0
    assert fit_shift(task, logits, labels) == (-0.95, 100.0)  # of all that are as good the nearest to 0
    assert fit_shift(task, logits + 3, labels)[0] == 1.0
    assert fit_shift(task, logits + 1.5, labels) == (0.0, 100.0)
    ranked = replace(task, metrics=("average_precision",))
    assert fit_shift(ranked, logits, labels)[0] == 0, "a ranking has no threshold"
    classes = Task("single-label", ("text",), ("label",), ("a", "b"), ("accuracy",))
    assert fit_shift(classes, logits, labels[:, 0].astype(int)) == (0.0, 25.0)


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


def test_degenerate_rows_have_defined_metrics():
    """A division by zero would give NaN, and NaN makes the best seed a lottery."""
    for task, labels, said in product((COLA, PAIRS), ([0, 0, 0], [1, 1, 1], [0, 1, 1]), (0, 1)):
        found = compute_metrics(task, np.eye(2)[[said] * 3], np.array(labels))
        assert all(np.isfinite(value) for value in found.values())
        assert found.get("matthews", 0.0) == 0.0

    # A rare class is missing from many a small split: its F1 is 0 where it was said, and left out where it was not.
    said, labels = np.eye(4)[[0, 0, 1, 1]], np.array([0, 0, 1, 2])
    assert compute_metrics(TOPICS, said, labels)["macro_f1"] == pytest.approx((1.0 + 2 / 3 + 0.0) / 3)
    assert compute_metrics(TOPICS, np.eye(4)[[3] * 4], np.zeros(4, dtype=int))["macro_f1"] == 0.0
    for marked in (0, 1):
        found = compute_metrics(TAGS, np.full((4, 3), -1.0), np.full((4, 3), marked))
        assert (found["micro_f1"], found["macro_f1"]) == (0.0, 0.0)
        assert found["subset_accuracy"] == 1.0 - marked

    # Rounding noise around a constant must not turn into a correlation.
    for constant, rows in product((1.0, 0.1 + 0.2), (1, 5)):
        found = compute_metrics(SIMILARITY, np.full(rows, constant), np.arange(1.0, rows + 1))
        assert (found["pearson"], found["spearman"]) == (0.0, 0.0)

    # A binary F1 of three classes, or a sigmoid of a rating, is a number between 0 and 1 all the same.
    task = Task("single-label", ("text",), ("label",), ("a", "b", "c"), ("f1",))
    with pytest.raises(ValueError, match="'f1' is not defined"):
        compute_metrics(task, np.eye(3), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="a regression task has no probabilities"):
        probabilities(np.zeros((2, 1)), "regression")
    with pytest.raises(ValueError, match="expected the metrics"):
        score(PAIRS, {"accuracy": 0.8})


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


def test_metrics_of_many_classes_need_little_memory():
    """A table of rows by classes for each of all runs has the choice of the student killed, after the last training."""
    draw, classes = np.random.default_rng(0), 1_000
    labels = draw.integers(0, classes, 4_000)
    said = np.where(draw.random(4_000) < 0.7, labels, draw.integers(0, classes - 200, 4_000))
    logits = np.zeros((4_000, classes), np.float32)
    logits[np.arange(4_000), said] = 1.0
    names = ("macro_f1", "balanced_accuracy", "matthews")
    task = Task("single-label", ("text",), ("label",), tuple(map(str, range(classes))), names)
    tracemalloc.start()
    found = compute_metrics(task, logits, labels)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * logits.nbytes
    recall = sk.recall_score(labels, said, labels=np.unique(labels), average="macro", zero_division=0)
    expected = (sk.f1_score(labels, said, average="macro", zero_division=0), recall, sk.matthews_corrcoef(labels, said))
    assert [found[name] for name in names] == pytest.approx(expected)


def test_a_metric_has_one_full_name():
    """A cost at the transposed place would punish the harmless error."""
    given, labels = {"cost": {"spam": {"ham": 5.0}}}, ("ham", "spam")
    assert full_metric(given, "single-label", labels) == "cost:[[0.0, 1.0], [5.0, 0.0]]"
    assert full_metric("recall@0.95:SPAM", "single-label", labels) == "recall@0.95:spam"
    assert full_metric("average_precision:ham", "multi-label", labels) == "average_precision:ham"
    assert full_metric("r2", "regression", labels) == "r2"


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


def as_arrays(predicted, wanted):
    """Give logits that say the tags of some rows, labels and offsets."""
    said, labels = (np.array([NAMES.index(tag) for row in rows for tag in row], int) for rows in (predicted, wanted))
    return np.eye(len(NAMES), dtype=np.float32)[said], labels, np.cumsum([0, *map(len, wanted)])


def count(predicted, wanted):
    return counts_from_logits(NAMES, *as_arrays(predicted, wanted))


def drawn_rows(seed, rows=40):
    """Draw rows of any tags, strays included, and rows that differ from them here and there."""
    draw = np.random.default_rng(seed)
    wanted = [draw.choice(NAMES, draw.integers(0, 12), p=[0.3, *[0.7 / 6] * 6]).tolist() for _ in range(rows)]
    predicted = [[tag if draw.random() < 0.8 else str(draw.choice(NAMES)) for tag in row] for row in wanted]
    return predicted, wanted


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_sets_of_entities(seed):
    """A half right boundary or type would count; a stray I- be an entity, and a word that nobody labelled be wrong."""
    predicted, wanted = ([[], *rows] for rows in drawn_rows(seed))  # an empty row that vanished would shift the others
    logits, labels, offsets = as_arrays(predicted, wanted)
    labelled = np.random.default_rng(seed).random(len(labels)) < 0.9
    found = counts_from_logits(NAMES, logits, np.where(labelled, labels, -100), offsets)
    decided = [NAMES[tag] for tag in decode(logits, offsets)]
    predicted = [decided[start:end] for start, end in pairwise(offsets)]
    for row, rows in enumerate(zip(predicted, wanted, strict=True)):
        kept = labelled[offsets[row] : offsets[row + 1]]
        for column, name in enumerate(TYPES):
            said, true = ({one for one in entities(list(compress(tags, kept))) if one[2] == name} for tags in rows)
            assert found[row, column].tolist() == [len(said & true), len(said), len(true)]


TASK = Task("tokens", ("words",), ("tags",), NAMES, ("entity_f1",))


def test_draws_in_closed_form_are_those_of_rows_written_out():
    """An interval of a mean of the rows' F1 would be about another figure; NaN makes the best epoch a lottery."""
    assert weighted_entities("entity_f1", np.zeros((2, 3, 3), np.int64), TYPES)(np.ones((1, 2))).tolist() == [0.0]
    predicted, wanted = drawn_rows(3)
    counts, draws = count(predicted, wanted), np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=9)
    closed = {name: weighted_entities(name, counts, TYPES)(draws.astype(float)) for name in metric_names(TASK)}
    for place, times in enumerate(draws):
        rows = np.repeat(np.arange(40), times)
        *arrays, offsets = as_arrays([predicted[row] for row in rows], [wanted[row] for row in rows])
        found = compute_metrics(TASK, *arrays, offsets=offsets)
        assert found == pytest.approx({name: values[place] for name, values in closed.items()})


def test_metrics_of_a_task_are_those_of_its_words():
    """A metric by rows of words would be an accuracy, which `O` alone makes high."""
    logits, labels, offsets = as_arrays([["B-PER", "I-LOC", "O"], ["O"]], [["B-PER", "B-LOC", "O"], ["B-ORG"]])
    found = compute_metrics(TASK, logits, labels, offsets=offsets)
    assert set(found) == set(metric_names(TASK))
    assert found["entity_precision"] == 1.0  # the stray I-LOC begins an entity
    assert found["entity_recall"] == pytest.approx(2 / 3)
    assert found["macro_entity_f1"] == pytest.approx(2 / 3)  # all of PER and LOC, none of ORG
    assert (found["recall:PER"], found["recall:ORG"]) == (1.0, 0.0)
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
    said, wanted = drawn_rows(5, rows=60)
    worse = [[tag if place % 3 else "O" for place, tag in enumerate(row)] for row in wanted]
    (first, labels, offsets), (second, *_) = (as_arrays(one, wanted) for one in (said, worse))
    found = contrast([PairedArms(TASK, labels, [first], [second], offsets=offsets)], draws=400)
    f1 = [compute_metrics(TASK, one, labels, offsets=offsets)["entity_f1"] for one in (first, second)]
    assert found.difference == pytest.approx(100 * (f1[0] - f1[1]))
    assert found.n_examples == 60
    draws = np.random.default_rng(4).multinomial(60, np.full(60, 1 / 60), size=300).astype(float)
    f1 = [weighted_entities("entity_f1", count(one, wanted), TYPES)(draws) for one in (said, worse)]
    assert (found.high - found.low) / 4 == pytest.approx(100 * np.std(f1[0] - f1[1]), rel=0.2)
