"""The parts that recipes are made of: dropout, learning rates of their own, the annealed loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlora.config import DistilConfig, LoraConfig
from kdlora.distil.dropout import dropout_set
from kdlora.distil.learning_rates import parameter_groups
from kdlora.distil.losses import annealed
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


def test_groups_by_hand(tiny_model_folder):
    """A group that is left out would not be trained; one that is in twice would be trained twice as fast."""
    encoder = load_encoder(str(tiny_model_folder("bert")), task(), seed=0)
    model = add_adapter(encoder, LoraConfig(), seed=0)
    lora = LoraConfig(b_learning_rate_ratio=4.0, head_learning_rate_ratio=0.5)
    decayed = [name for name, _ in model.named_parameters() if not name.endswith("bias")]
    groups = parameter_groups(model, lora, 1e-2, 0.1, decayed)
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1e-2, 0.1, 4),  # A: two layers, query and value
        (5e-3, 0.1, 1),  # the classifier's weight
        (5e-3, 0.0, 1),  # its bias
        (4e-2, 0.1, 4),  # B
    ]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in model.parameters() if one.requires_grad)


def test_one_step_moves_each_part_at_its_rate(make_setup, tmp_path):
    """Rates that never reach the optimiser change nothing. AdamW's first step is the learning rate in each weight."""
    setup = make_setup(dropout=0.0, rows=8, epochs=1, weight_decay=0.0, learning_rate=1e-3, warmup_fraction=0.0)
    before = {name: value.detach().clone() for name, value in setup.model.named_parameters() if value.requires_grad}
    lora = LoraConfig(b_learning_rate_ratio=4.0, head_learning_rate_ratio=0.5)
    setup.run(tmp_path, lora=lora, distil=None)
    after = dict(setup.model.named_parameters())
    moved = {name: (after[name].detach() - value).abs().max().item() for name, value in before.items()}
    assert max(step for name, step in moved.items() if ".lora_B." in name) == pytest.approx(4e-3, rel=1e-3)
    assert max(step for name, step in moved.items() if ".modules_to_save." in name) == pytest.approx(5e-4, rel=1e-3)


def test_annealing_by_hand():
    """A schedule that starts at the end, or counts epochs for steps, still trains."""
    assert annealed(0.2, None, 0.7) == (0.2, 1.0)
    assert annealed(0.2, 0.5, 0.0) == pytest.approx((0.2, 0.1))
    assert annealed(0.2, 0.5, 0.25) == pytest.approx((0.6, 0.55))
    assert annealed(0.2, 0.5, 0.5) == pytest.approx((1.0, 1.0))
    assert annealed(0.2, 0.5, 0.9) == (1.0, 1.0)


def test_an_annealed_training_ends_with_the_labels(make_setup, tmp_path):
    """The weight of the teacher has to follow the steps of the training, and its loss the size of the logits."""
    setup = make_setup(epochs=4, learning_rate=1e-9)
    outcome = setup.run(tmp_path, distil=DistilConfig(alpha=0.0, loss="mse", anneal=0.5))
    first, *_, last = outcome.history
    assert first["loss"] != pytest.approx(first["hard_loss"])
    assert last["loss"] == pytest.approx(last["hard_loss"])
    assert last["soft_loss"] > first["soft_loss"]  # the student stands still while the teacher's logits grow
