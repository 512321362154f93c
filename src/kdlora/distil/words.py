"""A bag of words, TF-IDF and a linear model: soon it says whether a transformer is needed at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from kdlora.data.tasks import Task
from kdlora.evidence.metrics import fit_shift

Texts = Mapping[str, list[str]]
"""`text`, and `text_pair` for pairs."""

BAG_OF_WORDS = "bag of words"
"""What stands in a record in place of a model's source."""
MOST_ROWS = 50_000
"""So many training rows are learnt from, and validation rows chosen by."""
STRENGTHS = (1.0, 10.0, 100.0)
"""Inverse of the regularisation, tried one after the other on the validation rows."""
_MOST_FEATURES, _MOST_COEFFICIENTS = 90_000, 2_000_000
_EMPTY = "∅"  # stands for a text of nothing but space, so that a vocabulary is never empty


@dataclass(frozen=True)
class BagOfWords:
    """TF-IDF and a linear model: one for all classes, or one a label of several, a number where all rows are alike."""

    task: Task
    vectorizers: tuple[TfidfVectorizer, ...]
    models: tuple[Any, ...]
    strength: float
    rows: int

    @property
    def parameters(self) -> int:
        linear = [model for model in self.models if not isinstance(model, float)]
        return sum(model.coef_.size + np.size(model.intercept_) for model in linear)

    def predict(self, texts: Texts) -> np.ndarray:
        """Give log-probabilities of classes, log-odds of labels, or values, float32 `(rows, labels)`."""
        return _predict(self.task, self.models, _features(self.vectorizers, texts), self.rows)


def fit_words(task: Task, train: Texts, labels: np.ndarray, validation: Texts, expected: np.ndarray) -> BagOfWords:
    """Learn from the training rows; how strongly to regularise is chosen on the validation rows."""
    # Words and characters, a third and two thirds of what the number of labels allows.
    most = min(_MOST_FEATURES, _MOST_COEFFICIENTS // task.num_labels) // 3
    settings: list[dict[str, Any]] = [
        {"ngram_range": (1, 2), "token_pattern": r"\w+|[^\w\s]", "max_features": max(most, 1)},
        {"ngram_range": (2, 5), "analyzer": "char_wb", "max_features": max(2 * most, 1)},
    ]
    seen = [text for column in train.values() for text in _without_empty(column)]
    vectorizers = tuple(TfidfVectorizer(sublinear_tf=True, dtype=np.float32, **one).fit(seen) for one in settings)
    known, asked = _features(vectorizers, train), _features(vectorizers, validation)
    found: list[tuple[float, float, tuple[Any, ...]]] = []
    for strength in STRENGTHS:
        models = _fit(task, known, labels, strength, found[-1][2] if found else ())
        _, value = fit_shift(task, _predict(task, models, asked, len(labels)), expected)
        found.append((value, strength, models))
    _, strength, models = max(found, key=lambda one: one[0])  # of equals the weakest
    return BagOfWords(task, vectorizers, models, strength, len(labels))


def _without_empty(texts: list[str]) -> list[str]:
    return [text if text.strip() else _EMPTY for text in texts]


def _features(vectorizers: tuple[TfidfVectorizer, ...], texts: Texts) -> sparse.csr_matrix:
    """Vectorise texts; of a pair both sides, what they share, in what they differ, and their cosines."""
    sides = [[one.transform(_without_empty(column)) for one in vectorizers] for column in texts.values()]
    if len(sides) == 1:
        return sparse.hstack(sides[0], format="csr")
    shared = [first.multiply(second) for first, second in zip(*sides, strict=True)]
    differing = [abs(first - second) for first, second in zip(*sides, strict=True)]
    cosines = [sparse.csr_matrix(one.sum(axis=1)) for one in shared]
    return sparse.hstack([*sides[0], *sides[1], *shared, *differing, *cosines], format="csr")


def _fit(
    task: Task, features: sparse.csr_matrix, labels: np.ndarray, strength: float, weaker: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Fit the models for one strength; those of the strength before are where they start."""
    if task.kind == "regression":
        return (Ridge(alpha=10 / strength).fit(features, labels),)
    columns = labels.T if task.kind == "multi-label" else labels[None]
    start = LogisticRegression(tol=3e-4, warm_start=True, class_weight=task.auto_weights())
    starts = weaker or (start,) * len(columns)
    return tuple(_classifier(features, *one, strength) for one in zip(columns, starts, strict=True))


def _classifier(features: sparse.csr_matrix, labels: np.ndarray, start: Any, strength: float) -> Any:
    """Fit a logistic regression; where all rows have one label, that label stands for it."""
    if np.ptp(labels) == 0:
        return float(labels[0])
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # no convergence; few rows of many labels
        return copy.deepcopy(start).set_params(C=strength).fit(features, labels)


def _predict(task: Task, models: tuple[Any, ...], features: sparse.csr_matrix, rows: int) -> np.ndarray:
    """Give outputs; what no training row has gets the log-probability of less than one row."""
    count = features.shape[0]
    if task.kind == "regression":
        return np.asarray(models[0].predict(features), dtype=np.float32).reshape(count, 1)
    unseen = -np.log(rows + task.num_labels)
    if task.kind == "multi-label":
        columns = [
            np.full(count, -unseen if one else unseen) if isinstance(one, float) else one.decision_function(features)
            for one in models
        ]
        return np.stack(columns, axis=1).astype(np.float32)
    outputs, model = np.full((count, task.num_labels), unseen), models[0]
    if isinstance(model, float):
        outputs[:, int(model)] = 0.0
    else:
        outputs[:, model.classes_.astype(int)] = model.predict_log_proba(features)
    return outputs.astype(np.float32)
