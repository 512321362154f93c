"""Read what an experiment shipped: the export's checks, the benchmark, the calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdlora.errors import ArtifactError
from kdlora.evidence.records import ExperimentLayout

TEACHER = "teacher"
"""Name of the teacher in a benchmark."""

_RERUN = "Delete .deployed in the experiment's folder and run the same command again, which makes the file anew."

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Part of a file that a newer version may have added keys to."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ShippedModel(_Part):
    """What one model of the benchmark costs, and how good it is."""

    name: str
    backend: str
    precision: str
    unmerged: bool = False
    p50_ms: Amount = Field(description="median of one text, tokenisation included, milliseconds")
    p95_ms: Amount = Field(description="95th percentile, milliseconds")
    texts_per_second: Amount = Field(description="in length-sorted batches, tokenisation included")
    batch_size: Count = Field(description="the one with the best throughput")
    load_seconds: Amount = Field(description="from nothing loaded to the first answer, after imports")
    peak_memory_bytes: Count | None = Field(default=None, description="above the level after imports")
    size_bytes: Count = Field(description="of the weights")
    score: Finite | None = Field(default=None, description="0 to 100")
    grid_ms: dict[str, Amount] = Field(default_factory=dict, description="'batch x length' to ms of a forward pass")


class CalibrationFigures(_Part):
    """A fitted temperature and what it does on the rows that it was fitted on."""

    temperature: Amount
    rows: Count
    nll_before: Finite = Field(description="mean negative log-likelihood, nats")
    nll_after: Finite
    ece_before: Amount = Field(description="expected calibration error, 0 to 1")
    ece_after: Amount


class Benchmark(_Part):
    """The content of `benchmark.json`: models measured side by side, and the calibration; either may be missing."""

    models: tuple[ShippedModel, ...] = ()
    threads: Count | None = None
    rounds: Count | None = None
    texts: Count | None = None
    split: str = ""
    machine: dict[str, str] = Field(default_factory=dict)
    calibration: CalibrationFigures | None = None


class ExportStage(_Part):
    """How close one stage of the export is to the one before it."""

    stage: str
    reference: str
    rows: Count
    largest_difference: Amount | None = Field(default=None, description="of two logits; None where not finite")
    agreement: Amount | None = Field(default=None, description="share of equal decisions")
    score: Finite | None = None
    drop: Finite | None = Field(default=None, description="points lost against the reference")
    drop_low: Finite | None = None
    drop_high: Finite | None = None
    reason: str = Field(default="", description="the limits that it broke; empty where it passed")


class Export(_Part):
    """The part of `kdlora_export.json` that the report shows."""

    stages: tuple[ExportStage, ...] = ()
    attempts: tuple[ExportStage, ...] = Field(default=(), description="stages and recipes that did not pass")
    recipe: str = Field(default="", description="of the quantisation that passed")
    failure: str = Field(default="", description="why the export ended early")
    fused: dict[str, int] = Field(default_factory=dict)
    opset: int | None = None


@dataclass(frozen=True)
class Shipped:
    """What lies in an experiment folder beside the student.

    Attributes:
        benchmark: figures side by side; None without the file, or where it cannot be read.
        export: checks of the ONNX files; None without them, or where they cannot be read.
        benchmark_path: where the figures come from.
        export_path: where the checks come from.
        faults: sentences on files that cannot be read.
    """

    benchmark: Benchmark | None
    export: Export | None
    benchmark_path: Path
    export_path: Path
    faults: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[ShippedModel, ...]:
        """The models that were measured."""
        return self.benchmark.models if self.benchmark else ()

    @property
    def reference(self) -> ShippedModel | None:
        """The model that the others are compared with: the teacher, else the first."""
        first = self.models[0] if self.models else None
        return next((model for model in self.models if model.name == TEACHER), first)

    @property
    def int8(self) -> ShippedModel | None:
        """The quantised student, where there is one."""
        return next((model for model in self.models if model.precision == "int8"), None)


def read_shipped(layout: ExperimentLayout) -> Shipped | None:
    """Read what was shipped; a file that cannot be read costs its part of the report, no more.

    Args:
        layout: the experiment folder.

    Returns:
        What there is; None where neither a benchmark nor an export lies in the folder.
    """
    paths = layout.benchmark, layout.export_record
    if not any(path.exists() for path in paths):
        return None
    faults: list[str] = []
    benchmark = _attempt(paths[0], Benchmark, faults)
    export = _attempt(paths[1], Export, faults)
    return Shipped(benchmark, export, *paths, tuple(faults))


_Content = TypeVar("_Content", Benchmark, Export)


def read_figures(path: Path, form: type[_Content]) -> _Content:
    """Read one file.

    Args:
        path: `benchmark.json` or `kdlora_export.json`.
        form: what it should hold.

    Raises:
        ArtifactError: it cannot be read, or does not hold that; the message names the first fault.
    """
    try:
        return form.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}. {_RERUN}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        where = f" at {place!r}" if place else ""
        raise ArtifactError(f"{path}: not the figures of this version{where}: {first['msg']}. {_RERUN}") from None


def _attempt(path: Path, form: type[_Content], faults: list[str]) -> _Content | None:
    """Read one file if it is there, and note it if that fails."""
    if not path.exists():
        return None
    try:
        return read_figures(path, form)
    except ArtifactError as error:
        faults.append(str(error).removeprefix(f"{path.parent}/"))
        return None
