"""The number format, dropout, and the kernels of a training on the CPU, which leave a model as it was."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from kdlora.config import LoraSettings
from kdlora.distil import precision as precision_module
from kdlora.distil.cpu_kernels import Dropout, attend, dropped_steps, fast_on_cpu, fast_reading, kept_scale
from kdlora.distil.losses import last_linear
from kdlora.distil.precision import (
    autocast,
    dropout_set,
    frozen_in_half,
    kept_exact,
    resolve_precision,
    settle_precision,
)
from kdlora.errors import ConfigError, ModelError
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import Encoder, load_encoder
from tiny import DECODERS, FAMILIES, task
from tiny import batch as two_texts

CPU = torch.device("cpu")


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 17, 18, 19, 20, 3], [2, 40, 3, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("family", FAMILIES)
def test_cast_once_equals_cast_every_time(make_model, family):
    """Casting more than autocast does (norms, embeddings, adapters) saves nothing, and costs accuracy."""
    model = make_model(family).eval()
    with autocast("bf16", CPU):
        expected, gradients = step(model)
        with frozen_in_half(model, "bf16") as layers:
            found, same = step(model)
    assert layers > 6
    assert torch.equal(expected, found)
    assert gradients.keys() == same.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, same[name]) for name, value in gradients.items())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_does_not_hold_the_weights_twice():
    """Cast weights kept from batch to batch take 2 bytes a parameter more than a large teacher is said to need."""
    for device, kept in ((torch.device("cuda"), False), (CPU, True)):
        with autocast("fp16", device):
            assert torch.is_autocast_cache_enabled() == kept


def test_what_is_not_a_plain_layer_and_what_is_elsewhere_stays(make_model):
    """DoRA divides by the norm of the base weight; a weight that is also an embedding would change the embedding."""
    model = make_model(dora=True)
    logits, _ = step(model)
    with fast_on_cpu(model, CPU):
        torch.testing.assert_close(step(model)[0], logits, atol=1e-5, rtol=1e-5)
    with fast_on_cpu(model, torch.device("cuda")) as layers:
        assert layers == 0
    with frozen_in_half(model.eval(), "bf16") as layers:
        assert layers > 0
        assert {value.dtype for name, value in model.named_parameters() if ".base_layer." in name} == {torch.float32}
    shared = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "output": nn.Linear(4, 4)}).requires_grad_(False)
    shared["output"].weight = shared["embedding"].weight
    with frozen_in_half(shared, "bf16") as layers:
        assert layers == 0


@pytest.mark.parametrize(
    ("flags", "speed_up", "precision", "reason"),
    [
        ({"amx_bf16", "avx512_bf16"}, 2.0, "bf16", "the CPU's bf16 products (amx_bf16) are faster than fp32's"),
        ({"avx512_bf16"}, 0.5, "fp32", "the CPU's bf16 products (avx512_bf16) are no faster than fp32's"),
        ({"bf16"}, 1.1, "fp32", "the CPU's bf16 products (bf16) are no faster than fp32's"),
        ({"avx512f", "avx2"}, 9.0, "fp32", "the CPU has no bf16 products"),
    ],
)
def test_precision_of_a_cpu(monkeypatch, flags, speed_up, precision, reason):
    """One instruction set is half as fast as fp32 on one maker's processors, and four times as fast on another's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision_module, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(precision_module, "_bf16_speed_up", lambda: speed_up)
    found = resolve_precision("auto", "auto")
    assert (found[0], found[1].removesuffix(", as timed")) == (precision, reason)
    slow = "" if precision == "bf16" else ", though bf16 is no faster than fp32 on this machine"
    assert resolve_precision("bf16", "cpu") == ("bf16", "as set" + slow)
    assert resolve_precision("fp32", "cpu") == ("fp32", "as set")


def test_the_timing_of_bf16_beside_another_process(monkeypatch):
    """A process that starts during the timing made bf16 look slow, and everything after it ran at half the speed."""
    clock, products, seen = [0.0], [0], set()

    def product(left: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        products[0] += 1
        seen.add((left.dtype, torch.get_num_threads()))
        beside = 10 if products[0] > 8 else 1
        clock[0] += beside * (5.0 if left.dtype == torch.float32 else 1.0)
        return left

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(precision_module.time, "perf_counter", lambda: clock[0])
    threads = torch.get_num_threads()
    assert precision_module._bf16_speed_up.__wrapped__() == 5
    assert seen == {(torch.float32, 1), (torch.bfloat16, 1)}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), "bf16"), ((7, 5), "fp16")])
def test_precision_of_a_gpu(monkeypatch, capability, expected):
    """A T4 runs bf16 without a word, and slowly."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    precision, reason = resolve_precision("auto", "auto")
    assert precision == expected
    assert reason.startswith("Some GPU has ")
    assert ("no faster" in resolve_precision("bf16", "cuda")[1]) == (expected == "fp16")
    assert resolve_precision("auto", "cpu")[0] in ("bf16", "fp32")


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("bf61", "cpu", r"run.precision is one of .*got 'bf61'. Did you mean 'bf16'"),
        ("fp16", "cpu", r"run\.precision is fp16, which is for CUDA"),
        ("fp32", "gpu", r"run.device is one of .*got 'gpu'"),
        ("fp32", "cuda", "finds no CUDA device"),
    ],
)
def test_bad_settings(monkeypatch, tmp_path, precision, device, message):
    """A misspelt precision must not fall back to another one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        settle_precision(precision, device, tmp_path / "precision.json")


def test_auto_is_timed_once_for_all_that_share_a_file(tmp_path, monkeypatch):
    """Two timings of one machine can differ: arms in two number formats, and a checkpoint that refuses its own run."""
    timings = iter([1.3, 1.1, 1.1])
    monkeypatch.setattr(precision_module, "_cpu_flags", lambda: frozenset({"amx_bf16"}))
    monkeypatch.setattr(precision_module, "_bf16_speed_up", lambda: next(timings))
    file = tmp_path / "new" / "precision.json"
    answers = [settle_precision("auto", "cpu", file) for _ in range(3)]
    assert answers == [("bf16", "the CPU's bf16 products (amx_bf16) are faster than fp32's, as timed")] * 3
    assert settle_precision("fp32", "cpu", file) == ("fp32", "as set")
    file.write_text("{")  # a damaged answer is no answer
    assert settle_precision("auto", "cpu", file)[0] == "fp32"
    assert settle_precision("auto", "cpu", tmp_path / "other.json")[0] == "fp32"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropout_is_no_dropout_anywhere(tiny_model_folder, family):
    """Attention functions take their dropout as a number; one that is missed leaves the training noisy, unnoticed."""
    encoder = load_encoder(str(tiny_model_folder(family)), task(), seed=0)
    model, inputs = encoder.model.train(), two_texts(encoder.tokenizer)
    with torch.no_grad():
        own = [model(**inputs).logits for _ in range(2)]
        assert not torch.equal(*own)
        with dropout_set(model, 0.0) as places:
            assert places > 0
            off = [model(**inputs).logits for _ in range(2)]
        assert torch.equal(*off)
        torch.testing.assert_close(off[0], model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)
        assert not torch.equal(*[model.train()(**inputs).logits for _ in range(2)])  # the model's own is back


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(**batch()).logits
    logits.float().square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "targets"),
    [*((family, "query-value") for family in FAMILIES + DECODERS), ("bert", "all-linear"), ("llama", "all-linear")],
)
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


@pytest.mark.parametrize(("family", "own"), [("Longformer", {"attention_window": 4}), ("ConvBert", {"head_ratio": 1})])
def test_layers_read_transposed_rows_and_are_changed_in_place(family, own):
    """Both ended a training of adapters on a CPU with an error of autograd."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=64, pad_token_id=0, **sizes, **own)
    encoder = Encoder(getattr(transformers, f"{family}ForSequenceClassification")(config), None, ("classifier",), "")
    model = add_adapter(encoder, LoraSettings(dropout=0.0, targets="all-linear"), seed=0).train()
    with dropout_set(model, 0.0):
        logits, gradients = step(model)
        with fast_on_cpu(model, CPU):
            found, fast_gradients = step(model)
    torch.testing.assert_close((found, fast_gradients), (logits, gradients), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_only_reads_is_packed_and_comes_back_as_it_was(make_model, family):
    """Scores in fp32 took twice as long; a model that stays packed no longer learns."""
    model = make_model(family).eval()
    model.base_model.requires_grad_(True)
    before = [(name, type(module)) for name, module in model.named_modules()]
    expected = model(**batch()).logits
    with fast_reading(model), torch.inference_mode():
        layers = {type(module).__name__ for module in model.modules()}
        torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-5, rtol=1e-5)
    assert layers & {"_FrozenLayer", "_AdaptedLayer"}
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_head_is_found_where_a_layer_is_as_wide(with_adapter):
    """XLM-R names its head before its layers: of 768 labels the last layer got the bias, and the head none."""
    settings = XLMRobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=16
    )
    settings.num_labels = 16
    model = XLMRobertaForSequenceClassification(settings)
    head = model.classifier.out_proj
    if with_adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]))
        head = model.base_model.model.classifier.modules_to_save["default"].out_proj
    assert last_linear(model, 16) is head


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_reads_in_half_on_packed_weights_and_comes_back_exact(tiny_model_folder, family):
    """Under autocast labelling took a third longer; a head of ratings in half has steps of 8 at 2,000."""
    model = load_encoder(str(tiny_model_folder(family)), task("regression"), seed=1).model.eval()
    head = last_linear(model, 1, biased=False)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with autocast("bf16", CPU), torch.inference_mode(), kept_exact(head):
        expected = model(**batch()).logits
    with fast_reading(model, "bf16", exact=head), autocast("bf16", CPU), torch.inference_mode(), kept_exact(head):
        assert head.weight.dtype == torch.float32
        assert sum(parameter.dtype == torch.bfloat16 for parameter in model.parameters()) > 6
        torch.testing.assert_close(model(**batch()).logits, expected, atol=2e-2, rtol=2e-2)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("family", "padded"), [("EuroBert", True), ("EuroBert", False), ("Llama", False)])
def test_shared_keys_and_causal_attention_are_kept(family, padded):
    """Fewer heads of keys than of queries were an error; a model that looks back only would look ahead."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).train()
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


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "deberta-v2"])
def test_one_step_in_bf16_is_near_fp32(make_model, family):
    """The kernels must round no more than autocast does; DeBERTa wants queries in bf16, which DoRA left in fp32."""
    model = make_model(family, dora=family == "deberta-v2")
    exact, gradients = step(model)
    with frozen_in_half(model, "bf16"), fast_on_cpu(model, CPU), autocast("bf16", CPU):
        found, fast_gradients = step(model)
    with frozen_in_half(model, "bf16"), autocast("bf16", CPU):
        plain, plain_gradients = step(model)
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3
    for name, gradient in gradients.items():
        allowed = 2 * (plain_gradients[name] - gradient).norm() + 0.01 * gradient.norm()
        assert (fast_gradients[name] - gradient).norm() <= allowed, name


def test_a_processor_that_packs_no_bf16_trains_on_pytorchs_layers(make_model, monkeypatch):
    """On AVX2 each arm with adapters ended with an error of oneDNN, after its teacher had trained for hours."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = make_model("bert")
    with frozen_in_half(model, "bf16"), fast_on_cpu(model, CPU):
        assert not {"_FrozenLayer", "_AdaptedLayer"} & {type(module).__name__ for module in model.modules()}
    with fast_on_cpu(model, CPU):  # in fp32 they are packed as ever
        assert "_AdaptedLayer" in {type(module).__name__ for module in model.modules()}


def test_a_model_that_cannot_compute_in_half_precision_is_told():
    """DeBERTa's first version fills bf16 scores with fp32's lowest number: PyTorch's error named no way out."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.DebertaForSequenceClassification(transformers.DebertaConfig(vocab_size=64, **sizes))
    with pytest.raises(ModelError, match=r"cannot compute in bf16.*set run.precision to fp32"), autocast("bf16", CPU):
        model(**batch())
    with pytest.raises(RuntimeError, match="shapes"), autocast("bf16", CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_a_model_comes_back_as_it_was(make_model):
    """A layer of ours that stays in a shipped model would tie it to this package."""
    model = make_model("bert", rate=0.1)
    dropouts = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    with dropout_set(model, 0.5):  # `lora.dropout` is an option of its own
        assert {("lora_dropout" in name, module.p) for name, module in dropouts} == {(True, 0.1), (False, 0.5)}
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


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
    """Scaled by 1/(1 - rate) while 1/256ths are dropped, or by bytes whose top bit is zero, all would be off."""
    torch.manual_seed(0)
    values = torch.ones(1000, 1000, requires_grad=True)
    dropped = Dropout.apply(values, rate)
    shares = (dropped == 0).view(-1, 8).float().mean(0)  # eight of them are drawn at once
    assert shares.tolist() == pytest.approx([dropped_steps(rate) / 256] * 8, abs=5e-3)
    assert dropped.mean().item() == pytest.approx(1.0, abs=5e-3)
    assert dropped.max().item() == pytest.approx(kept_scale(rate))
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())


def test_attention_takes_queries_of_another_format():
    """Rotary positions are fp32 under autocast: a backward of mixed formats ends in an error, after the forward."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3))
    attend(None, query, key, value.bfloat16(), None, dropout=0.1, scaling=0.5)[0].float().sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in (query, key, value))

    # With value = identity the output is the dropped shares, and the gradient by value is their column sum.
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8, 4)
    value = torch.eye(8)[None, None].clone().requires_grad_()
    shares, _ = attend(None, query, key, value, None, dropout=0.5, scaling=1.0)
    shares.sum().backward()
    assert (shares == 0).any()
    torch.testing.assert_close(value.grad[0, 0], shares.detach()[0, :, 0].sum(0)[:, None].expand(8, 8))
