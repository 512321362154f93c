"""Read what a model folder says about itself, without torch or transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from kdlora.data.windows import WindowSettings
from kdlora.deploy import Runtime
from kdlora.errors import ModelError
from kdlora.foreign import Check, check_types, read_json, read_json_and_digest, refuse_links_out
from kdlora.models.settings import (
    ADAPTER,
    CONFIG,
    NAMES,
    TASK,
    TOKENIZER_CONFIG,
    TOKENIZER_SETTINGS,
    TOKENS,
    content_of_token,
)

Precision = Literal["auto", "fp32", "bf16", "int8"]
FolderKind = Literal["single-label", "regression", "multi-label", "tokens"]

ONNX_FP32 = "model.onnx"
ONNX_INT8 = "model_quantized.onnx"
OPENVINO_INT8 = "openvino_model_quantized.xml"
"""Its weights lie beside it, in a file that ends in `.bin`."""
EXPORT_RECORD = "kdlora_export.json"
DECISIONS = "kdlora_decisions.json"
MEASURED = "kdlora_runtimes.json"
"""What was measured on which host; no part of the model."""
TEMPERATURE_KEY = "kdlora_temperature"
CONFIG_FILE = "config.json"
TOKENIZER = "tokenizer.json"

_KINDS: dict[str, FolderKind] = {
    "single_label_classification": "single-label",
    "regression": "regression",
    "multi_label_classification": "multi-label",
}
_OF_TEXTS, _OF_TOKENS = "ForSequenceClassification", "ForTokenClassification"
"""Ends of the names of transformers' classes; a config of the second kind has no problem type."""
_OFFSET_POSITIONS = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "mpnet"),
    *("data2vec-text", "ibert", "longformer"),
)
"""Families whose position table starts at `pad_token_id + 1`, so that it holds that many tokens fewer."""
_ENDLESS = 1_000_000
"""transformers writes 1e30 for a tokenizer without a limit."""
_DEFAULT_MAX_LENGTH = 512
_PLACES = ("name_or_path", "_file")
"""Ends of the keys under which transformers may note down where a model came from."""
_SHORTEST = 3
"""Tokens of the shortest input: two special ones and one of text."""

MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|kdlora_export|kdlora_decisions)\.json"
    r"|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json|model(_quantized)?\.onnx([._]data)?|openvino_model_quantized\.(xml|bin)"
    r"|vocab\.txt|merges\.txt|bpe\.codes|(spm|spiece|tokenizer|sentencepiece\.bpe)\.model|README\.md|LICENSE|NOTICE"
)
_TEMPERATURE: Check = (
    "a positive number, 1e-06 to 1e+06",
    lambda value: isinstance(value, int | float) and 1e-6 <= value <= 1e6,
)
_RECORD: Mapping[str, Check] = {"max_length": TOKENS, "sha256": NAMES, "task": TASK}


def is_model_file(path: Path) -> bool:
    """Say whether an entry of a model folder is a file that a model consists of, by its name; a link never is."""
    return bool(MODEL_FILES.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk that gives labels of texts or, of kind tokens, of the words in them."""

    path: Path
    file: Path | None  # the ONNX or OpenVINO file; None for a transformers folder
    kind: FolderKind  # what the outputs mean
    label_names: tuple[str, ...]  # of the logit columns, in order
    max_length: int  # longest input in tokens, special tokens included
    temperature: float  # logits are divided by it before they become probabilities; 1 changes nothing
    task: dict[str, Any] | None  # as `Task.to_dict()`, where the export or the training noted it
    record: dict[str, Any] | None  # the content of `kdlora_export.json`
    pad_token: str | None = None
    pad_token_id: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the JSON files that all this comes from
    runtime: Runtime = "onnxruntime"  # what runs the file
    half: bool = False  # products in bf16, of an fp32 file
    texts: int | None = None  # that an example has, 1 or 2; None where training did not note it

    def example(self, text: str) -> str | tuple[str, str]:
        """Make of a text what the model reads: a pair where it reads pairs."""
        return (text, text) if self.texts == 2 else text

    @property
    def windows(self) -> WindowSettings | None:
        """How longer texts than `max_length` are read in windows; None where they are cut, or words have labels."""
        found = (self.task or {}).get("windows")
        return None if found is None or self.kind == "tokens" else WindowSettings(**found)

    @property
    def backend(self) -> Literal["transformers", "onnx", "openvino"]:
        if self.file is None:
            return "transformers"
        return "openvino" if self.runtime == "openvino" else "onnx"

    @property
    def precision(self) -> Literal["fp32", "bf16", "int8"]:
        """Number format of the weights by file name, or of the products."""
        if self.half:
            return "bf16"
        return "int8" if self.file is not None and "quantized" in self.file.name else "fp32"

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights: the exported file, OpenVINO's with its weights, or the safetensors files."""
        files = [*self.path.glob("*.safetensors")] if self.file is None else [self.file]
        if self.file is not None and self.file.suffix == ".xml":
            files.append(self.file.with_suffix(".bin"))
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Way:
    """One way to run a model folder."""

    folder: Path
    runtime: Runtime = "onnxruntime"
    precision: Precision = "auto"
    batch_size: int = 32  # that the runtime `auto` is chosen for

    @classmethod
    def of(cls, model: str | Path | Way) -> Way:
        """Run a folder as usual, unless a way is named."""
        return model if isinstance(model, Way) else cls(Path(model))


def read_model_folder(model: str | Path | Way, *, max_length: int | None = None) -> ModelFolder:
    """Read configuration, labels and limits of a transformers, ONNX or OpenVINO folder, as it is run."""
    way = Way.of(model)
    place, precision, runtime = way.folder, way.precision, way.runtime
    for name, value, known in (("precision", precision, Precision), ("runtime", runtime, Runtime)):
        if value not in get_args(known):
            raise ModelError(f"{name} is one of {', '.join(get_args(known))}; got {value!r:.80}.")
    named = place if place.suffix in (".onnx", ".xml") else None
    if named is not None and not named.is_file():
        raise ModelError(f"{place}: no such file. Give a model folder or an existing .onnx file.")
    if named is not None and precision == ("fp32" if "quantized" in named.name else "int8"):
        raise ModelError(f"{named} is not {precision}: leave precision out, or name the folder.")
    runtime = "openvino" if place.suffix == ".xml" else runtime
    folder = _with_config(place if named is None else place.parent)
    refuse_links_out(folder)
    of_openvino = (folder / OPENVINO_INT8).is_file() and not any(folder.glob("*.onnx"))
    if runtime == "auto" and (of_openvino or precision == "bf16"):  # the only one that runs it
        runtime = "openvino"
    digests: dict[str, str] = {}
    config = _read(folder / CONFIG_FILE, {**CONFIG, TEMPERATURE_KEY: _TEMPERATURE}, digests)
    file = named or _exported_file(folder, precision, runtime)
    if file is None and runtime == "openvino":
        raise ModelError(f"{folder}: OpenVINO runs the files of an export; run `kdlora export` first.")
    half = precision == "bf16" and file is not None and "quantized" not in file.name
    if precision == "bf16" and (runtime != "openvino" or not half):
        raise ModelError(f"{folder}: precision 'bf16' is {ONNX_FP32} in OpenVINO (runtime='openvino').")
    _check_files(folder, file)
    record = _read(folder / EXPORT_RECORD, _RECORD, digests)
    if runtime == "openvino" and EXPORT_RECORD in digests:
        _check_passed(folder, file, record, half)
    tokenizer = _read(folder / TOKENIZER_CONFIG, TOKENIZER_SETTINGS, digests)
    kind, label_names = _labels(folder, config)
    noted = (record.get("max_length") if file is not None else None) or config.get("kdlora_max_length")
    wanted = noted if max_length is None else max_length
    if wanted is not None and wanted < _SHORTEST:
        raise ModelError(f"max_length must be at least 3 (two special tokens and one of text), got {wanted}.")
    stated = tokenizer.get("model_max_length")
    if wanted is None and stated is not None and _SHORTEST <= stated < _ENDLESS:
        wanted = int(stated)
    limit = _position_limit(folder, config)
    trained_on = config.get("kdlora_task") or {}  # an export's record may have default columns
    return ModelFolder(
        path=folder,
        file=file,
        kind=kind,
        label_names=label_names,
        max_length=min(wanted or limit or _DEFAULT_MAX_LENGTH, limit or _ENDLESS),
        temperature=float(config.get(TEMPERATURE_KEY) or 1),
        task=record.get("task") or config.get("kdlora_task"),
        record=record if EXPORT_RECORD in digests else None,
        pad_token=content_of_token(tokenizer.get("pad_token")),
        pad_token_id=config.get("pad_token_id"),
        digests=digests,
        runtime=runtime,
        half=half,
        texts=len(trained_on.get("text", ())) or None,
    )


def _read(path: Path, checks: Mapping[str, Check], digests: dict[str, str]) -> dict[str, Any]:
    """Read one of the folder's JSON files, and note its digest; an empty object where there is none."""
    if not path.is_file():
        return {}
    values, digests[path.name] = read_json_and_digest(path)
    check_types(values, checks, path)
    return values


def _with_config(folder: Path) -> Path:
    """Return the folder with config.json, or say what the folder is instead."""
    if not folder.exists():
        raise ModelError(f"{folder}: no such folder. Give the folder of a model, such as EXPERIMENT/student.")
    if not folder.is_dir():
        raise ModelError(f"{folder}: expected a model folder, got a file.")
    places = (folder, folder / "student")
    for place in places:
        if (place / CONFIG_FILE).is_file() and not (place / ADAPTER).is_file():
            return place
    for place in places:
        if (place / ADAPTER).is_file():
            base = read_json(place / ADAPTER).get("base_model_name_or_path")
            raise ModelError(
                f"{place}: expected a whole model, got an adapter of the base {base!r:.200}. Merge it first "
                "(an experiment's `student` folder is the merged model): unmerged adapters are slower and cannot "
                "be exported."
            )
    raise ModelError(
        f"{folder}: not a model folder, config.json is missing. Give a folder that holds config.json, "
        "tokenizer.json and model.safetensors or model.onnx."
    )


def _exported_file(folder: Path, precision: Precision, runtime: Runtime) -> Path | None:
    """Choose the file of an export; None means that the folder's safetensors are meant."""
    fp32, int8 = folder / ONNX_FP32, folder / (OPENVINO_INT8 if runtime == "openvino" else ONNX_INT8)
    if precision == "int8" and not int8.is_file():
        raise ModelError(f"{folder}: precision 'int8' was asked for, but {int8.name} is missing.")
    if precision in ("auto", "int8") and int8.is_file():
        return int8
    return fp32 if fp32.is_file() else None


def _check_files(folder: Path, file: Path | None) -> None:
    """Refuse a folder that lacks its tokenizer, or its weights in a format that runs no code when it is read."""
    if file is None and not any(folder.glob("*.safetensors")):
        if (folder / OPENVINO_INT8).is_file():
            raise ModelError(
                f"{folder}: its {OPENVINO_INT8} is run by OpenVINO; name that file, or runtime='openvino'."
            )
        there = ", ".join(sorted(entry.name for entry in folder.iterdir()))
        raise ModelError(
            f"{folder}: no weights for the precision and runtime: expected model.safetensors, {ONNX_FP32} or "
            f"{ONNX_INT8}, got {there:.300}. A pickle (pytorch_model.bin) is not read; convert it to safetensors."
        )
    if file is not None and file.suffix == ".xml" and not file.with_suffix(".bin").is_file():
        raise ModelError(f"{file}: the weights beside it, {file.with_suffix('.bin').name}, are missing.")
    if file is not None and not (folder / TOKENIZER).is_file():
        raise ModelError(
            f"{folder}: tokenizer.json is missing. Save the tokenizer beside the model: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
        )


def _check_passed(folder: Path, file: Path | None, record: Mapping[str, Any], half: bool) -> None:
    """Refuse what OpenVINO was not checked with, or failed; a file of its own is there only if it passed."""
    stage, stages = "openvino-bf16" if half else "openvino", record.get("stages")
    passed = [one.get("stage") for one in stages if isinstance(one, dict)] if isinstance(stages, list) else []
    if file is not None and file.suffix == ".onnx" and stage not in passed:
        raise ModelError(
            f"{folder}: the export was not checked in OpenVINO, or failed ({stage} is not among its stages). Export "
            "it with --format openvino, or use another runtime or precision."
        )


def _labels(folder: Path, config: dict[str, Any]) -> tuple[FolderKind, tuple[str, ...]]:
    """Read kind and label names; a checkpoint of another head is refused."""
    architectures, where = config.get("architectures") or [], folder / CONFIG_FILE
    of_tokens = any(name.endswith(_OF_TOKENS) for name in architectures)
    if architectures and not any(name.endswith((_OF_TEXTS, _OF_TOKENS)) for name in architectures):
        raise ModelError(
            f"{folder}: expected a model with a classification head (…{_OF_TEXTS} or …{_OF_TOKENS}), got "
            f"{', '.join(architectures):.200}. Fine-tune it first."
        )
    id2label = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    columns = [id2label.get(str(column)) for column in range(len(id2label))]
    if not all(isinstance(name, str | int | float) for name in columns):
        raise ModelError(f"{where}: id2label must name the columns 0 to n-1, got {id2label!r:.200}.")
    names = tuple(map(str, columns))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"{where}: id2label has two labels named {twice!r:.80}; of one the answers would be lost.")
    if of_tokens:
        return "tokens", names
    problem = config.get("problem_type") or ("regression" if len(names) == 1 else "single_label_classification")
    if problem not in _KINDS:
        raise ModelError(f"{where}: problem_type must be one of {', '.join(_KINDS)}, got {problem!r:.80}.")
    return _KINDS[problem], names


def _position_limit(folder: Path, config: dict[str, Any]) -> int | None:
    """Count the tokens that fit the position table; None where the model has no table."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))  # the second in GPT-2
    if not isinstance(positions, int) or not 1 <= positions < _ENDLESS:
        return None
    if config.get("model_type") in _OFFSET_POSITIONS:
        positions -= (config.get("pad_token_id") or 0) + 1
    if positions < _SHORTEST:
        raise ModelError(f"{folder / CONFIG_FILE}: max_position_embeddings leaves room for {positions} tokens.")
    return positions


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the last name of each path that a model's settings name, in parts of them, too."""
    bare: dict[str, Any] = {}
    for key, value in settings.items():
        is_place = key.endswith(_PLACES) and Path(str(value)).is_absolute()
        inner = without_places(value) if isinstance(value, dict) else value
        bare[key] = Path(str(value)).name if is_place else inner
    return bare
