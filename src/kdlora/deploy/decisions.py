"""How the outputs of a model become answers: fitted thresholds, and the sureness below which it gives no label.

Both lie beside the weights that they are of, in one file, and are refused for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kdlora.deploy.folder import DECISIONS, ModelFolder
from kdlora.errors import ArtifactError, ModelError
from kdlora.evidence.defer import Promise
from kdlora.foreign import read_json
from kdlora.system.integrity import CHECKSUM, hash_file, hash_json, is_sealed_or_old, seal

Which = Literal["all", "thresholds", "none"]
"""What of the decisions is read."""

_REMEDY = "Remove the file and fit or promise anew (kdlora thresholds, kdlora defer), or load it with decisions='none'."


@dataclass(frozen=True)
class Decisions:
    """What the folder of a model says; nothing where it says nothing."""

    promise: Promise | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)  # label to the probability above which it is said


def write_decisions(folder: ModelFolder, decisions: Decisions) -> None:
    """Keep decisions beside the weights that they are of, in the place of those that were there."""
    from kdlora.system.storage import write_json_atomic  # here: whoever predicts does without it

    path = folder.path / DECISIONS
    kept = _read(path) if path.is_file() else {}
    name, digest = _weights(folder)
    kept[name] = {
        "sha256": digest,
        "temperature": folder.temperature,
        "max_length": folder.max_length,
        "promise": None if decisions.promise is None else asdict(decisions.promise),
        "thresholds": dict(decisions.thresholds),
    }
    write_json_atomic(path, seal(kept))


def _read(path: Path) -> dict[str, Any]:
    kept = read_json(path)
    if not is_sealed_or_old(kept):
        raise ArtifactError(f"{path} is damaged: it is not what was written. {_REMEDY}")
    return {name: one for name, one in kept.items() if name != CHECKSUM}


def read_decisions(folder: ModelFolder, which: Which = "all") -> Decisions:
    """Read the decisions of a model; those of other weights are refused, and a promise of texts cut elsewhere."""
    path = folder.path / DECISIONS
    if which == "none" or not path.is_file():
        return Decisions()
    kept = _read(path)
    name, digest = _weights(folder)
    found = kept.get(name)
    if found is None:
        raise ModelError(f"{path}: fitted for {', '.join(sorted(kept)) or 'nothing':.200}, not {name}. {_REMEDY}")
    made_of = (found.get("sha256"), found.get("temperature")) if isinstance(found, Mapping) else None
    if made_of != (digest, folder.temperature):
        raise ModelError(f"{path}: fitted for other weights than those of {name}. {_REMEDY}")
    from pydantic import TypeAdapter, ValidationError  # here: most folders are served without it

    try:
        decisions = TypeAdapter(Decisions).validate_python(found)
    except ValidationError as fault:
        first = fault.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path}: {name} is damaged at {place}: {first['msg']}. {_REMEDY}") from None
    names, thresholds = folder.label_names, decisions.thresholds
    if wrong := {name: value for name, value in thresholds.items() if name not in names or not 0 < value < 1}:
        told = f"expected labels of the model with a probability above 0 and below 1, got {wrong!r:.200}"
        raise ModelError(f"{path}: damaged at thresholds: {told}. {_REMEDY}")
    most = {"multi-label": len(names), "single-label": int(len(names) == 2)}
    if len(thresholds) > most.get(folder.kind, 0):
        raise ModelError(f"{path}: thresholds want a multi-label model, or one of two labels and one threshold.")
    if which == "thresholds" or decisions.promise is None:
        return replace(decisions, promise=None)
    if (tested := found.get("max_length")) != folder.max_length:
        raise ModelError(
            f"{path}: the error rate was promised for a max_length of {tested!r:.20}, got {folder.max_length}. Load "
            "the model with the promised one, or with decisions='thresholds', which promises nothing."
        )
    return decisions


def _weights(folder: ModelFolder) -> tuple[str, str]:
    """Give the name and the hash of the weights that a folder was opened for."""
    if folder.file is None:
        name, pattern = "safetensors", "*.safetensors"
    elif folder.backend == "openvino":  # another runtime computes other last digits, and in bf16 fewer of them
        name, pattern = f"{folder.file.name} in OpenVINO, {folder.precision}", f"{folder.file.stem}.*"
    else:
        name, pattern = folder.file.name, f"{folder.file.name}*"
    files = sorted(folder.path.glob(pattern))
    return name, hash_json([hash_file(file) for file in files])
