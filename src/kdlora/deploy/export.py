"""Export a classifier: PyTorch to ONNX to an optimised graph to int8, each stage held to the one before it."""

from __future__ import annotations

import errno
import importlib.util
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kdlora.data.tasks import DEFAULT_METRICS, Task
from kdlora.deploy.encode import Text
from kdlora.deploy.folder import (
    CONFIG_FILE,
    EXPORT_RECORD,
    ONNX_FP32,
    ONNX_INT8,
    TOKENIZER,
    ModelFolder,
    is_model_file,
    read_model_folder,
)
from kdlora.deploy.gates import Checks, Gate, LabelledTexts
from kdlora.errors import ArtifactError, ConfigError, DataError, KdLoraError, ModelError, did_you_mean
from kdlora.foreign import read_json
from kdlora.models.settings import TOKENIZER_CONFIG
from kdlora.report.shipped import Export, Parity
from kdlora.system.environment import collect_versions
from kdlora.system.integrity import hash_file, seal
from kdlora.system.ownership import remove
from kdlora.system.storage import atomic_folder, plain_json, write_json_atomic

if TYPE_CHECKING:
    from kdlora.deploy.torch_backend import TorchBackend

logger = logging.getLogger(__name__)

Format = Literal["onnx", "onnx-int8"]
Progress = Callable[[str], None]

FP32_TOLERANCE = 1e-4
"""Largest difference of fp32 logits; for regression, relative to the largest output above 1."""
_COPIES = 6
"""Graphs that exist at once while a stage is made: the stage before, the new one, and the tools' temporary ones."""
_FILES = {"onnx": ONNX_FP32, "onnx-int8": ONNX_INT8}


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
    """What an export wrote, and how: stages, attempts, recipe, failure and fused operators, as its record has them.

    Attributes:
        folder: the new model folder.
        files: format to file.
        size_bytes: format to bytes.
        temperature: of the calibration that the folder applies; 1 without one.
    """

    folder: Path
    files: dict[str, Path]
    size_bytes: dict[str, int]
    temperature: float


def export_onnx(
    model_folder: str | Path,
    to: str | Path,
    *,
    texts: Sequence[Text] | LabelledTexts = (),
    more_texts: Sequence[Text] = (),
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
        texts: validation texts; without labels no score is checked. The task is by default what the folder records,
            or one of the kind that config.json states.
        more_texts: training texts, compared too where there are fewer than 2,000 validation texts.
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
    folder = read_model_folder(model_folder, max_length=max_length)
    target = check_target(Path(to), folder)
    require_tools()
    given = texts if isinstance(texts, LabelledTexts) else LabelledTexts(texts)
    if "onnx-int8" in formats and not len(given.texts):
        raise DataError(
            "int8 must be checked on validation texts, and there are none. Give texts, or formats=('onnx',)."
        )
    task = _settle_task(folder, given.task)
    say("PyTorch reference")
    from kdlora.deploy.torch_backend import TorchBackend

    backend = TorchBackend(folder)
    return _Export(Checks(task, folder, backend, given, more_texts), formats, gate, say).write(target, backend)


class _Export:
    """The way of an export from stage to stage: what passed, what did not, and why it ended."""

    def __init__(self, checks: Checks, formats: Sequence[Format], int8: Gate, say: Progress) -> None:
        self.checks, self.formats, self.int8, self.say = checks, formats, int8, say
        self.stages: list[Parity] = []
        self.attempts: list[Parity] = []
        self.files: dict[str, Path] = {}
        self.fused: dict[str, int] = {}
        self.recipe = self.failure = ""

    def write(self, target: Path, backend: TorchBackend) -> ExportResult:
        """Write the folder, with what passed."""
        from kdlora.deploy.trace import OPSET

        folder = self.checks.folder
        with atomic_folder(target) as work:
            start_package(work, folder, backend.tokenizer)
            self.run_stages(work, backend)
            # A failed stage leaves the one before it, asked for or not.
            kept = {name: self.files[name] for name in self.formats if name in self.files} or self.files
            how = Export(tuple(self.stages), tuple(self.attempts), self.recipe, self.failure, self.fused, OPSET)
            graphs = {_FILES[name]: file for name, file in kept.items()}
            finish_package(work, folder, self.checks.task, graphs, asdict(how))
        files = {name: target / _FILES[name] for name in kept}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        result = ExportResult(**vars(how), folder=target, files=files, size_bytes=sizes, temperature=folder.temperature)
        if self.failure:
            raise ParityError(f"{target}: {self.failure}. Kept: {', '.join(files)}.", result)
        return result

    def run_stages(self, work: Path, backend: TorchBackend) -> None:
        """Go on to the first stage that does not hold."""
        exact = Gate(largest_difference=FP32_TOLERANCE)
        captured = self._capture(work, backend, exact)
        if self._optimise(captured, work / ONNX_FP32, backend, exact) and "onnx-int8" in self.formats:
            self._quantise(work / ONNX_FP32, work / ONNX_INT8)

    def _passes(self, parity: Parity, format_name: str, file: Path) -> bool:
        (self.stages if parity.passed else self.attempts).append(parity)
        if parity.passed:
            self.files[format_name] = file
        return parity.passed

    def _capture(self, work: Path, backend: TorchBackend, exact: Gate) -> Path:
        from kdlora.deploy.trace import capture

        self.say("capturing the graph")
        captured = work / "captured.onnx"
        capture(backend.model, backend.input_names, captured)
        parity = self.checks.judge("onnx", captured, exact, optimised=False)
        if not self._passes(parity, "onnx", captured):
            raise ModelError(
                f"{self.checks.folder.path}: the exported graph does not reproduce the PyTorch model: {parity.reason}. "
                f"The family {backend.model.config.model_type!r} cannot be exported with the installed torch and "
                "transformers."
            )
        return captured

    def _optimise(self, captured: Path, optimised: Path, backend: TorchBackend, exact: Gate) -> bool:
        from kdlora.deploy.fuse import fuse

        self.say("optimising the graph")
        self.fused = fuse(captured, optimised, backend.model.config)
        parity = self.checks.judge("onnx-optimised", optimised, exact)
        if not parity.passed:
            self.failure = f"the optimised graph does not reproduce the captured one: {parity.reason}"
        return self._passes(parity, "onnx", optimised)

    def _quantise(self, optimised: Path, to: Path) -> None:
        """Try the recipes in order until one passes the gate."""
        from kdlora.deploy.quantise import quantise, rank_products, recipes

        def rank() -> list[str]:
            self.say("int8: measuring which products are sensitive")
            return rank_products(optimised, self.checks.folder, self.checks.texts)

        for recipe in recipes(rank):
            self.say(f"int8: {recipe.name}")
            quantise(optimised, to, recipe)
            parity = self.checks.judge(f"onnx-int8 ({recipe.name})", to, self.int8)
            if self._passes(parity, "onnx-int8", to):
                self.recipe = recipe.name
                return
            logger.info("int8, %s: %s", recipe.name, parity.reason)
        remove(to)
        best = max(self.attempts, key=lambda parity: parity.agreement)
        self.failure = f"int8 does not hold with any remedy; the closest was {best.stage}: {best.reason}"


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


def check_target(to: Path, folder: ModelFolder) -> Path:
    """Refuse to export an export, to replace what is none, and a disk that is too small."""
    if folder.backend != "transformers":
        raise ModelError(
            f"{folder.path}: expected a transformers folder (model.safetensors), got one that is exported already."
        )
    target = to.absolute()
    source = folder.path.absolute()
    if target == source or target in source.parents:
        raise ArtifactError(f"{to}: the export would replace the model {folder.path}; give another folder.")
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{to}: expected a folder to write, got a file.")
    if target.is_dir() and any(target.iterdir()) and not (target / EXPORT_RECORD).is_file():
        raise ArtifactError(f"{to}: the folder is not empty and holds no earlier export; give a new folder.")
    if target.is_dir() and (foreign := [entry.name for entry in target.iterdir() if not is_model_file(entry)]):
        raise ArtifactError(f"{to}: {foreign[0]} is no file of an export, and would be lost; give a new folder.")
    place = next(parent for parent in (target, *target.parents) if parent.exists())
    free, needed = shutil.disk_usage(place).free, _COPIES * folder.size_bytes
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the export needs about {needed / 1e6:,.0f} MB of free space for a while, there are {free / 1e6:,.0f} MB",
            str(to),
        )
    return target


def _settle_task(folder: ModelFolder, task: Task | None) -> Task:
    """Take the task that is given or recorded, or the defaults of the model's kind."""
    if task is None and folder.task is not None:
        task = Task.from_dict(folder.task)
    if task is None:
        return Task(folder.kind, ("text",), ("label",), folder.label_names, DEFAULT_METRICS[folder.kind])
    if task.kind != folder.kind or (task.kind != "regression" and task.label_names != folder.label_names):
        raise ModelError(
            f"{folder.path}: the model gives {folder.kind} outputs {list(folder.label_names)}, but the task is "
            f"{task.kind} with {list(task.label_names)}."
        )
    return task


def missing_tools() -> list[str]:
    """Name the packages of the extra that are not installed."""
    return [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]


def require_tools() -> None:
    """Name the extra that is missing before any work is done."""
    if missing := missing_tools():
        raise KdLoraError(f"{', '.join(missing)} not installed, needed for export: pip install 'kdlora[onnx]'")


def start_package(work: Path, folder: ModelFolder, tokenizer: Any) -> None:
    """Write tokenizer and config, so that every stage is judged with the files that are shipped."""
    tokenizer.model_max_length = folder.max_length
    tokenizer.save_pretrained(work)
    write_json_atomic(work / CONFIG_FILE, read_json(folder.path / CONFIG_FILE))


def finish_package(work: Path, folder: ModelFolder, task: Task, keep: dict[str, Path], record: dict[str, Any]) -> None:
    """Put the graphs that are kept in their place, remove the others, and write the record."""
    for name, path in keep.items():
        path.replace(work / name)
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
