"""Adapters: where they go, what is trained, and that saving and merging lose nothing."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import tiny
from experiments import edit_json
from kdlora.config import LoraSettings
from kdlora.errors import ModelError
from kdlora.models.adapters import (
    add_adapter,
    count_parameters,
    load_adapter,
    merge_student,
    resolve_targets,
    save_adapter,
)
from kdlora.models.encoders import Encoder, load_encoder

FAMILIES = tiny.FAMILIES + tiny.VARIANTS + tiny.DECODERS
TARGETS = {
    "bert": ["query", "value"],
    "bert-without-pooler": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "roberta": ["query", "value"],
    "deberta-v2": ["query_proj", "value_proj"],
    "electra": ["query", "value"],
    "mpnet": ["attn.q", "attn.v"],
    "modernbert": ["Wqkv"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
}
TASK = tiny.task(names=("bad", "so-so", "good"))
VARIANTS = {
    "plain": LoraSettings(),
    "rslora": LoraSettings(rslora=True),
    "dora": LoraSettings(dora=True),
    "gaussian": LoraSettings(init="gaussian"),
    "orthogonal": LoraSettings(init="orthogonal"),
    "rslora and dora": LoraSettings(rslora=True, dora=True),
    "embeddings": LoraSettings(targets="all-linear", embedding_rank=3),
    "embeddings, rslora and dora": LoraSettings(embedding_rank=3, rslora=True, dora=True),
}
CASES = [(family, "plain") for family in FAMILIES]
CASES += [(family, "embeddings") for family in ("bert", "deberta-v2", "modernbert", "llama", "gpt2")]
OTHERS = [variant for variant in VARIANTS if variant not in ("plain", "embeddings")]
CASES += [(family, variant) for family in ("bert", "modernbert") for variant in OTHERS]


def encoder_of(folder: Path) -> Encoder:
    return load_encoder(str(folder), TASK, seed=3)


def as_the_card_says(adapter: Path) -> transformers.PreTrainedModel:
    """Load the base by the line in the adapter's card."""
    lines = (adapter / "README.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("base = AutoModel"))
    names = {"AutoModelForSequenceClassification": AutoModelForSequenceClassification}
    return eval(line.removeprefix("base = "), names)  # noqa: S307 - our own line


def disturb(model: torch.nn.Module) -> None:
    """Move every trainable weight, as a training would."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))


@pytest.fixture
def adapted(tiny_model_folder):
    """Gives a family's model with a disturbed adapter, and its tokenizer."""

    def build(family: str, variant: str = "plain"):
        encoder = encoder_of(tiny_model_folder(family))
        model = add_adapter(encoder, VARIANTS[variant], seed=1)
        disturb(model)
        return model, encoder.tokenizer

    return build


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["dora", "embeddings"])
def test_exactly_adapter_and_fresh_modules_are_trained(tiny_model_folder, family, variant, caplog):
    """A head that stays frozen and random costs accuracy and shows nowhere; PEFT knows no targets for some families."""
    encoder = encoder_of(tiny_model_folder(family))
    with caplog.at_level("INFO", logger="kdlora"):
        assert resolve_targets(encoder.model, "query-value", encoder.fresh) == TARGETS[family]
    told = f"{TARGETS[family][0]} makes query, key and value in one projection" in caplog.text
    assert told == (family in ("modernbert", "gpt2"))
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    fresh_size = sum(
        parameter.numel() for name in encoder.fresh for parameter in encoder.model.get_submodule(name).parameters()
    )
    model = add_adapter(encoder, VARIANTS[variant], seed=1)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trainable if ".lora_" in name}
    copies = {f"base_model.model.{name}.modules_to_save.default" for name in encoder.fresh}
    assert adapters
    assert all(name.startswith(tuple(copies)) for name in trainable - adapters)
    counts = count_parameters(model)
    assert counts.head == fresh_size
    assert counts.trainable == counts.adapter + counts.head
    assert counts.total == sum(value.numel() for name, value in before.items() if "position_ids" not in name)
    disturb(model)
    model(**tiny.batch(encoder.tokenizer), labels=torch.tensor([0, 2])).loss.backward()
    idle = [name for name in trainable if not model.get_parameter(name).grad.abs().sum() > 0]
    assert idle == []
    frozen = [
        name for name, parameter in model.named_parameters() if name not in trainable and parameter.grad is not None
    ]
    assert frozen == []


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_an_untrained_adapter_changes_nothing_and_comes_from_its_seed(tiny_model_folder, family, init):
    """An adapter that begins elsewhere throws the pretraining away; one without a seed cannot be repeated."""
    plain = encoder_of(tiny_model_folder(family))
    encoders = [encoder_of(tiny_model_folder(family)) for _ in range(3)]
    models = []
    for encoder, seed in zip(encoders, (1, 1, 2), strict=True):
        torch.rand(7)
        state = torch.get_rng_state()
        models.append(add_adapter(encoder, LoraSettings(init=init, embedding_rank=2), seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(first[name], other[name]) for name in first if "embedding" not in name)
    expected = tiny.logits(plain.model, plain.tokenizer)
    assert torch.allclose(tiny.logits(models[0], plain.tokenizer), expected, atol=1e-5)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_merging_and_saving_change_nothing(tiny_model_folder, adapted, tmp_path, family, variant):
    """Accuracy is lost in merges (peft#1836, #2502), and what is measured must be what is shipped."""
    model, tokenizer = adapted(family, variant)
    expected = tiny.logits(model, tokenizer)
    merged = merge_student(model)
    assert torch.allclose(tiny.logits(merged, tokenizer), expected, atol=1e-4)
    parts = [name for name, _ in merged.named_modules() if "lora" in name or "modules_to_save" in name]
    assert parts == []
    plain = encoder_of(tiny_model_folder(family))
    assert type(merged) is type(plain.model)
    assert merged.state_dict().keys() == plain.model.state_dict().keys()
    assert not torch.allclose(tiny.logits(plain.model, tokenizer), expected, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(again, tokenizer), tiny.logits(merged, tokenizer))

    save_adapter(model, tmp_path / "adapter")
    base = as_the_card_says(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again, tokenizer), expected)
    assert torch.equal(tiny.logits(model, tokenizer), expected), "merging or saving changed the model"

    double = copy.deepcopy(model).double()
    expected = tiny.logits(double, tokenizer)
    assert torch.allclose(tiny.logits(merge_student(double), tokenizer), expected, rtol=0, atol=1e-9)
    assert torch.equal(tiny.logits(merge_student(merged), tokenizer), tiny.logits(merged, tokenizer))


def test_a_saved_adapter_names_its_base(tiny_model_folder, tmp_path):
    """An adapter on the `main` of tomorrow is another model; `experiment/test_finished.py` loads one."""
    encoder = encoder_of(tiny_model_folder("bert"))
    encoder.revision = "abc123"
    # A label is a cell of somebody's data, and the card is shown on the Hub.
    encoder.model.config.id2label = {0: "<img src=x>\n# owned", 1: "a`b", 2: "c"}
    save_adapter(add_adapter(encoder, LoraSettings(), seed=0), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_folder("bert").resolve())
    assert config["revision"] == "abc123"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}, "no pickle"
    assert "`<img src=x> # owned`, `` a`b ``, `c`." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("case", ["pickle", "link", "kind"])
def test_an_adapter_is_read_from_its_safetensors(tiny_model_folder, tmp_path, monkeypatch, case):
    """PEFT unpickles `adapter_model.bin` where there is nothing else, and we say that nothing is unpickled."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    save_adapter(add_adapter(encoder_of(tiny_model_folder("bert")), LoraSettings(), seed=0), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    if case == "kind":
        edit_json(tmp_path / "adapter_config.json", peft_type="IA3")
    else:
        weights.rename(tmp_path / "adapter_model.bin")
        weights.symlink_to("adapter_model.bin") if case == "link" else None
    with pytest.raises(ModelError, match=r"expected an adapter of peft_type LORA with its weights in"):
        load_adapter(encoder_of(tiny_model_folder("bert")), tmp_path)


@pytest.mark.parametrize("changes", [{"r": "x"}, {"target_modules": ["nothing"]}, {"r": 3}, {"lora_alpha": [1]}])
def test_a_damaged_adapter_is_no_traceback(tiny_model_folder, tmp_path, changes):
    save_adapter(add_adapter(encoder_of(tiny_model_folder("bert")), LoraSettings(), seed=0), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match="is damaged, or does not fit its base"):
        load_adapter(encoder_of(tiny_model_folder("bert")), tmp_path)


def test_an_adapter_is_loaded_where_its_base_is(tiny_model_folder, tmp_path, monkeypatch):
    """PEFT takes any GPU that it sees: a run on the CPU failed as it shipped where that GPU was full."""
    save_adapter(add_adapter(encoder_of(tiny_model_folder("bert")), LoraSettings(), seed=0), tmp_path)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("looked for a GPU"))
    load_adapter(encoder_of(tiny_model_folder("bert")), tmp_path)


def test_half_precision_is_merged_in_fp32(adapted):
    """A merge in bf16 rounds the adapter away, and NaN weights ship as a model that always says the first label."""
    model, tokenizer = adapted("bert")
    half = copy.deepcopy(model).to(torch.bfloat16)
    merged = merge_student(half)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert torch.allclose(tiny.logits(merged, tokenizer), tiny.logits(half.float(), tokenizer), atol=1e-4)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(ModelError, match="the training diverged"):
        merge_student(model)


def test_named_targets_reach_just_what_they_name(tiny_model_folder):
    """A name that ends like the head's must not pull the head in."""
    encoder = encoder_of(tiny_model_folder("roberta"))
    assert resolve_targets(encoder.model, ["key", "query"], encoder.fresh) == ["key", "query"]
    dense = resolve_targets(encoder.model, ["dense"], encoder.fresh)
    assert "roberta.encoder.layer.0.intermediate.dense" in dense
    assert not any("classifier" in name for name in dense)
    full = "roberta.encoder.layer.1.attention.self.query"
    model = add_adapter(encoder, LoraSettings(targets=(full,)), seed=0)
    assert {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name} == {
        f"base_model.model.{full}"
    }

    # FNet has no attention at all; the user chooses among its linear layers.
    config = transformers.FNetConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, intermediate_size=16)
    model = transformers.FNetForSequenceClassification(config)
    with pytest.raises(ModelError, match=r"all-linear.*intermediate\.dense \(3\), output\.dense \(3\)"):
        resolve_targets(model, "query-value", ["classifier"])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": "querry"}, r"'querry' names no linear layer of this 'roberta' model .* Did you mean 'query'\?"),
        ({"targets": "q_lin"}, r"Its linear layers are attention\.self\.query \(2\), attention\.self\.key \(2\)"),
        ({"targets": "classifier.dense"}, r"its new head is trained in full"),
        ({"targets": "LayerNorm"}, "'LayerNorm' names no linear layer"),
        ({"init": "orthogonal", "rank": 3}, "needs an even lora.rank, got 3"),
    ],
)
def test_targets_and_ranks_that_cannot_be_are_refused(tiny_model_folder, lora, message):
    """PEFT accepts a list in which one name matches: the others, and part of a rank, are silently without effect."""
    if "targets" in lora:
        lora = {"targets": ("query", lora["targets"])}
    with pytest.raises(ModelError, match=message):
        add_adapter(encoder_of(tiny_model_folder("roberta")), LoraSettings(**lora), seed=0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("DebertaForSequenceClassification", {"num_attention_heads": 2}, ["in_proj"]),
        ("FunnelForSequenceClassification", {"d_model": 16, "n_head": 2, "d_head": 8}, ["q_head", "v_head"]),
    ],
)
def test_other_architectures_are_found_by_their_names(name, options, expected):
    """`any other model: found` must hold for more than the seven."""
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    if "Funnel" in name:
        sizes = {"vocab_size": 64, "block_sizes": [1, 1], "d_inner": 16}
    model = kind(kind.config_class(**sizes, **options))
    assert resolve_targets(model, "query-value", ["classifier", "pooler"]) == expected


@pytest.mark.parametrize(("rslora", "scale"), [(False, 0.75), (True, 1.5)])
def test_the_adapter_of_the_word_embeddings_has_its_own_rank_and_scale(tiny_model_folder, rslora, scale):
    """PEFT begins it with N(0, 1): with the scale of the linear layers the first steps would be as large as a word."""
    encoder = encoder_of(tiny_model_folder("bert"))
    before = encoder.model.get_input_embeddings().weight.clone()
    model = add_adapter(encoder, LoraSettings(embedding_rank=4, embedding_alpha=3.0, rslora=rslora), seed=1)
    layer = model.base_model.model.get_input_embeddings()
    words, directions = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert words.shape == (4, len(before))
    assert (words == 0).all()
    with torch.no_grad():
        words[:, 7] = torch.tensor([1.0, 0.0, -2.0, 0.0])
    change = merge_student(model).get_input_embeddings().weight - before
    assert torch.allclose(change[7], scale * (directions[:, 0] - 2 * directions[:, 2]), atol=1e-5)
    assert (change[:7] == 0).all()
    assert (change[8:] == 0).all()
