import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from fabricate import BINARY, MNLI, PAIRS, SIMILARITY, TAGS, TOPICS, make_labels, make_logits
from kdlora.data.tasks import Task, full_metric
from kdlora.errors import ArtifactError, ConfigError
from kdlora.evidence.metrics import compute_metrics, metric_names, predict_labels, probabilities, score

COLA = Task("single-label", ("text",), ("label",), ("unacceptable", "acceptable"), ("matthews",), "cola")


def test_metrics_are_those_of_scikit_learn():
    """A swapped positive class, micro averages for macro ones, or a threshold at 0.5 of the logit, look plausible."""
    for task, own in (
        (PAIRS, {"accuracy": sk.accuracy_score, "f1": sk.f1_score}),
        (COLA, {"matthews": sk.matthews_corrcoef}),
        (TOPICS, {"macro_f1": partial(sk.f1_score, average="macro"), "accuracy": sk.accuracy_score}),
        (TAGS, {f"{kind}_f1": partial(sk.f1_score, average=kind) for kind in ("micro", "macro")}),
        (TAGS, {"subset_accuracy": sk.accuracy_score}),
    ):
        labels = make_labels(task, 200)
        logits = make_logits(task, labels, 0.6, seed=1)
        said = logits > 0 if task.kind == "multi-label" else logits.argmax(axis=1)
        found = compute_metrics(task, logits, labels)
        for name, reference in own.items():
            assert found[name] == pytest.approx(reference(labels, said)), (task, name)
    assert metric_names(TOPICS) == ("macro_f1", "accuracy")


def test_scores_ties_and_groups():
    """An extra metric that leaks into the score would change every GLUE figure."""
    assert score(PAIRS, {"accuracy": 0.8, "f1": 0.9, "macro_f1": 0.1}) == pytest.approx(85.0)

    # A tie that depends on the platform would make runs differ.
    assert predict_labels(TOPICS, np.zeros((2, 4))).tolist() == [0, 0]
    assert predict_labels(TAGS, np.zeros((1, 3))).tolist() == [[0, 0, 0]]

    # Scikit-learn takes one column for a binary task, where micro F1 is accuracy.
    task = Task("multi-label", ("text",), ("spam",), ("spam",), ("micro_f1",))
    found = compute_metrics(task, np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.array([[1], [0], [0], [0]]))
    assert found["micro_f1"] == pytest.approx(2 / 3)

    # MNLI's score is the mean of two accuracies, not the accuracy of the pooled rows.
    labels = np.array([0, 0, 0, 1])
    logits = np.eye(3)[[0, 0, 0, 0]]
    found = compute_metrics(MNLI, logits, labels, ["matched"] * 3 + ["mismatched"])
    assert found["accuracy_matched"] == 1.0
    assert found["accuracy_mismatched"] == 0.0
    assert score(MNLI, found) == pytest.approx(50.0)


def test_regression_metrics_are_those_of_scipy():
    """A hand-written correlation that drifts from SciPy's would go unnoticed."""
    labels = make_labels(SIMILARITY, 150)
    logits = make_logits(SIMILARITY, labels, 0.7, seed=2)
    found = compute_metrics(SIMILARITY, logits, labels)
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, logits[:, 0])[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, logits[:, 0])[0], abs=1e-12)
    assert found["mse"] == pytest.approx(float(np.mean((labels.astype(float) - logits[:, 0]) ** 2)))
    assert found["mae"] == pytest.approx(float(np.mean(np.abs(labels.astype(float) - logits[:, 0]))))
    assert compute_metrics(SIMILARITY, logits[:, 0], labels) == found


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
    found = compute_metrics(SIMILARITY, np.full(5, constant), np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    single = compute_metrics(SIMILARITY, np.array([1.0]), np.array([1.0]))
    assert (single["pearson"], single["spearman"]) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_refused_with_the_row(bad):
    """Argmax of NaN is a class: a diverged run would get a score."""
    logits = np.zeros((3, 2))
    logits[1, 0] = bad
    with pytest.raises(ArtifactError, match=r"finite logits.*row 1.*lower the learning rate"):
        compute_metrics(BINARY, logits, np.array([0, 1, 0]))
    with pytest.raises(ArtifactError, match="finite labels"):
        compute_metrics(SIMILARITY, np.zeros(3), np.array([0.0, bad, 1.0]))


def drawn_task(draw, kind, metric):
    """A task of two to five labels with rows and logits that have ties, rare classes and missing ones."""
    names = tuple("abcde"[: draw.integers(2, 6)])
    rows = int(draw.integers(5, 60))
    logits = np.round(2 * draw.normal(size=(rows, len(names))), int(draw.integers(0, 3)))
    if kind == "multi-label":
        labels = (draw.random((rows, len(names))) < draw.uniform(0.1, 0.9)).astype(int)
    else:
        labels = draw.choice(len(names), rows, p=draw.dirichlet(np.ones(len(names))))
    return Task(kind, ("text",), ("label",), names, (metric,)), logits, labels


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
def test_metrics_of_the_users_choice_are_those_of_scikit_learn(kind, seed):
    """A tie cut in two, or a precision compared the wrong way, is a plausible figure that chooses the wrong model."""
    task, logits, labels = drawn_task(np.random.default_rng(seed), kind, "average_precision")
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


@pytest.mark.parametrize("seed", range(15))
def test_balanced_accuracy_cost_and_r2_are_those_of_scikit_learn(seed):
    """A mean over the wrong axis, or costs of the transposed table, would choose a model by something else."""
    draw = np.random.default_rng(seed)
    task, logits, labels = drawn_task(draw, "single-label", "balanced_accuracy")
    said = predict_labels(task, logits)
    recalls = sk.recall_score(labels, said, labels=np.unique(labels), average=None, zero_division=0)
    costs = np.round(5 * draw.random((task.num_labels, task.num_labels)), 1)
    name = f"cost:{json.dumps(costs.tolist())}"
    found = compute_metrics(replace(task, metrics=("balanced_accuracy", name)), logits, labels)
    assert found["balanced_accuracy"] == pytest.approx(recalls.mean())
    mean = (costs * sk.confusion_matrix(labels, said, labels=range(task.num_labels))).sum() / len(labels)
    assert found[name] == pytest.approx(1 - mean / costs.max())
    values = 1000 + draw.normal(size=len(labels))
    stars = Task("regression", ("text",), ("stars",), ("stars",), ("r2",))
    expected = sk.r2_score(values, values + logits[:, 0])
    assert compute_metrics(stars, values + logits[:, 0], values)["r2"] == pytest.approx(expected)


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
        ("recall@0.9:spma", "single-label", "'spma' is no label of the task.*Did you mean 'spam'"),
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
