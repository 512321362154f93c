"""The promise that goes with the weights of a model: below which sureness it does not answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kdlora.deploy.folder import ModelFolder
from kdlora.errors import ModelError
from kdlora.evidence.defer import SURENESS, Promise
from kdlora.foreign import read_json
from kdlora.system.integrity import hash_file, hash_json

PROMISES = "kdlora_defer.json"
_NUMBERS = ("error", "confidence", "threshold", "rows", "answered", "wrong")


def write_promise(folder: ModelFolder, promise: Promise | None) -> None:
    """Keep a promise beside the weights that it is of, or remove the one that was there."""
    from kdlora.system.storage import write_json_atomic  # here: whoever predicts does without it

    path = folder.path / PROMISES
    kept: dict[str, Any] = read_json(path) if path.is_file() else {}
    name, digest = _weights(folder)
    kept.pop(name, None)
    if promise is not None:
        kept[name] = asdict(promise) | {"sha256": digest, "temperature": folder.temperature}
    if kept:
        write_json_atomic(path, kept)
    else:
        path.unlink(missing_ok=True)


def read_promise(folder: ModelFolder) -> Promise | None:
    """Read the promise of a model; None where its folder has none.

    Raises:
        ModelError: the folder's promise is of other weights.
    """
    path = folder.path / PROMISES
    if not path.is_file():
        return None
    kept = read_json(path)
    name, digest = _weights(folder)
    found = kept.get(name)
    remedy = "Promise anew (kdlora defer), or load it with defer=False and get every answer."
    if found is None:
        raise ModelError(
            f"{path}: the error rate was promised for {', '.join(sorted(kept)):.200}, not {name}. {remedy}"
        )
    if not isinstance(found, Mapping) or not all(_is_number(found.get(key)) for key in _NUMBERS):
        raise ModelError(f"{path}: damaged: {', '.join(_NUMBERS)} of {name} must be numbers. {remedy}")
    if found.get("sureness") not in SURENESS:
        raise ModelError(f"{path}: sureness must be one of {', '.join(SURENESS)}, got {found.get('sureness')!r:.80}.")
    if found.get("sha256") != digest or found.get("temperature") != folder.temperature:
        raise ModelError(f"{path}: the error rate was promised for other weights than those of {name}. {remedy}")
    return Promise(sureness=found["sureness"], **{key: found[key] for key in _NUMBERS})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _weights(folder: ModelFolder) -> tuple[str, str]:
    """Give the name and the hash of the weights that a folder was opened for."""
    name = "safetensors" if folder.file is None else folder.file.name
    files = sorted(folder.path.glob("*.safetensors" if folder.file is None else f"{name}*"))
    return name, hash_json([hash_file(file) for file in files])
