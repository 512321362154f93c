"""The one place where transformers reads a configuration, a tokenizer or weights, from a folder or from the Hub.

Whoever wrote a model is not trusted: unless the user says so no code of theirs runs, and nothing is ever unpickled.
What cannot classify texts is refused with the reason.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    safetensors_conversion,
)
from transformers.utils.hub import cached_file

from kdlora.configfile import expand_home
from kdlora.errors import ArtifactError, ModelError, first_line
from kdlora.foreign import check_types, panics_as_errors, read_json, refuse_links_out
from kdlora.models.settings import (
    ADAPTER,
    CONFIG,
    INDEX,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_SETTINGS,
    check_index,
    refuse_detours,
    refuse_files,
)

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
SAFE = (".safetensors", ".safetensors.index.json")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FEWEST_PIECES = 10
"""A vocabulary with fewer pieces beside the special tokens is no vocabulary: transformers builds an empty
tokenizer, without a word, where the files are missing."""

_CLASSES: dict[bool, tuple[Any, Any]] = {
    False: (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    True: (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}
"""What classifies texts, and what words."""
_loading = threading.RLock()


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder or a Hub id."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    local: bool = False  # read only what lies on this machine
    words: bool | None = None  # whether it is to classify words or texts; None: as its own config says


def open_source(name: str, revision: str | None, trust_remote_code: bool, words: bool | None = None) -> Source:
    """Refuse a place that holds no model which we would open, or files that lie elsewhere; nothing is loaded yet."""
    path = expand_home(name)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        if "config.json" in names and any(file.endswith(SAFE) and not file.startswith("adapter_") for file in names):
            refuse_links_out(path)
            return Source(str(path.resolve()), None, trust_remote_code, words=words)
        if "config.json" not in names and ADAPTER in names:
            raise ModelError(
                f"{path} holds an adapter, not a model; give the merged model (the `student` folder of an "
                "experiment), or merge it into its base first"
            )
        if pickled := [file for file in names if file.endswith(PICKLED) and not file.startswith(NOT_WEIGHTS)]:
            raise ModelError(
                f"{path} has its weights only in {', '.join(pickled)}, and kdlora unpickles nothing. If you trust the "
                "file, write safetensors beside it once, with the transformers class that config.json names under "
                "architectures: CLASS.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        held = ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "nothing"
        raise ModelError(f"{path} is no model folder: expected config.json and model.safetensors, it holds {held}")
    if path.exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"there is no folder {name!r}, and it is not the id of a Hub model (such as "
            "bert-base-uncased or microsoft/deberta-v3-small). Check the path; a relative one counts from "
            "the folder of the config file"
        )
    return Source(name, revision, trust_remote_code, words=words)


def read_config(source: Source) -> PretrainedConfig:
    """Read a model's configuration and see to it that it can classify texts, or words."""
    config = load_config(source)
    if (layers := getattr(config, "num_hidden_layers", 1)) is not None and layers < 1:
        raise ModelError(f"{source.name} has {layers} layers by its config.json; expected at least 1")
    words = classifies_words(source, config)
    wanted, known = _CLASSES[words]
    if source.trust_remote_code and wanted.__name__ in (getattr(config, "auto_map", None) or {}):
        return config
    if type(config) not in known:
        raise ModelError(
            f"{source.name} is a {config.model_type!r} model, for which transformers has no "
            f"{'token' if words else 'text'} classification. Expected an encoder such as BERT, RoBERTa, DeBERTa, "
            "ELECTRA or ModernBERT" + ("" if words else ", or a decoder such as Llama or Qwen")
        )
    if words and is_decoder(config):
        raise ModelError(
            f"{source.name} is a {config.model_type!r} model, a decoder: at a word it has not read what follows. "
            "Choose an encoder for a task of tokens"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.name} is a {config.model_type!r} model, an encoder that a decoder follows; expected one of the "
            "two. It can still teach: write its answers to a table and set teacher.logits or teacher.probabilities"
        )
    if config.get_text_config() is not config:
        raise ModelError(
            f"{source.name} is a {config.model_type!r} model, which reads more than texts; expected one of texts "
            f"alone. Choose {'an encoder' if words else 'such a sibling (Qwen3, Gemma 3 of 270M or 1B)'}"
        )
    return config


def classifies_words(source: Source, config: PretrainedConfig) -> bool:
    """Say whether a model is to classify words: as it was asked for, or else as its architecture says."""
    if source.words is not None:
        return source.words
    return any(name.endswith("ForTokenClassification") for name in getattr(config, "architectures", None) or [])


def is_decoder(config: PretrainedConfig) -> bool:
    """Say whether a model reads from left to right, as one that generates text: its last token knows all the text."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def takes_types(model: PreTrainedModel) -> bool:
    """Say whether a model tells the texts of a pair apart by token types; decoders read them as tokens."""
    named = "token_type_ids" in inspect.signature(model.forward).parameters
    return named and not is_decoder(model.config) and getattr(model.config, "type_vocab_size", 2) >= 2


def read_tokenizer(source: Source, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Read the tokenizer that belongs to a model; that of a decoder, which pads nothing as it generates, may pad."""
    tokenizer = load_tokenizer(source, model)
    # As everything here pads and cuts: positions count from the text's begin, and it is the begin that is read.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if is_decoder(model.config) and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
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


def read_weights(source: Source, config: PretrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """Read weights, and refuse what leaves a part of the encoder random, other than a pooler on top of it."""
    model, random = load_weights(source, config)
    prefix = model.base_model_prefix + "."
    if absent := sorted(key for key in random if key.startswith(prefix) and ".pooler." not in key):
        raise ModelError(
            f"the weights of {source.name} are not those of a {model.config.model_type!r} encoder as its "
            f"config.json describes it: {len(absent)} tensors are missing or have another shape, such as {absent[0]}"
        )
    return model, random


def load_config(source: Source) -> PretrainedConfig:
    """Load a model's configuration; all loads of one go through here, and no code runs that the user did not trust."""
    with _loading_of("configuration", source):
        # The files that transformers would follow are read before it does.
        if _find(source, ADAPTER) is not None:
            raise ModelError(
                f"{source.name} holds an adapter ({ADAPTER}) beside a whole model, and it is unclear which one is "
                f"meant. Remove {ADAPTER}, or merge the adapter into the model and give the result"
            )
        if (path := _find(source, "config.json")) is not None:
            check_types(values := read_json(path), CONFIG, path)
            refuse_detours(values, path, trusted=source.trust_remote_code)
        if (path := _find(source, INDEX)) is not None:
            check_index(path)
        config = AutoConfig.from_pretrained(source.name, **_options(source))
    if config.model_type == "fnet":
        raise ModelError(
            f"{source.name} is a 'fnet' model, which reads padding as text: its answer would depend on the texts "
            "beside it. Choose another encoder"
        )
    if config.model_type == "big_bird":  # else it changes for good at the first short batch, and its config does not
        config.attention_type = "original_full"
    if not source.trust_remote_code and hasattr(config, "auto_map"):
        del config.auto_map  # else it is saved with the student, and whoever trusts that runs this code
    return config


def load_tokenizer(source: Source, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model; of token types it gives what the model takes."""
    with _loading_of("tokenizer", source):
        for path in (_find(source, name) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS)):
            if path is not None:
                check_types(values := read_json(path), TOKENIZER_SETTINGS, path)
                refuse_files(values, path)
        tokenizer = AutoTokenizer.from_pretrained(source.name, **_options(source))
        names, types = list(tokenizer.model_input_names), "token_type_ids"
        told = types in names or "model_input_names" in tokenizer.init_kwargs or not tokenizer.is_fast
        # Transformers 5 lost the name for ALBERT, RemBERT and others. BigBird had none, nor what was tuned by that one.
        tuned = any(name.endswith("Classification") for name in model.config.architectures or ())
        tuned &= str(model.config.transformers_version).startswith("5.")
        without = tuned or model.config.model_type == "big_bird"
        if not takes_types(model):
            names = [name for name in names if name != types]
        elif not (told or without) and 1 in tokenizer.backend_tokenizer.encode("", "").type_ids:
            names.append(types)
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names  # of the latter it is saved
    tokenizer.chat_template = None  # a classifier has no use for it, and its parts are saved under names of their own
    if not source.trust_remote_code:
        tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def load_weights(source: Source, config: PretrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """Load weights for classification in fp32, never pickled ones; name what the checkpoint lacks, which is random."""
    with _loading_of("weights", source), torch.random.fork_rng(devices=[]):
        made, _ = _CLASSES[classifies_words(source, config)]
        model, report = made.from_pretrained(
            source.name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_options(source),
        )
    depth = getattr(config, "num_hidden_layers", None)
    numbers = ((key, re.search(r"\.(?:layers?|h|blocks?)\.(\d+)\.", key)) for key in sorted(report["unexpected_keys"]))
    if deeper := [key for key, at in numbers if at is not None and depth is not None and int(at[1]) >= depth]:
        raise ModelError(
            f"the weights of {source.name} have more layers than the {depth} of its config.json (num_hidden_layers), "
            f"such as {deeper[0]}; a model without its last layers answers something else. Take both from one model"
        )
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    return model.eval(), mismatched.union(report["missing_keys"])


def _options(source: Source) -> dict[str, Any]:
    return {
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
        "local_files_only": source.local,
    }


def _find(source: Source, name: str) -> Path | None:
    """Find a file of a model in its folder, in the Hub's cache or on the Hub."""
    found = cached_file(
        source.name,
        name,
        revision=source.revision,
        local_files_only=source.local,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _refuse_conversion(*_: object) -> None:
    """Stand for the request to a third host, after which transformers takes a pull request of anybody's."""
    raise OSError("it has no weights in safetensors, and nobody is asked to convert them")


@contextmanager
def _loading_of(what: str, source: Source) -> Iterator[None]:
    """Silence transformers while it loads, and turn faults that the user can mend into a `ModelError` that says how."""
    log = transformers.utils.logging
    with _loading:  # one thread at a time: it exchanges functions of torch and of its own classes
        verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity_error()
        convert, safetensors_conversion.spawn_conversion = safetensors_conversion.spawn_conversion, _refuse_conversion
        if Path(source.name).is_dir():  # what comes from the Hub has bars
            log.disable_progress_bar()
        try:
            with panics_as_errors():
                yield
        except ArtifactError as fault:
            raise ModelError(str(fault)) from None
        except ModelError:
            raise
        except Exception as fault:  # a damaged file can make transformers fail in any way
            if isinstance(fault, OSError) and fault.errno is not None:
                raise  # disk full, no permission: not a fault of the model
            if isinstance(fault, RuntimeError) and "memory" in str(fault):
                raise MemoryError(f"the {what} of {source.name} needs more memory: {first_line(fault):.200}") from fault
            raise ModelError(_explanation(source, what, fault)) from fault
        finally:
            safetensors_conversion.spawn_conversion = convert
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _explanation(source: Source, what: str, fault: Exception) -> str:
    causes: list[BaseException] = [fault]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 8:
        causes.append(cause)
    reason = first_line(fault)
    text = " ".join(str(cause) for cause in causes)
    if "trust_remote_code" in text:
        return (
            f"{source.name} needs Python code of its own. Read that code; if you trust it, pin `revision` "
            "and set `trust_remote_code: true` beside the model in the config"
        )
    if Path(source.name).is_dir():
        return f"the {what} in {source.name} cannot be read: {reason}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{source.name} is gated on the Hub: accept its terms there and log in with `hf auth login`"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{source.name} has no revision {source.revision!r} on the Hub"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"there is no folder and no public Hub model {source.name!r}. Check the spelling, or `hf auth login`"
    if "safetensors" in text and what == "weights":
        return (
            f"{source.name} has no safetensors weights on the Hub at this revision, and kdlora unpickles nothing "
            f"({reason}). Convert it once: load model and tokenizer with transformers, call save_pretrained on both, "
            "and give that folder. Without `revision`, a conversion that the Hub has made is found"
        )
    state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
    return (
        f"cannot load the {what} of {source.name!r}: there is no such folder, no copy in the Hub's cache, and "
        f"{state} ({reason}). On a machine with a network run `hf download {source.name}`, and give the folder "
        "that it names; or give any other folder with the model"
    )
