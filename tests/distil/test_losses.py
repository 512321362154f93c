"""Losses against values computed by hand and float64 references, and the scale of a regression's targets."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit, log_softmax, rel_entr, softmax
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from kdlora.config import LoraSettings
from kdlora.distil.losses import (
    LossSums,
    TargetScale,
    binary_kl,
    distillation_loss,
    fold_into_head,
    softened_kl,
    start_at_shares,
)
from kdlora.errors import ConfigError, DataError, ModelError
from kdlora.models.adapters import add_adapter, merge_student
from kdlora.models.encoders import Encoder, load_encoder
from tiny import FAMILIES


def reference_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    return rel_entr(p, q).sum(axis=1) * temperature**2


def reference_binary_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p, q = expit(teacher / temperature), expit(student / temperature)
    return (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean(axis=1) * temperature**2


def reference_hard(kind: str, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if kind == "single-label":
        return -log_softmax(logits, axis=1)[np.arange(len(labels)), labels] * weights[labels]
    if kind == "multi-label":
        return -np.where(labels > 0, weights * log_expit(logits), log_expit(-logits)).mean(axis=1)
    return (logits[:, 0] - labels) ** 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["single-label", "multi-label", "regression"]),
    rows=st.integers(1, 5),
    alpha=st.floats(0.0, 1.0),
    loss=st.sampled_from(["kl", "mse"]),
    temperature=st.floats(0.5, 20.0),
    weighed=st.booleans(),
)
def test_the_whole_loss_matches_float64(seed, kind, rows, alpha, loss, temperature, weighed):
    """A swapped direction, a lost T², a term of another scale, or class weights divided by their sum, still train."""
    draw = np.random.default_rng(seed)
    width = 1 if kind == "regression" else int(draw.integers(2, 6))
    student, teacher = draw.normal(size=(2, rows, width)) * 3
    labels = {
        "single-label": draw.integers(width, size=rows),
        "multi-label": draw.integers(2, size=(rows, width)).astype(float),
        "regression": draw.normal(size=rows),
    }[kind]
    weights = draw.uniform(0.3, 4.0, width) if weighed and kind != "regression" else np.ones(width)
    hard = reference_hard(kind, student, labels, weights)
    if loss == "mse" or kind == "regression":
        soft = ((student - teacher) ** 2).mean(axis=1)
    else:
        soft = (reference_kl if kind == "single-label" else reference_binary_kl)(student, teacher, temperature)
    expected = alpha * hard + (1 - alpha) * soft
    arguments = {"kind": kind, "alpha": alpha, "temperature": temperature, "loss": loss}
    arguments["class_weights"] = torch.tensor(weights) if weighed and kind != "regression" else None
    exact = distillation_loss(*map(torch.tensor, (student, labels, teacher)), **arguments)
    np.testing.assert_allclose(exact.total, expected, rtol=1e-9, atol=1e-9 * temperature**2)
    assert (exact.soft >= -1e-12).all()
    single = [torch.tensor(values, dtype=torch.float32) for values in (student, teacher)]
    targets = torch.tensor(labels) if kind == "single-label" else torch.tensor(labels, dtype=torch.float32)
    rounded = distillation_loss(single[0], targets, single[1], **arguments)
    np.testing.assert_allclose(rounded.total, expected, rtol=1e-3, atol=2e-5 * max(1.0, temperature**2))


def test_extreme_logits_no_teacher_and_flat_values():
    """A sure teacher (probability 0 in float32) times a log of 0 gives NaN in the naive formula."""
    teacher, student = torch.tensor([[500.0, -500.0]]), torch.tensor([[-500.0, 500.0]])
    assert softened_kl(student, teacher, 1.0).item() == pytest.approx(1000.0, rel=1e-5)
    assert binary_kl(student, teacher, 1.0).item() == pytest.approx(500.0, rel=1e-5)

    # The control arm must not be weighed by alpha: half a learning rate is no control.
    logits, labels = torch.randn(3, 2), torch.tensor([0, 1, 1])
    terms = distillation_loss(logits, labels, None, kind="single-label", alpha=0.25)
    assert terms.soft is None
    assert torch.equal(terms.total, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))

    # A (rows,) against (rows, 1) difference broadcasts to rows × rows, and trains towards the mean.
    flat = distillation_loss(
        torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), torch.tensor([[3.0], [2.0]]), kind="regression"
    )
    assert (flat.hard.tolist(), flat.soft.tolist()) == ([1.0, 4.0], [4.0, 0.0])


def test_sums_are_exact_on_apples_devices_too():
    """Its devices have no float64, so that the documented script ended as it began there."""
    sums = LossSums(torch.device("mps"))
    terms = distillation_loss(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]), None, kind="single-label")
    sums.add(terms, 1)
    assert (sums.sums.device.type, sums.sums.dtype) == ("cpu", torch.float64)
    assert sums.sums[1] == terms.hard.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32(dtype):
    """In bfloat16 the loss itself would be rounded to three digits."""
    student, teacher = torch.randn(2, 4), torch.randn(2, 4)
    labels = torch.tensor([1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distillation_loss(student.to(dtype), labels, teacher.to(dtype), kind="single-label")
    expected = distillation_loss(student.to(dtype).double(), labels, teacher.to(dtype).double(), kind="single-label")
    for ours, exact in ((terms.total, expected.total), (terms.hard, expected.hard), (terms.soft, expected.soft)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be finite and above 0"),
        ({"temperature": math.inf}, r"temperature must be finite and above 0"),
        ({"alpha": 1.1}, r"distil\.alpha .* 0 to 1"),
        ({"alpha": math.nan}, r"distil\.alpha .* 0 to 1"),
        ({"loss": "KL"}, r"distil\.loss is one of kl, mse; got 'KL'"),
        ({"kind": "multilabel"}, r"kind is one of single-label, .*; got 'multilabel'"),
    ],
)
def test_settings_out_of_range(wrong, message):
    """A temperature of 0 gives NaN weights; an alpha above 1 trains away from the teacher; a kind misspelt is another.

    None of them says so.
    """
    with pytest.raises(ConfigError, match=message):
        distillation_loss(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 2), **{"kind": "single-label", **wrong})


@pytest.mark.parametrize(
    ("kind", "logits", "labels", "teacher"),
    [
        *(("single-label", (3, 2), (3,), shape) for shape in ((1, 2), (3,), (3, 1), (3, 3))),
        ("single-label", (3, 2), (3, 2), (3, 2)),
        ("multi-label", (3, 2), (3,), (3, 2)),
        ("regression", (3, 1), (2,), (3, 1)),
    ],
)
def test_another_shape(kind, logits, labels, teacher):
    """By broadcasting, every row is taught one and the same teacher row, or soft targets are read as labels."""
    fault, message = DataError, rf"do not fit logits .* {kind}"
    if logits != teacher:
        fault, message = ModelError, r"\(3, 2\).*\(" + ", ".join(map(str, teacher))
    with pytest.raises(fault, match=message):
        distillation_loss(torch.zeros(logits), torch.zeros(labels).long(), torch.zeros(teacher), kind=kind)


def predict(model) -> torch.Tensor:
    ids = torch.tensor([[2, 17, 18, 19, 20, 3], [2, 40, 41, 42, 43, 3]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_there_and_back():
    """A population of labels measured in another precision, or another way, would not come back to the same values."""
    labels = np.array([1.0, 3.0, 5.0], dtype=np.float32)
    scale = TargetScale.of(labels)
    assert (scale.mean, scale.std) == pytest.approx((3.0, np.sqrt(8 / 3)))
    np.testing.assert_allclose(scale.restore(scale.standardise(torch.tensor(labels)).numpy()), labels, rtol=1e-6)
    assert TargetScale.of(np.full(4, 7.0)) == TargetScale(7.0, 1.0), "a deviation of 0 makes every target NaN"

    # A model that answers on another scale than it says must be refused, and left as it was.
    model = Squashed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="Squashed: expected a head whose last layer is linear"):
        fold_into_head(model, TargetScale(10.0, 2.0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for unfit in (Squashed(bias=False), nn.Linear(2, 2)):
        with pytest.raises(ModelError, match="one output and a bias"):
            fold_into_head(unfit, TargetScale(10.0, 2.0))


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


def test_an_adapter_of_rank_1_is_no_head():
    """CamemBERT names its head first: a regression was refused after its training."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    model = transformers.CamembertForSequenceClassification(transformers.CamembertConfig(**sizes))
    adapted = add_adapter(Encoder(model, None, ("classifier",), ""), LoraSettings(rank=1), seed=1)
    before = predict(adapted)
    fold_into_head(adapted, TargetScale(2000.0, 300.0))
    torch.testing.assert_close(predict(adapted), before * 300.0 + 2000.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["tokens", "multi-label"])
def test_a_head_begins_at_the_labels_shares(tiny_model_folder, tasks, family, lora, kind):
    """Silent failure: a teacher that calls every word none, or gives no text a label from first step to last."""
    encoder = load_encoder(str(tiny_model_folder(family)), tasks[kind], seed=1)
    model = add_adapter(encoder, LoraSettings(), seed=1) if lora else encoder.model
    size, draw = tasks[kind].num_labels, np.random.default_rng(0)
    rare = np.linspace(0.005, 0.08, size)
    if kind == "multi-label":  # a label of weight 5 counts as often as it is had
        labels, weights = (draw.random((20_000, size)) < rare).astype(np.float32), torch.linspace(1.0, 5.0, size)
        odds = weights.numpy() * labels.mean(axis=0) / (1 - labels.mean(axis=0))
        shares = odds / (1 + odds)
    else:
        labels, weights = draw.choice(size, 20_000, p=[1 - rare[1:].sum(), *rare[1:]]), None
        shares = np.bincount(labels) / len(labels)
    start_at_shares(model, tasks[kind], labels, weights)
    merged = merge_student(model) if lora else model
    head = merged.get_submodule("classifier")
    getattr(head, "out_proj", head).weight.data.zero_()
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = merged.eval()(ids, attention_mask=torch.ones_like(ids)).logits.detach()
    found = logits.sigmoid()[0] if kind == "multi-label" else logits.softmax(-1)[0, 0]
    torch.testing.assert_close(found, torch.tensor(shares, dtype=torch.float32), rtol=0.02, atol=1e-4)


class Squashed(nn.Module):
    """A model that is not linear in its last layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1, bias=bias)

    def forward(self, input_ids, attention_mask):
        return SequenceClassifierOutput(logits=torch.tanh(self.head(input_ids.float().sum(1, keepdim=True))))
