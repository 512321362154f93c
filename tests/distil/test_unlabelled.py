"""Rows without labels in the order of the rows, and in a training."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from kdlora.data.batches import LengthBucketSampler
from kdlora.distil.logits import LABELLED, labelled_values
from kdlora.distil.losses import TargetScale
from kdlora.distil.resume import trained_tensors
from kdlora.errors import DataError

KINDS = ("single-label", "multi-label", "regression")


def test_a_longer_epoch_takes_every_row_before_any_comes_again():
    """A draw with replacement would leave a third of a control's labelled rows out of an epoch."""
    sampler = LengthBucketSampler(np.arange(1, 11), 4, seed=1, rows_per_epoch=25)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [4] * 6 + [1]
        counts = np.bincount(np.concatenate(batches), minlength=10)
        assert set(counts) == {2, 3}
        epochs.append(batches)
    assert len(sampler) == 7
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    plain, same = (
        LengthBucketSampler(np.arange(1, 11), 4, seed=1),
        LengthBucketSampler(np.arange(1, 11), 4, seed=1, rows_per_epoch=10),
    )
    assert list(plain) == list(same)


@pytest.mark.parametrize("kind", KINDS)
def test_labelled_and_unlabelled_rows_train_together(make_setup, tmp_path, kind):
    """However a batch is cut, the gradient is the mean over its rows; what fills a missing label is never read."""
    trained, histories = [], []
    for number, tokens in enumerate((16384, 96, 16384)):
        setup = make_setup(kind, dropout=0.0, unlabelled=30, micro_batch_tokens=tokens, epochs=1)
        if number == 2:
            setup = dataclasses.replace(setup, train=dataclasses.replace(setup.train, dataset=refilled(setup)))
        outcome = setup.run(tmp_path / str(number))
        trained.append({name: value.clone() for name, value in trained_tensors(setup.model).items()})
        histories.append(outcome.history)
    assert (outcome.steps, outcome.examples) == (math.ceil(74 / 8), 74)
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(value, trained[2][name]), name
    last = histories[0][-1]
    expected = 0.5 * last["hard_loss"] * 44 / 74 + 0.5 * last["soft_loss"]
    assert last["loss"] == pytest.approx(expected, rel=1e-5)


def refilled(setup) -> Dataset:
    """Put other values where labels are missing."""

    def change(row):
        other = [1.0] * 3 if setup.task.kind == "multi-label" else 1
        return row if row[LABELLED] else row | {"label": other}

    # Without a fingerprint datasets disassembles all that the function can reach, which takes seconds.
    return setup.train.dataset.map(change, new_fingerprint="refilled")


def test_a_control_takes_the_steps_of_the_distilled_arm_and_no_unlabelled_rows(make_setup, tmp_path):
    """With equal epochs over fewer rows a control stops early, and the difference is one of steps."""
    control = make_setup()
    outcome = control.run(tmp_path, distil=None, rows_per_epoch=74)
    assert (outcome.steps, outcome.examples) == (2 * math.ceil(74 / 8), 2 * 74)
    assert "soft_loss" not in outcome.history[-1]

    # Zeros in place of missing labels would move the mean of the targets far from the labels.
    setup = make_setup("regression")
    alone = TargetScale.of(np.asarray(setup.train.dataset["label"]))
    assert TargetScale.of(labelled_values(make_setup("regression", unlabelled=30).train.dataset)) == alone

    # Trained without a teacher, such rows would teach the value that fills their place.
    with pytest.raises(DataError, match="rows without labels teach by their teacher alone"):
        make_setup(unlabelled=30).run(tmp_path, distil=None)
