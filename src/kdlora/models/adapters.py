"""LoRA adapters through PEFT: where they go, what is trained beside them, saving, merging, counting."""

from __future__ import annotations

import copy
import functools
import logging
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdlora.config import LoraSettings
from kdlora.errors import ModelError, did_you_mean, first_line
from kdlora.foreign import as_code, read_json
from kdlora.models.encoders import Encoder, save_encoder
from kdlora.models.loading import is_decoder
from kdlora.models.settings import ADAPTER

logger = logging.getLogger(__name__)

QUERY_VALUE = (
    ("query_proj", "value_proj"),  # DeBERTa-v2 and v3
    ("q_lin", "v_lin"),  # DistilBERT
    ("attn.q", "attn.v"),  # MPNet
    ("query", "value"),  # BERT, RoBERTa, ELECTRA and their kin
    ("q_proj", "v_proj"),  # EuroBERT; Llama, Qwen, Gemma, Mistral and their kin
    ("q_head", "v_head"),  # Funnel
)
"""Names of the query and value projections, by architecture."""

FUSED = ("Wqkv", "qkv_proj", "query_key_value", "in_proj", "c_attn")
"""Names of projections that make query, key and value at once: ModernBERT's first, GPT-2's last."""

LINEAR = (nn.Linear, Conv1D)
"""What takes an adapter; the second is GPT-2's, a linear layer whose weight lies transposed."""

_quietly = functools.partial(warnings.catch_warnings, action="ignore", category=FutureWarning)
"""PEFT reads a property that transformers renamed."""

ADAPTER_PART = re.compile(r"\.lora_[a-zA-Z_]+(\.|$)")
TRAINED_COPY = ".modules_to_save."


@dataclass(frozen=True)
class ParameterCounts:
    """How large a model is, in parameters."""

    total: int  # of the *deployed* model
    trainable: int  # by the optimiser
    adapter: int  # LoRA's matrices (and DoRA's magnitudes)
    head: int  # what is trained in full beside them; of a model without adapter, all that is not encoder


def resolve_targets(model: PreTrainedModel, targets: str | Sequence[str], fresh: Sequence[str]) -> list[str]:
    linear = _linear_layers(model, fresh)
    if targets == "query-value":
        names: Sequence[str] = _query_value(model, linear)
    elif targets == "all-linear":
        names = sorted({name.rpartition(".")[2] for name in linear})
    else:
        names = targets
    chosen: list[str] = []
    for name in names:
        matched = [layer for layer in linear if _ends_with(layer, name)]
        if not matched:
            near = did_you_mean(name, {part for one in linear for part in (_within_layer(one), one.rpartition(".")[2])})
            raise ModelError(
                f"lora.targets: {name!r} names no linear layer of this {model.config.model_type!r} model (its new head "
                f"is trained in full).{near} Its linear layers are {_candidates(linear)}"
            )
        # The name alone, if PEFT would find just the matched layers by it; else their full names.
        found = {layer for layer, _ in model.named_modules() if _ends_with(layer, name)}
        chosen += [name] if found <= set(linear) else matched
    return list(dict.fromkeys(chosen))


def add_adapter(encoder: Encoder, lora: LoraSettings, *, seed: int) -> PeftModel:
    """Put LoRA adapters into an encoder and leave trainable exactly these and the fresh modules."""
    targets = resolve_targets(encoder.model, lora.targets, encoder.fresh)
    linear = _linear_layers(encoder.model, encoder.fresh)
    layers = [layer for layer in linear if any(_ends_with(layer, name) for name in targets)]
    if lora.init == "orthogonal" and lora.rank % 2:
        raise ModelError(f"lora.init: orthogonal needs an even lora.rank, got {lora.rank}")
    embeddings = encoder.model.get_input_embeddings()
    words = [name for name, module in encoder.model.named_modules() if module is embeddings and lora.embedding_rank]
    with _quietly(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = PeftLoraConfig(
            task_type=TaskType.TOKEN_CLS if encoder.reads_words else TaskType.SEQ_CLS,
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=[*targets, *words],
            rank_pattern=dict.fromkeys(words, lora.embedding_rank),
            alpha_pattern=dict.fromkeys(words, lora.embedding_alpha),
            fan_in_fan_out=any(isinstance(encoder.model.get_submodule(name), Conv1D) for name in layers),
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            init_lora_weights=True if lora.init == "default" else lora.init,
            modules_to_save=[name for name in encoder.fresh if name not in ("classifier", "score")],  # PEFT adds these
            revision=encoder.revision,
        )
        model = get_peft_model(encoder.model, config)
    _check_trainable(model, [*layers, *words], encoder.fresh)
    logger.info("LoRA on %s: %d layers", ", ".join([*targets, *words]), len(layers))
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save adapter and fresh modules so that `PeftModel.from_pretrained` restores them on the *original* base."""
    # No embeddings: PEFT's default would ask the Hub about them.
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights = True
    config.inference_mode = True
    config.modules_to_save = sorted(set(config.modules_to_save) & _holding(model, ModulesToSaveWrapper))
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(contiguous, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _describe(folder, config, model.config)


def load_adapter(encoder: Encoder, folder: Path) -> PeftModel:
    """Put a saved adapter with its head on its freshly loaded base, in place; merged, it is what was trained."""
    kind, weights = read_json(folder / ADAPTER).get("peft_type"), folder / SAFETENSORS_WEIGHTS_NAME
    if kind != "LORA" or weights.is_symlink() or not weights.is_file():  # PEFT would unpickle adapter_model.bin
        raise ModelError(
            f"{folder}: expected an adapter of peft_type LORA with its weights in {weights.name}, got peft_type "
            f"{kind!r:.60} and the files {', '.join(sorted(path.name for path in folder.iterdir())):.200}. Delete the "
            "run's folder, and the same command trains it again"
        )
    try:
        with _quietly():
            return PeftModel.from_pretrained(encoder.model, folder, torch_device="cpu")  # else on any GPU in sight
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder} is damaged, or does not fit its base: {first_line(error)}. Delete the run's folder, and the "
            "same command trains it again"
        ) from None


def add_base(folder: Path, encoder: Encoder, *, address: Path) -> None:
    """Put an adapter's base beside it, where that base lies nowhere else (a student made from layers)."""
    save_encoder(encoder, folder / "base")
    config = PeftLoraConfig.from_pretrained(folder)
    config.base_model_name_or_path, config.revision = str(address.resolve() / "base"), None
    _describe(folder, config, encoder.model.config)


def merge_student(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Merge the adapter into the weights, in fp32 at least.

    Args:
        model: as a training left it, with or without an adapter; it stays as it is.

    Returns:
        A plain transformers model in evaluation mode, with the trained fresh modules in their places.

    Raises:
        ModelError: the weights hold values that are not finite.

    Examples:
        >>> model = merge_student(trained.model)
    """
    student = copy.deepcopy(model)
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in student.parameters()):
        student = student.float()
    broken = [name for name, parameter in student.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        raise ModelError(
            f"the trained weights are not finite ({broken[0]} and {len(broken) - 1} more): the training diverged. "
            "Lower the learning rate"
        )
    plain: PreTrainedModel = student.merge_and_unload(safe_merge=True) if isinstance(student, PeftModel) else student
    plain.requires_grad_(True)
    plain.name_or_path = plain.config._name_or_path = ""
    return plain.eval()


def count_parameters(model: PreTrainedModel | PeftModel) -> ParameterCounts:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapter = sum(size for name, size in sizes.items() if ADAPTER_PART.search(name))
    if isinstance(model, PeftModel):
        head = sum(size for name, size in sizes.items() if TRAINED_COPY in name)
        return ParameterCounts(sum(sizes.values()) - adapter - head, trainable, adapter, head)
    encoder = model.base_model_prefix + "."
    head = sum(size for name, size in sizes.items() if not name.startswith(encoder))
    return ParameterCounts(sum(sizes.values()), trainable, 0, head)


def _linear_layers(model: PreTrainedModel, fresh: Sequence[str]) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and not any(name == own or name.startswith(own + ".") for own in fresh)
    ]


def _query_value(model: PreTrainedModel, linear: Sequence[str]) -> tuple[str, ...]:
    for names in QUERY_VALUE:
        query, value = (sum(_ends_with(layer, name) for layer in linear) for name in names)
        if query == value > 0:
            return names
    for fused in FUSED:
        if any(_ends_with(layer, fused) for layer in linear):
            logger.info("%s makes query, key and value in one projection: the adapter is on all three", fused)
            return (fused,)
    raise ModelError(
        f"kdlora knows no query and value projections of a {model.config.model_type!r} model. Set lora.targets to "
        f"all-linear, or to some of its linear layers: {_candidates(linear)}"
    )


def _ends_with(layer: str, name: str) -> bool:
    return layer == name or layer.endswith("." + name)


def _within_layer(layer: str) -> str:
    """Leave out what stands before the last number: `attention.self.query`."""
    return re.sub(r"^.*\.\d+\.", "", layer)


def _candidates(linear: Sequence[str]) -> str:
    counts = Counter(map(_within_layer, linear))
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


def _check_trainable(model: PeftModel, layers: Sequence[str], fresh: Sequence[str]) -> None:
    """Refuse to train with a head that stays random, or with weights that nobody asked to train."""
    adapted = _holding(model, LoraLayer)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    intended = {name for name, _ in model.named_parameters() if ADAPTER_PART.search(name) or TRAINED_COPY in name}
    wrong = {
        "adapters": adapted ^ set(layers),
        "modules trained in full": _holding(model, ModulesToSaveWrapper) ^ set(fresh),
        "trainable parameters": trainable ^ intended,
    }
    for what, names in wrong.items():
        if names:
            raise ModelError(
                f"the {what} are not those intended; they differ in {', '.join(sorted(names)[:4])}. This is a fault "
                "of kdlora for this architecture: please report it, and use run.arms without LoRA meanwhile"
            )


def _holding(model: PeftModel, kind: type[nn.Module]) -> set[str]:
    """Names, within the plain model, of the modules that PEFT has put into one of its own kind."""
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if isinstance(module, kind)
    }


def _describe(folder: Path, adapter: Any, config: PretrainedConfig) -> None:
    """Write an adapter's settings, and how it is loaded; PEFT's own card is a form to be filled in."""
    adapter.target_modules = sorted(adapter.target_modules)
    adapter.save_pretrained(folder)
    labels, base = config.id2label, adapter.base_model_name_or_path or "base"
    pin = f", revision={adapter.revision!r}" if adapter.revision else ""
    pin += f", pad_token_id={config.pad_token_id}" if is_decoder(config) else ""
    words = adapter.task_type == TaskType.TOKEN_CLS
    made = f"AutoModelFor{'Token' if words else 'Sequence'}Classification"
    text = f"""---
library_name: peft
pipeline_tag: {"token" if words else "text"}-classification
---
LoRA adapter, with the classification head trained beside it. The base is {as_code(base)}.

```python
from peft import PeftModel
from transformers import {made}

base = {made}.from_pretrained({base!r}, num_labels={len(labels)}{pin})
model = PeftModel.from_pretrained(base, "this folder")
```

Labels, in the order of the logits: {", ".join(as_code(str(labels[column])) for column in sorted(labels))}.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
