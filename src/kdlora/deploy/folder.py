"""Read what a model folder says about itself, without torch or transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdlora.errors import ArtifactError, ModelError

Backend = Literal["transformers", "onnx"]
Precision = Literal["auto", "fp32", "int8"]
FolderKind = Literal["single-label", "regression", "multi-label"]

ONNX_FP32 = "model.onnx"
ONNX_INT8 = "model_quantized.onnx"
EXPORT_RECORD = "kdlora_export.json"
TEMPERATURE_KEY = "kdlora_temperature"

_KINDS: dict[str, FolderKind] = {
    "single_label_classification": "single-label",
    "regression": "regression",
    "multi_label_classification": "multi-label",
}
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "data2vec-text")
"""Families whose position table starts at `pad_token_id + 1`, so that it holds that many tokens fewer."""
_ENDLESS = 1_000_000
"""transformers writes 1e30 for a tokenizer without a limit."""
_DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class ModelFolder:
    """A sequence-classification model on disk.

    Attributes:
        path: the folder.
        backend: what runs it.
        file: the ONNX file, or None for a transformers folder.
        kind: what the outputs mean.
        label_names: names of the logit columns, in order.
        model_type: family name as transformers writes it, such as `bert`.
        max_length: longest input in tokens, special tokens included.
        position_limit: tokens that the position table holds; None where the model has no table.
        temperature: logits are divided by it before they become probabilities; 1 changes nothing.
        task: the task that the export recorded (`Task.to_dict()`), or None.
        record: the content of `kdlora_export.json`, or None.
    """

    path: Path
    backend: Backend
    file: Path | None
    kind: FolderKind
    label_names: tuple[str, ...]
    model_type: str
    max_length: int
    position_limit: int | None
    temperature: float
    task: dict[str, Any] | None
    record: dict[str, Any] | None

    @property
    def precision(self) -> Literal["fp32", "int8"]:
        """Number format of the weights, by file name."""
        return "int8" if self.file is not None and "quantized" in self.file.name else "fp32"

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights: the ONNX file with its external data, or the safetensors files."""
        if self.file is not None:
            beside = self.path.glob(f"{self.file.name}*data")
            return self.file.stat().st_size + sum(part.stat().st_size for part in beside)
        return sum(part.stat().st_size for part in self.path.glob("*.safetensors"))


def read_model_folder(path: str | Path, *, precision: Precision = "auto", max_length: int | None = None) -> ModelFolder:
    """Read configuration, labels and limits of a transformers or ONNX folder.

    Args:
        path: the folder, an `.onnx` file in it, or an experiment folder (its `student` is taken).
        precision: which ONNX file of a folder that has several; `auto` prefers int8.
        max_length: longest input in tokens; by default what the folder says.

    Returns:
        The description; nothing is loaded.

    Raises:
        ModelError: not a model folder, an adapter, a model without a classification head, or a missing file.
        ArtifactError: a JSON file in it cannot be read.
    """
    folder, wanted = _locate(Path(path))
    config = read_json(folder / "config.json")
    file = _onnx_file(folder, wanted, precision)
    _check_weights(folder, file)
    record = read_json(folder / EXPORT_RECORD) if (folder / EXPORT_RECORD).is_file() else None
    kind, label_names = _labels(folder, config)
    limit = _position_limit(config)
    recorded = record.get("max_length") if record and file is not None else None
    length = _max_length(folder, limit, max_length or recorded)
    return ModelFolder(
        path=folder,
        backend="onnx" if file is not None else "transformers",
        file=file,
        kind=kind,
        label_names=label_names,
        model_type=str(config.get("model_type", "")),
        max_length=length,
        position_limit=limit,
        temperature=_temperature(folder, config),
        task=(record or {}).get("task") or config.get("kdlora_task"),
        record=record,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: expected a JSON file, but it cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _locate(path: Path) -> tuple[Path, str | None]:
    """Find the folder that holds config.json, and the ONNX file that the path itself names."""
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ModelError(f"{path}: no such file. Give a model folder or an existing .onnx file.")
        return _with_config(path.parent), path.name
    return _with_config(path), None


def _with_config(folder: Path) -> Path:
    """Return the folder with config.json, or say what the folder is instead."""
    if not folder.exists():
        raise ModelError(f"{folder}: no such folder. Give the folder of a model, such as EXPERIMENT/student.")
    if not folder.is_dir():
        raise ModelError(f"{folder}: expected a model folder, got a file.")
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "student" / "config.json").is_file():
        return folder / "student"
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{folder}: expected a whole model, got an adapter of the base {base!r}. Merge it first "
            "(an experiment's `student` folder is the merged model): unmerged adapters are slower and cannot "
            "be exported."
        )
    raise ModelError(
        f"{folder}: not a model folder, config.json is missing. Give a folder that holds config.json, "
        "tokenizer.json and model.safetensors or model.onnx."
    )


def _onnx_file(folder: Path, named: str | None, precision: Precision) -> Path | None:
    """Choose the ONNX file; None means that the folder's safetensors are meant."""
    if named is not None:
        return folder / named
    fp32, int8 = folder / ONNX_FP32, folder / ONNX_INT8
    if precision == "int8":
        if not int8.is_file():
            raise ModelError(f"{folder}: precision 'int8' was asked for, but {ONNX_INT8} is missing.")
        return int8
    if precision == "auto" and int8.is_file():
        return int8
    return fp32 if fp32.is_file() else None


def _check_weights(folder: Path, file: Path | None) -> None:
    """Refuse a folder whose weights are missing or in a format that runs code when it is read."""
    if file is None and not any(folder.glob("*.safetensors")):
        other = sorted(entry.name for entry in folder.glob("*.bin"))
        hint = f" {other[0]} is a pickle and is not read; convert it to safetensors." if other else ""
        raise ModelError(f"{folder}: no weights: expected model.safetensors, {ONNX_FP32} or {ONNX_INT8}.{hint}")
    if file is not None and not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder}: tokenizer.json is missing. Save the tokenizer beside the model: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
        )


def _labels(folder: Path, config: dict[str, Any]) -> tuple[FolderKind, tuple[str, ...]]:
    """Read kind and label names; a checkpoint of another head is refused."""
    architectures = [str(name) for name in config.get("architectures") or ()]
    if architectures and not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ModelError(
            f"{folder}: expected a model with a classification head (…ForSequenceClassification), got "
            f"{', '.join(architectures)}. Fine-tune it first."
        )
    id2label = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    try:
        label_names = tuple(str(id2label[str(column)]) for column in range(len(id2label)))
    except (KeyError, TypeError):
        raise ModelError(
            f"{folder / 'config.json'}: id2label must name the columns 0 to n-1, got {id2label!r}."
        ) from None
    problem = config.get("problem_type") or ("regression" if len(label_names) == 1 else "single_label_classification")
    if problem not in _KINDS:
        raise ModelError(f"{folder / 'config.json'}: problem_type must be one of {', '.join(_KINDS)}, got {problem!r}.")
    return _KINDS[problem], label_names


def _position_limit(config: dict[str, Any]) -> int | None:
    """Count the tokens that fit the position table."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.get("model_type") in _OFFSET_POSITIONS:
        return positions - int(config.get("pad_token_id") or 0) - 1
    return positions


def _max_length(folder: Path, limit: int | None, wanted: int | None) -> int:
    """Settle the longest input: the wish, else the tokenizer's own limit, never more than there are positions."""
    if wanted is not None and wanted < 3:
        raise ModelError(f"max_length must be at least 3 (two special tokens and one of text), got {wanted}.")
    if wanted is None:
        path = folder / "tokenizer_config.json"
        stated = read_json(path).get("model_max_length") if path.is_file() else None
        wanted = int(stated) if isinstance(stated, int | float) and 3 <= stated < _ENDLESS else None
    if wanted is None:
        return limit or _DEFAULT_MAX_LENGTH
    return min(wanted, limit) if limit else wanted


def _temperature(folder: Path, config: dict[str, Any]) -> float:
    """Read the calibration temperature, 1 where there is none."""
    value = config.get(TEMPERATURE_KEY, 1.0)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"{folder / 'config.json'}: {TEMPERATURE_KEY} must be a positive number, got {value!r}.")
    return float(value)
