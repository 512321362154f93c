"""Rows without labels in the order of the rows and in a training; and a bag of words."""

import dataclasses
import math
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from interruptions import weights

from kdlora.data.batches import LengthBucketSampler, Tokenised
from kdlora.distil.logits import LABELLED, join_unlabelled
from kdlora.distil.words import fit_words
from kdlora.evidence.metrics import compute_metrics, score

KINDS = ("single-label", "multi-label", "regression")


def test_a_longer_epoch_takes_every_row_before_any_comes_again():
    """A draw with replacement would leave a third of a control's labelled rows out of an epoch."""
    sampler, epochs = LengthBucketSampler(np.arange(1, 11), 4, seed=1, rows_per_epoch=25), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert [len(batch) for batch in epochs[-1]] == [4] * 6 + [1]
        assert set(np.bincount(np.concatenate(epochs[-1]), minlength=10)) == {2, 3}
    assert len(sampler) == 7
    assert epochs[1] != epochs[0] == epochs[2]
    plain, same = (LengthBucketSampler(np.arange(1, 11), 4, seed=1, rows_per_epoch=rows) for rows in (None, 10))
    assert list(plain) == list(same)


@pytest.mark.parametrize("kind", KINDS)
def test_labelled_and_unlabelled_rows_train_together(make_setup, tmp_path, kind):
    """However a batch is cut, the gradient is the mean over its rows; what fills a missing label is never read."""
    trained, other = [], [1.0] * 3 if kind == "multi-label" else 1
    for tokens in (16384, 96):
        setup = make_setup(kind, dropout=0.0, unlabelled=30, micro_batch_tokens=tokens, epochs=1)
        if tokens == 96:  # without a fingerprint datasets disassembles all that the function can reach, for seconds
            refilled = setup.train.dataset.map(
                lambda row: row if row[LABELLED] else row | {"label": other}, new_fingerprint="refilled"
            )
            setup.train = dataclasses.replace(setup.train, dataset=refilled)
        outcome = setup.run(tmp_path / str(tokens))
        trained.append(weights(setup.model))
    assert (outcome.steps, outcome.examples) == (math.ceil(74 / 8), 74)
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)
    last = outcome.history[-1]
    expected = 0.5 * last["hard_loss"] * 44 / 74 + 0.5 * last["soft_loss"]
    assert last["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_labels_are_no_objects(tasks, kind):
    """A list held an object a row, and an array a row of several labels: gigabytes for millions of texts."""
    count, label = 50_000, [[0.0] * 3] if kind == "multi-label" else [1]
    labelled = Tokenised(Dataset.from_dict({"length": [1], "label": label}), 0, 8)
    unlabelled = Tokenised(Dataset.from_dict({"length": np.ones(count, int)}), 0, 8)
    tracemalloc.start()
    joined = join_unlabelled(labelled, unlabelled, tasks[kind])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * count
    assert len(joined.dataset) == count + 1
    assert joined.dataset.features["label"] == labelled.dataset.features["label"]


def texts_and_labels(rows):
    return {"text": rows["text"][:]}, np.array(rows["label"])


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_every_kind_of_task_and_says_the_same_twice(make_examples, tasks, kind):
    """A baseline that is weak for a fault of its own makes a transformer look needed."""
    task = dataclasses.replace(tasks[kind], metrics=tasks[kind].metrics[:1])  # ranks of the values are of chance
    (train, labels), (other, wanted) = (texts_and_labels(make_examples(kind, 200, seed)) for seed in (0, 1))
    if kind == "multi-label":
        labels[:, 2], wanted[:, 2] = labels[:, 0], wanted[:, 0]  # drawn by chance, nobody learns it
    fitted = [fit_words(task, train, labels, other, wanted) for _ in range(2)]
    outputs = [one.predict(other) for one in fitted]
    assert outputs[0].shape == (200, task.num_labels)
    assert outputs[0].dtype == np.float32
    np.testing.assert_array_equal(*outputs)
    assert score(task, compute_metrics(task, outputs[0], wanted)) > 95
    assert fitted[0].parameters > task.num_labels
    if kind == "single-label":
        np.testing.assert_allclose(np.exp(outputs[0]).sum(axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("kind", ["single-label", "regression"])
def test_a_pair_is_judged_by_what_its_sides_share(tasks, kind):
    """Two sides in one bag know neither order nor overlap, and every paraphrase task is then chance."""

    def pairs(seed):
        random = np.random.default_rng(seed)
        vocabulary = [f"{first}{second}" for first in "bdfgklm" for second in ("aru", "ino", "est", "oly")]
        same = random.integers(0, 2, 300)
        first = [list(random.choice(vocabulary, 4, replace=False)) for _ in same]
        second = [
            random.permutation(own) if one else random.choice(vocabulary, 4)
            for one, own in zip(same, first, strict=True)
        ]
        return {"text": [" ".join(one) for one in first], "text_pair": [" ".join(one) for one in second]}, same

    task, (train, same), (other, expected) = tasks[kind], pairs(0), pairs(1)
    outputs = fit_words(task, train, same, other, expected).predict(other)
    assert score(task, compute_metrics(task, outputs, expected)) > 85


@pytest.mark.parametrize("seen", [(0, 2), (1, 1)])
def test_a_class_without_training_rows_keeps_its_column(make_examples, tasks, seen):
    """Columns that move up by one give every later class another name."""
    train, values = texts_and_labels(make_examples("single-label", 100))
    task = dataclasses.replace(tasks["single-label"], label_names=("none", "one", "two"))
    labels = np.array(seen)[values]
    outputs = fit_words(task, train, labels, train, labels).predict(train)
    assert set(outputs.argmax(axis=1)) == set(seen)
    assert np.isfinite(outputs).all()


def test_labels_that_all_rows_or_none_have_are_predicted_so(make_examples, tasks):
    """One rare label without a training row must not end the arm for all the others."""
    train, values = texts_and_labels(make_examples("single-label", 200))
    labels = np.stack([values, np.zeros(200), np.ones(200)], axis=1).astype(np.float32)
    fitted = fit_words(tasks["multi-label"], train, labels, train, labels)
    np.testing.assert_array_equal(fitted.predict(train) > 0, labels > 0)


def test_a_rare_class_is_found_where_all_classes_count_alike(tasks):
    """A bag of words that never says the rare class makes any transformer look needed, by macro F1."""
    rows, random, found = np.arange(200), np.random.default_rng(0), {}
    rare, marked = rows % 40 == 0, rows % 13 == 0  # most of the marked rows are of the other class
    train, other = (
        {"text": [" ".join(random.choice(list("abcdefgh"), 20)) + " odd" * int(one) for one in rare | marked]}
        for _ in range(2)
    )
    for metric in ("macro_f1", "accuracy"):
        task = dataclasses.replace(tasks["single-label"], metrics=(metric,))
        outputs = fit_words(task, train, rare.astype(int), other, rare.astype(int)).predict(other)
        found[metric] = outputs.argmax(axis=1)[rare].mean()
    assert found["accuracy"] < found["macro_f1"] == 1


def test_few_rows_of_many_labels_warn_of_nothing(tasks):
    """Three times scikit-learn asked before a run's first words: do you mean a regression?"""
    labels, names = np.arange(30) % 20, tuple(f"label {number}" for number in range(20))
    task, text = dataclasses.replace(tasks["single-label"], label_names=names), {"text": [f"w{one}" for one in labels]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit_words(task, text, labels, text, labels)
    assert not told


@pytest.mark.parametrize("texts", [["", "good", " ", "bad"], ["", " ", "", "\n"], ["!", "?", "!", "?"], ["a", "b"] * 2])
def test_texts_without_words_are_no_fault(tasks, texts):
    """An empty vocabulary is an exception deep inside a library, after which a default run shows a failed arm."""
    labels = np.array([0, 1, 0, 1])
    fitted = fit_words(tasks["single-label"], {"text": texts}, labels, {"text": texts}, labels)
    assert np.isfinite(fitted.predict({"text": ["new", "", "good"]})).all()
