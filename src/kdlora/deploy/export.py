"""Export a classifier: PyTorch to ONNX to an optimised graph to int8, each stage held to the one before it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from kdlora.data.tasks import Task
from kdlora.deploy.encode import Text
from kdlora.deploy.folder import ONNX_FP32, ONNX_INT8, ModelFolder, read_model_folder
from kdlora.deploy.gates import Checks, Gate, reference_checks
from kdlora.deploy.package import OPSET, check_target, finish_package, start_package
from kdlora.errors import ArtifactError, ConfigError, DataError, KdLoraError, ModelError, did_you_mean
from kdlora.report.shipped import Export, Parity
from kdlora.system.ownership import remove
from kdlora.system.storage import atomic_folder

if TYPE_CHECKING:
    from kdlora.deploy.quantise import Recipe
    from kdlora.deploy.torch_backend import TorchBackend

logger = logging.getLogger(__name__)

Format = Literal["onnx", "onnx-int8"]
Progress = Callable[[str], None]

FP32_TOLERANCE = 1e-4
"""Largest difference of fp32 logits; for regression, relative to the largest output above 1."""
_FILES = {"onnx": ONNX_FP32, "onnx-int8": ONNX_INT8}
_DEFAULT_METRICS = {
    "single-label": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "multi-label": ("micro_f1",),
}


class ParityError(ArtifactError):
    """A stage is not as good as the one before it; the stages that passed are on disk.

    Attributes:
        result: what was exported, with the figures of every attempt.
    """

    def __init__(self, message: str, result: ExportResult) -> None:
        """Join the message and the partial result."""
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        folder: the new model folder.
        files: format to file.
        stages: the figures of each stage that passed, in order.
        attempts: those of the stages and recipes of quantisation that did not.
        fused: fused operator to count.
        recipe: the recipe of quantisation that passed; empty without int8.
        opset: of the standard operators.
        size_bytes: format to bytes.
        temperature: of the calibration that the folder applies; 1 without one.
    """

    folder: Path
    files: dict[str, Path]
    stages: tuple[Parity, ...]
    attempts: tuple[Parity, ...]
    fused: dict[str, int]
    recipe: str
    opset: int
    size_bytes: dict[str, int]
    temperature: float


@dataclass
class _Progress:
    """How far an export has come: what passed, what did not, and why it ended."""

    stages: list[Parity] = field(default_factory=list)
    attempts: list[Parity] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    recipe: str = ""
    failure: str = ""

    def record(self) -> dict[str, Any]:
        """Give what the export's record says of the way."""
        stages, attempts = tuple(self.stages), tuple(self.attempts)
        return asdict(Export(stages, attempts, self.recipe, self.failure, self.fused, OPSET))


def export_onnx(
    model_folder: str | Path,
    to: str | Path,
    *,
    texts: Sequence[Text] = (),
    labels: Sequence[Any] | np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    more_texts: Sequence[Text] = (),
    task: Task | None = None,
    formats: Sequence[Format] = ("onnx", "onnx-int8"),
    max_length: int | None = None,
    max_metric_drop: float = 0.5,
    min_agreement: float = 0.99,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a transformers folder as a folder that ONNX Runtime serves without torch.

    Stages: PyTorch fp32, the captured graph, the optimised graph (`model.onnx`), dynamic int8
    (`model_quantized.onnx`). Each must reproduce the one before it on the given texts, or the export fails with the
    figures and keeps the stages before. Where plain int8 does not hold, remedies are tried in order; the result
    names the one that passed.

    Args:
        model_folder: a merged model, such as an experiment's `student`.
        to: the folder to write; it appears whole or not at all. An earlier export there is replaced.
        texts: validation texts, or pairs as tuples.
        labels: label indices, values, or 0/1 rows of `texts`; without them no score is checked.
        groups: group of each text (MNLI).
        more_texts: training texts, compared too where there are fewer than 2,000 validation texts.
        task: columns and score metrics; by default those of the kind that config.json states.
        formats: which files to keep.
        max_length: longest input in tokens, recorded for prediction; by default what the tokenizer says.
        max_metric_drop: points that int8 may lose.
        min_agreement: least share of equal predictions of int8, 0..1.
        progress: called with a short sentence at each step.

    Returns:
        Files, figures and recipe.

    Raises:
        ConfigError: an unknown format or a limit that makes no sense.
        ModelError: not a merged classifier, a family that cannot be exported.
        DataError: int8 without texts to check it on, an empty text, labels that do not fit.
        ParityError: a stage does not hold; the stages before are in `to`.
        OSError: the disk is full; nothing is left behind.
    """
    say = progress or (lambda step: logger.info("%s", step))
    gate = _check_settings(formats, max_metric_drop, min_agreement)
    folder = _source_folder(model_folder, max_length)
    target = check_target(Path(to), folder)
    _require_tools()
    from kdlora.deploy.torch_backend import TorchBackend

    if "onnx-int8" in formats and not len(texts):
        raise DataError(
            "int8 must be checked on validation texts, and there are none. Give texts, or formats=('onnx',)."
        )
    settled = _settle_task(folder, task)
    say("PyTorch reference")
    backend = TorchBackend.load(folder)
    checks = reference_checks(settled, folder, backend, texts, labels, groups=groups, more_texts=more_texts)
    done = _Progress()
    with atomic_folder(target) as work:
        start_package(work, folder, backend.tokenizer)
        _run_stages(done, checks, backend, work, formats, gate, say)
        finish_package(work, folder, settled, _kept(done, formats), done.record())
    result = _result(target, folder, done, formats)
    if done.failure:
        raise ParityError(f"{target}: {done.failure}. Kept: {', '.join(result.files)}.", result)
    return result


def _run_stages(
    done: _Progress,
    checks: Checks,
    backend: TorchBackend,
    work: Path,
    formats: Sequence[str],
    gate: Gate,
    say: Progress,
) -> None:
    """Go from stage to stage; the first that does not hold ends the way."""
    from kdlora.deploy.fuse import fuse
    from kdlora.deploy.trace import ONE_OPERATOR_FAMILIES, capture

    config = backend.model.config
    exact = Gate(largest_difference=FP32_TOLERANCE)
    say("capturing the graph")
    captured, optimised = work / "captured.onnx", work / ONNX_FP32
    capture(backend.model, backend.input_names, captured)
    parity = checks.judge("onnx", captured, exact, optimised=False)
    if not parity.passed:
        raise ModelError(
            f"{checks.folder.path}: the exported graph does not reproduce the PyTorch model: {parity.reason}. The "
            f"family {config.model_type!r} cannot be exported with the installed torch and transformers."
        )
    done.stages.append(parity)
    done.files["onnx"] = captured
    say("optimising the graph")
    done.fused = fuse(
        captured,
        optimised,
        layers=config.num_hidden_layers,
        attention=config.model_type in ONE_OPERATOR_FAMILIES,
        gelu=_activation(config) == "gelu",
    )
    parity = checks.judge("onnx-optimised", optimised, exact)
    if not parity.passed:
        done.attempts.append(parity)
        done.failure = f"the optimised graph does not reproduce the captured one: {parity.reason}"
        return
    done.stages.append(parity)
    done.files["onnx"] = optimised
    if "onnx-int8" in formats:
        _quantise(done, checks, optimised, work / ONNX_INT8, gate, say)


def _quantise(done: _Progress, checks: Checks, optimised: Path, to: Path, gate: Gate, say: Progress) -> None:
    """Try the recipes in order until one passes the gate."""
    from kdlora.deploy.quantise import quantise

    for recipe in _recipes(checks, optimised, say):
        say(f"int8: {recipe.name}")
        quantise(optimised, to, recipe)
        parity = checks.judge(f"onnx-int8 ({recipe.name})", to, gate)
        if parity.passed:
            done.stages.append(parity)
            done.files["onnx-int8"] = to
            done.recipe = recipe.name
            return
        logger.info("int8, %s: %s", recipe.name, parity.reason)
        done.attempts.append(parity)
    remove(to)
    best = max(done.attempts, key=lambda parity: parity.agreement)
    done.failure = f"int8 does not hold with any remedy; the closest was {best.stage}: {best.reason}"


def _recipes(checks: Checks, optimised: Path, say: Progress) -> Iterator[Recipe]:
    """Give the recipes; the sensitivity of the products is measured only when the first ones have failed."""
    from kdlora.deploy.quantise import excluding, rank_products, recipes

    yield from recipes()
    say("int8: measuring which products are sensitive")
    yield from excluding(rank_products(optimised, checks.folder, checks.texts))


def _check_settings(formats: Sequence[str], max_metric_drop: float, min_agreement: float) -> Gate:
    """Check what needs no model."""
    known = get_args(Format)
    if not formats:
        raise ConfigError(f"export: expected at least one format of {', '.join(known)}, got none.")
    for name in formats:
        if name not in known:
            raise ConfigError(
                f"export: unknown format {name!r}; expected one of {', '.join(known)}.{did_you_mean(name, known)}"
            )
    if not max_metric_drop >= 0:
        raise ConfigError(f"export: max_metric_drop must be 0 or more points, got {max_metric_drop}.")
    if not 0 <= min_agreement <= 1:
        raise ConfigError(f"export: min_agreement must be a share between 0 and 1, got {min_agreement}.")
    return Gate(agreement=min_agreement, drop=max_metric_drop)


def _source_folder(model_folder: str | Path, max_length: int | None) -> ModelFolder:
    """Read the folder to export, which must hold PyTorch weights."""
    folder = read_model_folder(model_folder, max_length=max_length)
    if folder.backend != "transformers":
        raise ModelError(
            f"{folder.path}: expected a transformers folder (model.safetensors), got one that is exported already."
        )
    return folder


def _settle_task(folder: ModelFolder, task: Task | None) -> Task:
    """Take the task that is given or recorded, or the defaults of the model's kind."""
    if task is None and folder.task is not None:
        task = Task.from_dict(folder.task)
    if task is None:
        return Task(folder.kind, ("text",), ("label",), folder.label_names, _DEFAULT_METRICS[folder.kind])
    if task.kind != folder.kind or (task.kind != "regression" and task.label_names != folder.label_names):
        raise ModelError(
            f"{folder.path}: the model gives {folder.kind} outputs {list(folder.label_names)}, but the task is "
            f"{task.kind} with {list(task.label_names)}."
        )
    return task


def _require_tools() -> None:
    """Name the extra that is missing before any work is done."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise KdLoraError(f"{', '.join(missing)} not installed, needed for export: pip install 'kdlora[onnx]'")


def _activation(config: Any) -> str:
    """Name the activation of the feed-forward layers; families spell the setting in three ways."""
    names = ("hidden_act", "activation", "hidden_activation")
    return next((str(getattr(config, name)) for name in names if getattr(config, name, None)), "")


def _kept(done: _Progress, formats: Sequence[str]) -> dict[str, Path]:
    """Choose the files to keep; a failed stage leaves the one before it, asked for or not."""
    kept = {name: done.files[name] for name in formats if name in done.files}
    return {_FILES[name]: path for name, path in (kept or done.files).items()}


def _result(target: Path, folder: ModelFolder, done: _Progress, formats: Sequence[str]) -> ExportResult:
    """Describe the folder that is in its place now."""
    names = {file: name for name, file in _FILES.items()}
    files = {names[file]: target / file for file in _kept(done, formats)}
    return ExportResult(
        folder=target,
        files=files,
        stages=tuple(done.stages),
        attempts=tuple(done.attempts),
        fused=done.fused,
        recipe=done.recipe,
        opset=OPSET,
        size_bytes={name: path.stat().st_size for name, path in files.items()},
        temperature=folder.temperature,
    )
