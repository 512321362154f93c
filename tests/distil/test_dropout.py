"""The dropout of a training is apart from the model's own, and from the adapters'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlora.config import LoraConfig
from kdlora.distil.training_modes import dropout_set
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import load_encoder
from tiny import FAMILIES, batch, task


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropout_is_no_dropout_anywhere(tiny_model_folder, family):
    """Attention functions take their dropout as a number; one that is missed leaves the training noisy, unnoticed."""
    encoder = load_encoder(str(tiny_model_folder(family)), task(), seed=0)
    model, inputs = encoder.model.train(), batch(encoder.tokenizer)
    with torch.no_grad():
        own = [model(**inputs).logits for _ in range(2)]
        assert not torch.equal(*own)
        with dropout_set(model, 0.0) as places:
            assert places > 0
            off = [model(**inputs).logits for _ in range(2)]
        assert torch.equal(*off)
        torch.testing.assert_close(off[0], model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)
        assert not torch.equal(*[model.train()(**inputs).logits for _ in range(2)])  # the model's own is back


def test_the_adapters_dropout_is_apart(tiny_model_folder):
    """`lora.dropout` is an option of its own; setting one by the other would tune two things at once."""
    encoder = load_encoder(str(tiny_model_folder("bert")), task(), seed=0)
    model = add_adapter(encoder, LoraConfig(dropout=0.25), seed=0)

    def rates(adapter: bool) -> set[float]:
        return {
            module.p
            for name, module in model.named_modules()
            if isinstance(module, nn.Dropout) and ("lora_dropout" in name) is adapter
        }

    with dropout_set(model, None) as places:
        assert places == 0
        assert rates(adapter=False) == {0.1}
    with dropout_set(model, 0.5):
        assert (rates(adapter=False), rates(adapter=True)) == ({0.5}, {0.25})
    assert rates(adapter=False) == {0.1}
