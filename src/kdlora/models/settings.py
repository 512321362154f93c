"""What the files of a model say of it: settings that decide what is loaded, where they may not lead, and the licence.

Light: no torch, no transformers, no pydantic, since an ONNX folder is served without them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdlora.data.windows import is_window_settings
from kdlora.errors import ModelError
from kdlora.foreign import Check, is_plain_name, read_front_matter, read_json

ADAPTER = "adapter_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
INDEX = "model.safetensors.index.json"

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
"""What ids of licences consist of; anything else would be markup in the student's own card."""
_MOST_LABELS = 1_000_000
_MOST_TOKENS = 1 << 31


def _is_count(value: Any, most: int, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_task(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key, ""), str) for key in ("name", "kind")):
        return False
    lists = [value.get(key, []) for key in ("text", "label", "label_names", "metrics")]
    return all(map(_is_list_of_text, lists)) and len(lists[0]) <= 2 and is_window_settings(value.get("windows"))


TEXT: Check = ("a text", lambda value: isinstance(value, str))
NAMES: Check = (
    "an object of texts",
    lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value.values()),
)
TOKENS: Check = ("a number of tokens", lambda value: _is_count(value, _MOST_TOKENS, 1))
NUMBER: Check = (
    "a finite number",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300,
)
TASK: Check = ("a task: an object with lists of texts, and perhaps settings of windows", _is_task)


def content_of_token(token: Any) -> Any:
    """Give the text of a special token, which may be wrapped up in an object."""
    return token.get("content") if isinstance(token, dict) else token


CONFIG: Mapping[str, Check] = {
    "architectures": ("a list of texts", _is_list_of_text),
    "id2label": ("an object", lambda value: isinstance(value, dict) and len(value) <= _MOST_LABELS),
    "kdlora_max_length": TOKENS,
    "kdlora_task": TASK,
    "model_type": TEXT,
    "num_labels": ("a number of labels", lambda value: _is_count(value, _MOST_LABELS)),
    "pad_token_id": ("the number of a token", lambda value: _is_count(value, _MOST_TOKENS, -1)),
    "problem_type": TEXT,
}
"""The keys of `config.json` that decide what kdlora does."""

TOKENIZER_SETTINGS: Mapping[str, Check] = {
    "fast_tokenizer_files": (
        "a list of names of files",
        lambda value: isinstance(value, list) and all(map(is_plain_name, value)),
    ),
    "init_inputs": ("an empty list", lambda value: value == []),
    "merges": ("a list of pieces", lambda value: isinstance(value, list)),
    "model_input_names": ("a list of texts", _is_list_of_text),
    "model_max_length": NUMBER,
    "pad_token": ("a text, or an object with its content", lambda value: isinstance(content_of_token(value), str)),
    "vocab": ("an object or a list of pieces, not the path of a file", lambda value: isinstance(value, dict | list)),
}
"""Likewise those of `tokenizer_config.json`."""


def refuse_detours(values: Mapping[str, Any], where: Path | str, *, trusted: bool = False) -> None:
    """Refuse settings by which a model's config sends transformers to other files, or to code, than one expects."""
    for key in ("transformers_weights", "configuration_files"):
        if values.get(key) is not None:
            raise ModelError(
                f"{where}: {key} names other files ({values[key]!r:.60}); kdlora reads config.json and "
                "model.safetensors only. Remove the key, and rename the files"
            )
    if values.get("quantization_config") is not None:
        raise ModelError(f"{where}: the weights are quantised; give the model in fp32, fp16 or bf16")
    for key, value in _texts(values):
        if "_implementation" in key and "/" in value and not trusted:
            raise ModelError(
                f"{where}: {key} is {value!r:.60}, compiled code of the Hub, which kdlora does not load. Remove the key"
            )


def refuse_files(values: Mapping[str, Any], where: Path | str) -> None:
    """Refuse settings of a tokenizer that name a file of this machine: transformers keeps its lines as pieces."""
    for key, value in values.items():
        if key != "name_or_path" and isinstance(value, str) and os.path.isfile(value):  # noqa: PTH113 - takes any text
            raise ModelError(
                f"{where}: {key} names the file {value!r:.80}; kdlora reads the model's own. Remove the key"
            )


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Give every text with the key that it belongs to, however deep."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for inner, value in values.items():
            yield from _texts(value, key if "_implementation" in key else inner)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, key)


def check_index(path: Path) -> None:
    """Refuse an index of weights that names anything else than safetensors beside it."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{path}: expected weight_map, an object of file names")
    for name in sorted(set(shards.values())):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ModelError(f"{path}: names the weights {name!r:.80}; expected a safetensors file in the same folder")


def read_licence(name: str, revision: str | None = None) -> str | None:
    """Read it from the card in a folder, on the Hub or in its cache; without one the student's card says so."""
    card = Path(name) / "README.md"
    try:
        if not Path(name).is_dir():
            from huggingface_hub import hf_hub_download

            card = Path(hf_hub_download(name, "README.md", revision=revision, etag_timeout=5))
        metadata = read_front_matter(card)
    except (OSError, ValueError):  # not there, not reachable, not allowed, not to be read
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None
