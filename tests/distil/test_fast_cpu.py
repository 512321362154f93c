"""The kernels of a training on the CPU compute what PyTorch computes, and leave a model as it was."""

import pytest
import torch
import transformers
from torch import nn

from kdlora.distil.cpu_kernels import (
    attention,
    dropout,
    dropped_steps,
    fast_on_cpu,
    keep_mask,
    kept_scale,
)
from kdlora.distil.precision import autocast, frozen_in_half
from tiny import DECODERS, FAMILIES

CPU = torch.device("cpu")


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 17, 18, 19, 20, 3], [2, 40, 3, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(**batch()).logits
    logits.float().square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["query-value", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES + DECODERS)
def test_one_step_equals_pytorchs(make_model, family, targets):
    """A backward written by hand that forgets a term trains, only worse."""
    model = make_model(family, targets=targets)
    logits, gradients = step(model)
    with fast_on_cpu(model, CPU) as layers:
        found, fast_gradients = step(model)
    assert layers > 6 or family == "gpt2"  # whose layers are of a class that we do not know
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    assert fast_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def other_model(family: str) -> nn.Module:
    """Give a classifier whose attention is not that of BERT's kin."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(
        **sizes, vocab_size=64, num_key_value_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForSequenceClassification")(config).train()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", ["EuroBert", "Llama"])
def test_shared_keys_and_causal_attention_are_kept(family, padded):
    """Fewer heads of keys than of queries were an error; a model that looks back only would look ahead."""
    model = other_model(family)
    rows = batch() if padded else {name: value[:1] for name, value in batch().items()}
    for half in (False, True):
        with autocast("bf16" if half else "fp32", CPU):
            expected = model(**rows).logits
            with fast_on_cpu(model, CPU):
                found = model(**rows).logits
                found.float().square().sum().backward()
        torch.testing.assert_close(found, expected, atol=2e-2 if half else 1e-5, rtol=2e-2 if half else 1e-5)
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with fast_on_cpu(model, CPU):
        assert step(model)[0].isfinite().all()


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_one_step_in_bf16_is_near_fp32(make_model, family):
    """The kernels must round no more than autocast does."""
    model = make_model(family)
    exact, gradients = step(model)
    with frozen_in_half(model, "bf16"), fast_on_cpu(model, CPU), autocast("bf16", CPU):
        found, fast_gradients = step(model)
    with frozen_in_half(model, "bf16"), autocast("bf16", CPU):
        plain, plain_gradients = step(model)
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3
    for name, gradient in gradients.items():
        allowed = 2 * (plain_gradients[name] - gradient).norm() + 0.01 * gradient.norm()
        assert (fast_gradients[name] - gradient).norm() <= allowed, name


def test_a_model_comes_back_as_it_was(make_model):
    """A layer of ours that stays in a shipped model would tie it to this package."""
    model = make_model("bert", rate=0.1)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attends = model.config._attn_implementation

    def cut_off() -> None:
        with fast_on_cpu(model, CPU):
            assert model.state_dict().keys() == state.keys()
            step(model)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cut_off()
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == attends


def test_other_devices_and_other_adapters_are_left_alone(make_model):
    """DoRA has a term that the kernel does not know; dropping it silently would be another method."""
    model = make_model("bert", dora=True)
    classes = [type(module) for module in model.modules()]
    with fast_on_cpu(model, torch.device("cuda")) as layers:
        assert layers == 0
        assert [type(module) for module in model.modules()] == classes
    logits, _ = step(model)
    with fast_on_cpu(model, CPU):
        torch.testing.assert_close(step(model)[0], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
    """Scaled by 1/(1 - rate) while 1/256ths are dropped, every activation would be off."""
    torch.manual_seed(0)
    values = torch.ones(1000, 1000, requires_grad=True)
    dropped = dropout(values, rate)
    assert (dropped == 0).float().mean().item() == pytest.approx(dropped_steps(rate) / 256, abs=2e-3)
    assert dropped.mean().item() == pytest.approx(1.0, abs=5e-3)
    assert dropped.max().item() == pytest.approx(kept_scale(rate))
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())


def test_attention_takes_queries_of_another_format():
    """Rotary positions are fp32 under autocast: a backward of mixed formats ends in an error, after the forward."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3))
    attention(query, key, value.bfloat16(), None, dropout=0.1, scale=0.5).float().sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in (query, key, value))

    # With value = identity the output is the dropped shares, and the gradient by value is their column sum.
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8, 4)
    value = torch.eye(8)[None, None].clone().requires_grad_()
    shares = attention(query, key, value, None, dropout=0.5, scale=1.0)
    shares.sum().backward()
    assert (shares == 0).any()
    torch.testing.assert_close(value.grad[0, 0], shares.detach()[0, 0].sum(0)[:, None].expand(8, 8))

    # `random_()` without a lower bound leaves the top bit zero: every eighth element would drop twice as often.
    torch.manual_seed(0)
    keep = keep_mask(torch.Size((100_000, 8)), 0.25)
    assert set(keep.unique().tolist()) == {-1, 0}
    assert torch.allclose(keep.float().mean(0), torch.tensor(-0.75), atol=0.01)
