"""Checks of a checkpoint (folder, configuration, tokenizer, weights) that say plainly why one cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from kdlora.configfile import expand_home
from kdlora.errors import ModelError
from kdlora.models.loading import Loaded, Source, load_config, load_tokenizer, load_weights
from kdlora.models.settings import ADAPTER

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
SAFE = (".safetensors", ".safetensors.index.json")
FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".tflite")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FEWEST_PIECES = 10
"""A vocabulary with fewer pieces beside the special tokens is no vocabulary: transformers builds an empty
tokenizer, without a word, where the files are missing."""


def open_source(name: str, revision: str | None, trust_remote_code: bool) -> Source:
    """Check what can be checked before anything is loaded."""
    path = expand_home(name)
    if path.is_dir():
        _check_folder(path)
        return Source(str(path.resolve()), None, trust_remote_code)
    if path.exists():
        raise ModelError(f"{name} is a file; a model is a folder with config.json, or the id of a Hub model")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"there is no folder {name!r}, and it is not the id of a Hub model (such as "
            "bert-base-uncased or microsoft/deberta-v3-small). Check the path; a relative one counts from "
            "the folder of the config file"
        )
    return Source(name, revision, trust_remote_code)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds no model which we would open."""
    names = sorted(entry.name for entry in folder.iterdir())
    held = ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "nothing"
    if "config.json" not in names:
        if ADAPTER in names:
            raise ModelError(
                f"{folder} holds an adapter, not a model; give the merged model (the `student` folder of an "
                "experiment), or merge it into its base first"
            )
        raise ModelError(f"{folder} is not a model folder: expected config.json, it holds {held}")
    if any(name.endswith(SAFE) and not name.startswith("adapter_") for name in names):
        return
    pickled = [name for name in names if name.endswith(PICKLED) and not name.startswith(NOT_WEIGHTS)]
    if pickled:
        raise ModelError(
            f"{folder} has its weights only in {', '.join(pickled)}, and kdlora unpickles nothing. If you "
            "trust the file, convert it to safetensors once: load it with transformers and call "
            "save_pretrained on the model"
        )
    foreign = [name for name in names if name.endswith(FOREIGN)]
    kind = f"only weights that PyTorch does not read ({', '.join(foreign)})" if foreign else "no weights"
    raise ModelError(f"{folder} has {kind}: expected model.safetensors, it holds {held}")


def read_config(source: Source) -> PretrainedConfig:
    """Read a model's configuration and see to it that it is an encoder which can classify."""
    config = load_config(source)
    if (layers := getattr(config, "num_hidden_layers", 1)) is not None and layers < 1:
        raise ModelError(f"{source.name} has {layers} layers by its config.json; expected at least 1")
    has_own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if source.trust_remote_code and has_own_code:
        return config
    kind = type(config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"{source.name} is a {config.model_type!r} model, for which transformers has no text "
            "classification. Expected an encoder such as BERT, RoBERTa, DeBERTa, ELECTRA or ModernBERT"
        )
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    if getattr(config, "is_encoder_decoder", False) or generates:
        raise ModelError(
            f"{source.name} is a {config.model_type!r} model, which generates text; expected an encoder. A "
            "generative model can still teach: write its answers to a table and set teacher.logits or "
            "teacher.probabilities"
        )
    return config


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Read the tokenizer that belongs to a model."""
    tokenizer = load_tokenizer(source)
    if len(tokenizer) - len(set(tokenizer.all_special_tokens)) < FEWEST_PIECES:
        raise ModelError(
            f"{source.name} has no tokenizer: its vocabulary is empty. Copy the tokenizer's files "
            "(tokenizer.json and tokenizer_config.json, or the vocabulary file) beside the weights"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {source.name} has no padding token, so texts cannot be batched. Set "
            "`pad_token` in its tokenizer_config.json to a token of its vocabulary"
        )
    return tokenizer


def read_weights(source: Source, config: PretrainedConfig) -> Loaded:
    """Read the weights as `load_weights` does, and see to it that they are those of the encoder."""
    loaded = load_weights(source, config)
    _check_complete(source, loaded)
    return loaded


def _check_complete(source: Source, loaded: Loaded) -> None:
    """Refuse weights that leave a part of the encoder random, other than a pooler on top of it."""
    prefix = loaded.model.base_model_prefix + "."
    if loaded.mismatched and (wrong := sorted(key for key in loaded.mismatched if key.startswith(prefix))):
        raise ModelError(
            f"the weights of {source.name} do not fit its config.json: {', '.join(wrong[:3])} "
            f"({len(wrong)} in all) have another shape. One of the two comes from another model"
        )
    absent = [key for key in loaded.missing if key.startswith(prefix) and ".pooler." not in key]
    if absent:
        raise ModelError(
            f"the weights of {source.name} are not those of a {loaded.model.config.model_type!r} encoder as its "
            f"config.json describes it: {len(absent)} tensors are missing, such as {sorted(absent)[0]}"
        )
