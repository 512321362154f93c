"""A training that diverges stops before its weights are spoilt, and says where, on which rows, and what is left."""

import pickle
from dataclasses import replace
from itertools import count

import pytest
import torch
from interruptions import SaveAt, callback

from kdlora.distil.losses import DivergedError
from kdlora.errors import KdLoraError
from kdlora.system.storage import claim_folder


def test_a_gradient_that_is_not_finite_stops_before_the_step(make_setup, tmp_path):
    """The loss of that step is fine; taken, the step makes every weight NaN, and a checkpoint would keep them."""
    setup, steps = make_setup(), count(1)

    def spoil(model, **_):
        if next(steps) == 5:
            trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            trained.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(KdLoraError, match="the loss or its gradients are not finite numbers at step 5") as caught:
        setup.run(tmp_path, callbacks=[SaveAt(3), callback("on_step_begin", spoil)])
    assert "learning rate (now 0.005)" in str(caught.value)
    assert str(caught.value).endswith(f"Last good checkpoint: {tmp_path / 'step-000000003'}, from before that")
    assert all(torch.isfinite(parameter).all() for parameter in setup.model.parameters())

    # A child answers with its exception; one that loses its step, or cannot travel, hides the cause.
    fault = pickle.loads(pickle.dumps(DivergedError("the training diverged", 7)))  # noqa: S301 - its own
    assert (str(fault), fault.step) == ("the training diverged", 7)


def test_the_rows_of_the_step_are_named(make_setup, tmp_path):
    """One row with a broken target among a million is found by its id, or not at all."""
    setup = make_setup(batch_size=4)
    rows = setup.train.dataset
    logits = [list(row) for row in rows["teacher_logits"]]
    logits[17][0] = float("nan")
    spoilt = rows.remove_columns("teacher_logits").add_column("teacher_logits", logits)
    setup.train = replace(setup.train, dataset=spoilt)
    claim_folder(tmp_path, "training")
    (tmp_path / "step-000000001").mkdir()  # an unusable checkpoint is not a good one
    with pytest.raises(KdLoraError, match=r"the loss or its gradients are not finite numbers at step \d+") as caught:
        setup.run(tmp_path)
    for part in (repr(rows[17]["id"]), "The step's 4 rows: ", "none was written yet"):
        assert part in str(caught.value)
