"""Regression targets: there, and back again in the model itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from kdlora.config import LoraSettings
from kdlora.distil.standardise import TargetScale, fold_into_head
from kdlora.errors import ModelError
from kdlora.models.adapters import add_adapter, merge_student
from kdlora.models.encoders import load_encoder

FAMILIES = ("bert", "distilbert", "roberta", "deberta-v2", "electra", "mpnet", "modernbert")


def predict(model) -> torch.Tensor:
    ids = torch.tensor([[2, 17, 18, 19, 20, 3], [2, 40, 41, 42, 43, 3]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_there_and_back():
    """A population of labels measured in another precision, or another way, would not come back to the same values."""
    labels = np.array([1.0, 3.0, 5.0], dtype=np.float32)
    scale = TargetScale.of(labels)
    assert (scale.mean, scale.std) == pytest.approx((3.0, np.sqrt(8 / 3)))
    standardised = scale.standardise(torch.tensor(labels))
    assert standardised.mean().item() == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(scale.restore(standardised.numpy()), labels, rtol=1e-6)


def test_equal_labels():
    """A standard deviation of 0 turns every target into NaN."""
    scale = TargetScale.of(np.full(4, 7.0))
    assert scale == TargetScale(7.0, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_folded_into_the_head(tiny_model_folder, tasks, family, lora):
    """PEFT keeps the head twice: folding into the unused copy changes nothing, and nobody notices until the merge."""
    encoder = load_encoder(str(tiny_model_folder(family)), tasks["regression"], seed=1)
    model = add_adapter(encoder, LoraSettings(), seed=1) if lora else encoder.model
    scale = TargetScale(2000.0, 300.0)
    before = predict(model)
    fold_into_head(model, scale)
    torch.testing.assert_close(predict(model), before * 300.0 + 2000.0)
    merged = merge_student(model) if lora else model
    torch.testing.assert_close(predict(merged), before * 300.0 + 2000.0)


class Squashed(nn.Module):
    """A model that is not linear in its last layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1, bias=bias)

    def forward(self, input_ids, attention_mask):
        return SequenceClassifierOutput(logits=torch.tanh(self.head(input_ids.float().sum(1, keepdim=True))))


def test_models_that_cannot_be_folded():
    """A model that answers on another scale than it says must be refused, and left as it was."""
    model = Squashed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="Squashed: expected the last linear layer to give the prediction"):
        fold_into_head(model, TargetScale(10.0, 2.0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for unfit in (Squashed(bias=False), nn.Linear(2, 2)):
        with pytest.raises(ModelError, match="one output and a bias"):
            fold_into_head(unfit, TargetScale(10.0, 2.0))
