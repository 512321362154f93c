"""What an experiment shipped, as it is written and read: the export's checks, the benchmark, the calibration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from kdlora.errors import ArtifactError
from kdlora.evidence.records import ExperimentLayout
from kdlora.report.render import html_table

TEACHER = "teacher"
"""Name of the teacher in a benchmark."""

_RERUN = "Delete .deployed in the experiment's folder and run the same command again, which makes the file anew."

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class ModelFigures:
    """What one model costs, and how good it is.

    Attributes:
        name: of the model in the table.
        backend: "transformers" or "onnx".
        precision: "fp32" or "int8".
        p50_ms: median latency of one text, tokenisation included.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        texts_per_second: median over the rounds, in length-sorted batches, tokenisation included.
        batch_size: the one with the best throughput.
        load_seconds: from nothing loaded to the first answer, after imports.
        size_bytes: of the weights.
        folder: where it is.
        peak_memory_bytes: above the level after imports, until the last round; None where the system cannot tell.
        score: 0..100; None without labels.
        grid_ms: "batch x length" to median milliseconds of one forward pass.
    """

    name: str
    backend: str
    precision: str
    p50_ms: Amount
    p95_ms: Amount
    p99_ms: Amount
    texts_per_second: Amount
    batch_size: Count
    load_seconds: Amount
    size_bytes: Count
    folder: str = ""
    peak_memory_bytes: Count | None = None
    score: Finite | None = None
    grid_ms: dict[str, Amount] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature and what it does on the data that it was fitted on.

    Attributes:
        temperature: divide logits by it; above 1 the model was too sure.
        rows: validation rows.
        nll_before: mean negative log-likelihood, nats.
        nll_after: the same at the temperature.
        ece_before: expected calibration error, 0..1, ten bins.
        ece_after: the same at the temperature.
    """

    temperature: Amount
    rows: Count
    nll_before: Finite
    nll_after: Finite
    ece_before: Amount
    ece_after: Amount


@dataclass(frozen=True)
class BenchmarkResult:
    """The content of `benchmark.json`: models measured in the same rounds, and the calibration; either may be missing.

    Attributes:
        models: in the order given; ratios are to the first.
        threads: of each model's process.
        rounds: interleaved rounds.
        texts: number of texts.
        split: that they are from.
        machine: processor, cores, memory.
        versions: of the libraries.
        calibration: of the shipped student.
    """

    models: tuple[ModelFigures, ...] = ()
    threads: Count | None = None
    rounds: Count | None = None
    texts: Count | None = None
    split: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        header, rows = self.table()
        return html_table(header, rows, self.conditions())

    def conditions(self) -> str:
        """Say how much was measured."""
        return f"{self.threads} threads, {self.rounds} rounds, {self.texts} texts"

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Give header and rows as text, with ratios to the first model."""
        header = ("model", "runs on", "p50 ms", "p95 ms", "p99 ms", "texts/s", "batch", "speed", "load s", "memory MB")
        return (*header, "size MB", "score"), [self._row(model) for model in self.models]

    def _row(self, model: ModelFigures) -> tuple[str, ...]:
        return (
            model.name,
            f"{model.backend} {model.precision}",
            f"{model.p50_ms:.2f}",
            f"{model.p95_ms:.2f}",
            f"{model.p99_ms:.2f}",
            f"{model.texts_per_second:,.0f}",
            str(model.batch_size),
            f"{model.texts_per_second / self.models[0].texts_per_second:.1f}x",
            f"{model.load_seconds:.2f}",
            "-" if model.peak_memory_bytes is None else f"{model.peak_memory_bytes / 1e6:.0f}",
            f"{model.size_bytes / 1e6:.1f}",
            "-" if model.score is None else f"{model.score:.2f}",
        )


@dataclass(frozen=True)
class Parity:
    """How close a stage of the export is to its reference.

    Attributes:
        stage: name of the stage.
        reference: name of the stage that it is compared with.
        rows: texts compared.
        agreement: share (0..1) of decisions that are the same; for regression, of values within 0.1 standard
            deviations of the reference.
        largest_difference: of two logits; None on disk where it was not finite.
        score: of the stage on the labelled rows, 0..100; None without labels.
        drop: reference's score minus that of the stage, points; None without labels.
        drop_low: lower end of the drop's 95% interval (paired bootstrap).
        drop_high: upper end.
        reason: which limits it broke, in figures; empty where it passed.
    """

    stage: str
    reference: str
    rows: Count
    agreement: Amount
    largest_difference: Amount | None = None
    score: Finite | None = None
    drop: Finite | None = None
    drop_low: Finite | None = None
    drop_high: Finite | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether every limit held."""
        return not self.reason


@dataclass(frozen=True)
class Export:
    """The part of `kdlora_export.json` that says how the files were made.

    Attributes:
        stages: the figures of each stage that passed, in order.
        attempts: those of the stages and recipes of quantisation that did not.
        recipe: of the quantisation that passed; empty without int8.
        failure: why the export ended early.
        fused: fused operator to count.
        opset: of the standard operators.
    """

    stages: tuple[Parity, ...] = ()
    attempts: tuple[Parity, ...] = ()
    recipe: str = ""
    failure: str = ""
    fused: dict[str, int] = field(default_factory=dict)
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

    benchmark: BenchmarkResult | None
    export: Export | None
    benchmark_path: Path
    export_path: Path
    faults: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[ModelFigures, ...]:
        """The models that were measured."""
        return self.benchmark.models if self.benchmark else ()

    @property
    def reference(self) -> ModelFigures | None:
        """The model that the others are compared with: the teacher, else the first."""
        first = self.models[0] if self.models else None
        return next((model for model in self.models if model.name == TEACHER), first)

    @property
    def int8(self) -> ModelFigures | None:
        """The quantised student, where there is one."""
        return next((model for model in self.models if model.precision == "int8"), None)


def read_shipped(layout: ExperimentLayout) -> Shipped | None:
    """Read what was shipped; a file that cannot be read costs its part of the report, no more."""
    paths = layout.benchmark, layout.export_record
    if not any(path.exists() for path in paths):
        return None
    faults: list[str] = []
    benchmark = _attempt(paths[0], BenchmarkResult, faults)
    export = _attempt(paths[1], Export, faults)
    return Shipped(benchmark, export, *paths, tuple(faults))


_Content = TypeVar("_Content", BenchmarkResult, Export)


def read_figures(path: Path, form: type[_Content]) -> _Content:
    """Read one file."""
    try:
        return TypeAdapter(form).validate_json(path.read_bytes())
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
