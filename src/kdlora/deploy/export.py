"""Export a classifier: PyTorch to ONNX to an optimised graph to int8, each stage held to the one before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kdlora.data.tags import Words, tag_names, tag_types
from kdlora.data.tasks import DEFAULT_METRICS, Task
from kdlora.deploy.folder import (
    CONFIG_FILE,
    DECISIONS,
    EXPORT_RECORD,
    MEASURED,
    ONNX_FP32,
    ONNX_INT8,
    OPENVINO_INT8,
    TOKENIZER,
    ModelFolder,
    is_model_file,
    read_model_folder,
    without_places,
)
from kdlora.deploy.gates import Checks, Gate, LabelledTexts
from kdlora.deploy.predict import Text
from kdlora.errors import ArtifactError, ConfigError, DataError, ModelError
from kdlora.extras import check_installed
from kdlora.foreign import read_json
from kdlora.models.settings import TOKENIZER_CONFIG
from kdlora.report.shipped import Export
from kdlora.system.environment import collect_versions
from kdlora.system.integrity import hash_file, seal
from kdlora.system.ownership import refuse_foreign, remove
from kdlora.system.storage import atomic_folder, plain_json, write_json_atomic

if TYPE_CHECKING:
    from kdlora.deploy.torch_backend import TorchBackend

logger = logging.getLogger(__name__)

Format = Literal["onnx", "onnx-int8", "openvino"]
Progress = Callable[[str], None]

FP32_TOLERANCE = 1e-4
"""Largest difference of fp32 logits; for regression, relative to the largest output above 1."""
_FILES: Mapping[Format, tuple[str, ...]] = {
    "onnx": (ONNX_FP32,),
    "onnx-int8": (ONNX_INT8,),
    "openvino": (OPENVINO_INT8, str(Path(OPENVINO_INT8).with_suffix(".bin"))),
}
_MOST_BYTES = 1536 * 2**20
"""Above it PyTorch writes weights into a second file, and a graph with such is never read here."""
_NOT_EXPORTED = ("README", "LICENSE", "NOTICE", "generation_config", "model.safetensors", "model-")
"""How files of a model begin that no export writes."""


class ParityError(ArtifactError):
    """A stage is not as good as the one before it; the stages that passed are on disk.

    Attributes:
        result: what was exported, with the figures of every attempt.
    """

    def __init__(self, message: str, result: ExportResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, kw_only=True)
class ExportResult(Export):
    """What an export wrote, and how, as its record has it."""

    folder: Path
    files: dict[str, Path]  # by format
    size_bytes: dict[str, int]  # by format
    temperature: float  # of the calibration that the folder applies; 1 without one


def export_onnx(
    model_folder: str | Path,
    to: str | Path,
    *,
    texts: Sequence[Text | Words] | LabelledTexts = (),
    more_texts: Sequence[Text | Words] = (),
    formats: Sequence[Format] = ("onnx", "onnx-int8"),
    max_length: int | None = None,
    max_metric_drop: float = 0.5,
    min_agreement: float = 0.97,
    min_recall: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a transformers folder as a folder that ONNX Runtime serves without torch.

    Stages: PyTorch fp32, the captured graph, the optimised graph (`model.onnx`), dynamic int8
    (`model_quantized.onnx`); for `openvino` that runtime with `model.onnx`, in bf16 too where the processor has it, and
    static int8 (`openvino_model_quantized.xml`). Each must reproduce the one before it on the given texts, or the
    export fails with the figures and keeps the stages before. Where plain int8 does not hold, remedies are tried in
    order; the result names the one that passed.

    Args:
        model_folder: a merged model, such as an experiment's `student`.
        to: the folder to write; it appears whole or not at all. An earlier export there is replaced.
        texts: validation texts; without labels no score is checked. The task is by default what the folder records,
            or one of the kind that config.json states.
        more_texts: training texts, compared too where there are fewer than 2,000 validation texts.
        formats: which files to keep.
        max_length: longest input in tokens, recorded for prediction; by default what the tokenizer says.
        max_metric_drop: points of the score that int8 may lose; as `export.max_metric_drop`.
        min_agreement: least share, 0..1, of equal predictions (texts, words or given labels), or all but one; 1: all.
        min_recall: least share, 0..1, of the entities of a type that every file must find on the labelled texts.
        progress: called with a short sentence at each step.

    Returns:
        Files, figures and recipe.

    Raises:
        ConfigError: an unknown format or a limit that makes no sense.
        ModelError: not a merged model, a family that cannot be exported, a recall that the model itself lacks.
        DataError: int8 without texts to check it on, an empty text, labels that do not fit.
        ParityError: a stage does not hold; the stages before are in `to`.
        OSError: the disk is full; nothing is left behind.

    Examples:
        >>> exported = export_onnx("runs/reviews/student", "work/onnx", formats=["onnx"])
    """
    say = progress or logger.info
    int8 = _check_settings(formats, max_metric_drop, min_agreement)
    folder = read_model_folder(model_folder, max_length=max_length)
    target = check_target(Path(to), folder)
    check_installed("an export", "train")
    if "openvino" in formats:
        check_installed("an export for OpenVINO", "openvino-export")
    given = texts if isinstance(texts, LabelledTexts) else LabelledTexts(texts)
    if not set(formats) <= {"onnx"} and not len(given.texts):
        raise DataError("int8 must be checked on validation texts, and there are none. Give texts, or only onnx")
    task = _settle_task(folder, given.task)
    say("PyTorch reference")
    checks = Checks(task, folder, backend := _open_encoder(folder), given, more_texts, min_recall)
    with atomic_folder(target) as work:
        start_package(work, folder, backend.tokenizer)
        how = _make_files(work, backend, checks, formats, int8, say)
        # A failed stage leaves the one before it, asked for or not.
        kept: Sequence[Format] = [name for name in formats if (work / _FILES[name][0]).is_file()] or ["onnx"]
        finish_package(work, folder, task, [file for name in kept for file in _FILES[name]], asdict(how))
        check_target(target, folder)  # once more: somebody may have put a file there meanwhile
    if (decided := folder.path / DECISIONS).exists():
        what = "thresholds and the promised error rate are of other files than those of"
        logger.warning("%s: %s %s, which answer without them", decided, what, target)
    files: dict[str, Path] = {name: target / _FILES[name][0] for name in kept}
    sizes: dict[str, int] = {name: sum((target / file).stat().st_size for file in _FILES[name]) for name in kept}
    result = ExportResult(**vars(how), folder=target, files=files, size_bytes=sizes, temperature=folder.temperature)
    if how.failure:
        raise ParityError(f"{target}: {how.failure}. Kept: {', '.join(files)}.", result)
    return result


def _open_encoder(folder: ModelFolder) -> TorchBackend:
    """Load the model; a decoder is refused."""
    from kdlora.deploy.torch_backend import TorchBackend
    from kdlora.models.loading import is_decoder

    backend = TorchBackend(folder)
    if is_decoder(backend.model.config):
        raise ModelError(
            f"{folder.path} is a decoder ({backend.model.config.model_type}), and only encoders are exported to ONNX. "
            "It predicts as it is, by PyTorch; for a file without it choose an encoder as student"
        )
    size = sum(one.numel() * one.element_size() for one in backend.model.parameters())
    if size > _MOST_BYTES:
        raise ModelError(
            f"{folder.path} has {size / 1e9:.1f} GB of weights, and models above {_MOST_BYTES / 1e9:.1f} GB are not "
            "exported to ONNX. It predicts as it is, by PyTorch; for a file without it choose a smaller student"
        )
    return backend


def _make_files(
    work: Path, backend: TorchBackend, checks: Checks, formats: Sequence[Format], int8: Gate, say: Progress
) -> Export:
    """Go on to the first stage that does not hold, and say how the files were made."""
    from kdlora.deploy.graph import OPSET, capture, fuse

    captured, optimised, exact = work / "captured.onnx", work / ONNX_FP32, Gate(largest_difference=FP32_TOLERANCE)
    say("capturing the graph")
    capture(backend.model, backend.input_names, captured)
    parity = checks.judge("onnx", captured, exact, optimised=False)
    if not parity.passed:
        raise ModelError(
            f"{checks.folder.path}: the exported graph does not reproduce the PyTorch model: {parity.reason}. "
            f"The family {backend.model.config.model_type!r} cannot be exported with the installed torch and "
            "transformers."
        )
    say("optimising the graph")
    fused, recipe, faults = fuse(captured, optimised, backend.model.config), "", []
    parity = checks.judge("onnx-optimised", optimised, exact)
    if not parity.passed:
        captured.replace(optimised)
        formats, faults = (), [f"the optimised graph does not reproduce the captured one: {parity.reason}"]
    if "onnx-int8" in formats and not (recipe := _quantise(optimised, work / ONNX_INT8, checks, int8, say)):
        best = max(checks.attempts, key=lambda attempt: attempt.agreement)
        faults.append(f"int8 does not hold with any remedy; the closest was {best.stage}: {best.reason}")
    if "openvino" in formats and (fault := _add_openvino(optimised, checks, exact, int8, say)):
        faults.append(fault)
    return Export(tuple(checks.stages), tuple(checks.attempts), recipe, "; ".join(faults), fused, OPSET)


def _quantise(optimised: Path, to: Path, checks: Checks, gate: Gate, say: Progress) -> str:
    """Try the recipes in order until one passes the gate, and name it; the file is gone where none does."""
    from kdlora.deploy.quantise import quantise, rank_products, recipes

    def rank() -> list[str]:
        say("int8: measuring which products are sensitive")
        return rank_products(optimised, checks.model, checks.texts)

    for recipe in recipes(rank):
        say(f"int8: {recipe.name}")
        quantise(optimised, to, recipe)
        parity = checks.judge(f"onnx-int8 ({recipe.name})", to, gate)
        if parity.passed:
            return recipe.name
        logger.info("int8, %s: %s", recipe.name, parity.reason)
    remove(to)
    return ""


def _add_openvino(optimised: Path, checks: Checks, exact: Gate, int8: Gate, say: Progress) -> str:
    """Judge `model.onnx` in OpenVINO, and make an int8 file of it; say what does not hold, nothing where all does."""
    from kdlora.deploy.openvino_backend import has_bf16
    from kdlora.deploy.quantise import STATIC, quantise_statically

    say("OpenVINO: fp32")
    parity = checks.judge("openvino", optimised, exact, runtime="openvino")
    if not parity.passed:
        return f"OpenVINO does not reproduce the optimised graph: {parity.reason}"
    if has_bf16():
        say("OpenVINO: bf16")
        checks.judge("openvino-bf16", optimised, int8, runtime="openvino", half=True)
    say(f"OpenVINO: {STATIC}")
    to = optimised.with_name(OPENVINO_INT8)
    quantise_statically(optimised, to, checks.model, checks.calibration)
    parity = checks.judge(f"openvino-int8 ({STATIC})", to, int8, runtime="openvino")
    if parity.passed:
        return ""
    for file in (to, to.with_suffix(".bin")):
        remove(file)
    return f"int8 for OpenVINO does not hold: {parity.reason}"


def _check_settings(formats: Sequence[str], max_metric_drop: float, min_agreement: float) -> Gate:
    known = get_args(Format)
    if not formats or not set(formats) <= set(known):
        raise ConfigError(f"export: expected at least one format of {', '.join(known)}, got {list(formats)}.")
    if not max_metric_drop >= 0:
        raise ConfigError(f"export: max_metric_drop must be 0 or more points, got {max_metric_drop}.")
    if not 0 <= min_agreement <= 1:
        raise ConfigError(f"export: min_agreement must be a share between 0 and 1, got {min_agreement}.")
    return Gate(agreement=min_agreement, drop=max_metric_drop)


def check_target(to: Path, folder: ModelFolder) -> Path:
    """Refuse to export an export, and to replace what is none."""
    if folder.backend != "transformers":
        raise ModelError(
            f"{folder.path}: expected a transformers folder (model.safetensors), got one that is exported already."
        )
    target, source = to.absolute(), folder.path.resolve()
    if to.resolve() == source or to.resolve() in source.parents:
        raise ArtifactError(f"{to}: the export would replace the model {folder.path}; give another folder.")
    if target.is_symlink():
        raise ArtifactError(f"{to} is a link, and kdlora replaces none; name the folder that is meant.")
    for entry in refuse_foreign(target, EXPORT_RECORD, "earlier export").glob("*"):
        is_exported = is_model_file(entry) and not entry.name.startswith(_NOT_EXPORTED)
        if not is_exported and entry.name != MEASURED:
            raise ArtifactError(f"{to}: {entry.name} is no file of an export, and would be lost; give a new folder.")
    return target


def _settle_task(folder: ModelFolder, task: Task | None) -> Task:
    """Take the task that is given or recorded, or the defaults of the model's kind."""
    if task is None and folder.task is not None:
        task = Task.from_dict(folder.task)
    names = folder.label_names
    if folder.kind == "tokens" and names != tag_names(tag_types(names)):
        raise ModelError(f"{folder.path}: expected the labels O, B-X, I-X, B-Y, I-Y in this order, got {list(names)}.")
    if task is None:
        return Task(folder.kind, ("text",), ("label",), folder.label_names, DEFAULT_METRICS[folder.kind])
    if task.kind != folder.kind or (task.kind != "regression" and task.label_names != folder.label_names):
        raise ModelError(
            f"{folder.path}: the model gives {folder.kind} outputs {list(folder.label_names)}, but the task is "
            f"{task.kind} with {list(task.label_names)}."
        )
    return replace(task, windows=folder.windows)


def start_package(work: Path, folder: ModelFolder, tokenizer: Any) -> None:
    """Write tokenizer and config, without paths, so that every stage is judged with the files that are shipped."""
    tokenizer.model_max_length = folder.max_length
    tokenizer.save_pretrained(work)
    for source, name in ((folder.path, CONFIG_FILE), (work, TOKENIZER_CONFIG)):
        write_json_atomic(work / name, without_places(read_json(source / name)))


def finish_package(work: Path, folder: ModelFolder, task: Task, keep: Sequence[str], record: Mapping[str, Any]) -> None:
    """Remove the graphs that are not kept, and write the record."""
    for path in work.glob("*.onnx"):
        if path.name not in keep:
            remove(path)
    names = (*keep, TOKENIZER, TOKENIZER_CONFIG, CONFIG_FILE)
    content = {
        "schema_version": 1,
        "source": folder.path.name,
        "source_sha256": {path.name: hash_file(path) for path in sorted(folder.path.glob("*.safetensors"))},
        "task": task.to_dict(),
        "max_length": folder.max_length,
        "temperature": folder.temperature,
        "sha256": {name: hash_file(work / name) for name in names},
        "size_bytes": {name: (work / name).stat().st_size for name in keep},
        **record,
        "versions": collect_versions(),
    }
    write_json_atomic(work / EXPORT_RECORD, seal(plain_json(content)))
