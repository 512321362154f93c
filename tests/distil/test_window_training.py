"""Texts in windows that teach a model: the loss is of a text's pooled logits, whatever the micro-batches."""

import numpy as np
import pytest
import torch
from interruptions import weights

from kdlora.data.batches import tokenise
from kdlora.data.windows import WindowSettings
from kdlora.distil.inference import predict_logits
from kdlora.distil.losses import distillation_loss


def put_into_windows(setup, examples, settings, max_length):
    """Give a training the rows of `examples` in windows, or cut where the settings are None."""
    for name, rows in examples.items():
        setattr(setup, name, tokenise(rows, setup.encoder.tokenizer, max_length, windows=settings))
    return setup


def logits_by_hand(setup, data, pool):
    """Run every window alone, and pool."""
    model, rows = setup.model.eval(), []
    for row in data.dataset:
        parts = np.split(np.asarray(row["input_ids"]), np.cumsum(row["windows"])[:-1])
        with torch.no_grad():
            found = [model(input_ids=torch.as_tensor(part)[None]).logits[0] for part in parts]
        rows.append(torch.stack(found).mean(0) if pool == "mean" else torch.stack(found).amax(0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "pool"),
    [("single-label", "mean"), ("single-label", "max"), ("multi-label", "max"), ("regression", "mean")],
)
def test_the_loss_is_of_pooled_logits_whatever_the_micro_batches(make_setup, make_examples, tmp_path, kind, pool):
    """A loss a window, or windows of a text in two micro-batches, would teach that every part says the label."""
    rows = {"train": make_examples(kind, 24), "validation": make_examples(kind, 12, seed=9)}
    outcomes, setups = [], []
    for tokens in (None, 64):
        setup = make_setup(kind, dropout=0.0, lora=False, epochs=1, batch_size=24, micro_batch_tokens=tokens)
        put_into_windows(setup, rows, WindowSettings(4, pool), 16)
        counts = [len(sizes) for sizes in setup.train.dataset["windows"]]
        assert min(counts) == 1 or max(counts) > 3
        by_hand = logits_by_hand(setup, setup.train, pool)
        found = predict_logits(setup.model, setup.encoder.tokenizer, setup.train, batch_tokens=48)
        np.testing.assert_allclose(found, by_hand, atol=1e-5)
        outcomes.append(setup.run(tmp_path / str(tokens), distil=None))
        setups.append(setup)
    if kind != "regression":  # whose targets are standardised
        labels = torch.as_tensor(rows["train"]["label"][:])
        expected = distillation_loss(by_hand, labels, None, kind=kind).total.mean()
        assert outcomes[0].history[0]["hard_loss"] == pytest.approx(float(expected), abs=1e-5)
    losses = [outcome.history[0]["loss"] for outcome in outcomes]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for first, second in zip(*(weights(setup.model).values() for setup in setups), strict=True):
        torch.testing.assert_close(first, second, atol=2e-4, rtol=1e-3)
