"""The record of a run, and the one place that names the files of an experiment folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdlora.errors import ArtifactError
from kdlora.system.integrity import CHECKSUM, is_sealed_or_old, seal
from kdlora.system.storage import plain_json, write_json_atomic

SCHEMA_VERSION = 1

_RERUN = "Delete the run's folder and run the same command again."


class Latency(BaseModel):
    """Time of one forward pass of the merged model, after warm-up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(gt=0, description="texts in one pass")
    p50_ms: float = Field(ge=0, description="median, milliseconds")
    p95_ms: float = Field(ge=0, description="95th percentile, milliseconds")
    threads: int = Field(gt=0, description="threads that the pass could use")


class RunRecord(BaseModel):
    """Everything that is known about one arm × seed. What was not measured is None, never 0."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    schema_version: int = SCHEMA_VERSION
    experiment: str = Field(description="name of the experiment")
    task: dict[str, Any] = Field(description="Task.to_dict()")
    rows: dict[str, int] = Field(default_factory=dict, description="examples per split")
    arm: str
    seed: int
    status: Literal["finished", "failed", "running"]
    error: str | None = Field(default=None, description="why a failed run failed")
    teacher_model: str | None = Field(default=None, description="source of the teacher")
    student_model: str | None = Field(default=None, description="source of the student")
    model: str = Field(description="source of the model that this arm trained")
    score: float | None = Field(default=None, description="validation, 0 to 100")
    metrics: dict[str, float | None] = Field(default_factory=dict, description="validation, fractions")
    test_score: float | None = Field(default=None, description="test, 0 to 100")
    test_metrics: dict[str, float | None] = Field(default_factory=dict, description="test, fractions")
    history: list[dict[str, Any]] = Field(default_factory=list, description="one entry an epoch")
    trainable_parameters: int | None = None
    adapter_parameters: int | None = None
    head_parameters: int | None = None
    total_parameters: int | None = Field(default=None, description="of the model as it is shipped (merged)")
    size_bytes: int | None = Field(default=None, description="of the shipped model on disk")
    peak_memory_bytes: int | None = Field(default=None, description="training, above the level after imports")
    train_seconds: float | None = Field(default=None, description="training loop, evaluation excluded")
    evaluation_seconds: float | None = Field(default=None, description="validations, final scores, latency")
    examples_per_second: float | None = None
    best_epoch: float | None = None
    latency: list[Latency] = Field(default_factory=list)
    precision: str = ""
    device: str = ""
    truncated: dict[str, int] = Field(default_factory=dict, description="texts cut at max_length")
    fingerprints: dict[str, str] = Field(default_factory=dict, description="SHA-256 of config, data, base, teacher")
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of what was kept, by path from the root")
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str] = Field(default_factory=dict)
    git: dict[str, str] = Field(default_factory=dict)
    started: str = Field(default="", description="ISO 8601")
    finished: str = Field(default="", description="ISO 8601")
    notes: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class RunLayout:
    """The names inside the folder of one run."""

    root: Path

    @property
    def record(self) -> Path:
        """The run's record."""
        return self.root / "run.json"

    @property
    def predictions(self) -> Path:
        """Logits and labels of the validation (and test) rows."""
        return self.root / "predictions.parquet"

    @property
    def model(self) -> Path:
        """The trained model: merged where the arm has an adapter."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The adapter with its head."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What an interrupted training continues from."""
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        """The run's log."""
        return self.root / "run.log"


@dataclass(frozen=True)
class ExperimentLayout:
    """The names inside an experiment folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, which reruns the experiment."""
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        """What was said before the last trainings began."""
        return self.root / "plan.json"

    @property
    def results(self) -> Path:
        """All run records in one file."""
        return self.root / "results.json"

    @property
    def shipped(self) -> Path:
        """Which run `student/` and `adapter/` are, and why it was chosen."""
        return self.root / "shipped.json"

    @property
    def report_md(self) -> Path:
        """The report as Markdown."""
        return self.root / "report.md"

    @property
    def report_html(self) -> Path:
        """The report as one self-contained page."""
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the process that runs the experiment."""
        return self.root / ".lock"

    @property
    def shared(self) -> Path:
        """The folder of what all runs have in common."""
        return self.root

    @property
    def precision(self) -> Path:
        """What `run.precision: auto` was found to be."""
        return self.shared / "precision.json"

    @property
    def copies(self) -> Path:
        """Perturbed copies of the training texts."""
        return self.shared / "copies"

    @property
    def examples(self) -> Path:
        """Texts that the report may quote."""
        return self.root / "examples.parquet"

    @property
    def student(self) -> Path:
        """The shipped student, merged."""
        return self.root / "student"

    @property
    def onnx(self) -> Path:
        """The shipped student for ONNX Runtime."""
        return self.root / "student-onnx"

    @property
    def export_record(self) -> Path:
        """How the files in `student-onnx/` were made and checked."""
        return self.onnx / "kdlora_export.json"

    @property
    def deployed(self) -> Path:
        """Fingerprint of what `student-onnx/` and `benchmark.json` were made from, written last."""
        return self.root / ".deployed"

    @property
    def exported(self) -> Path:
        """The same without `benchmark.json`, between the export and the measurement."""
        return self.root / ".exported"

    @property
    def benchmark(self) -> Path:
        """Teacher and student as they are shipped, measured side by side."""
        return self.root / "benchmark.json"

    @property
    def adapter(self) -> Path:
        """The shipped student's adapter."""
        return self.root / "adapter"

    @property
    def teacher(self) -> Path:
        """The one teacher and its logits."""
        return self.root / "teacher"

    @property
    def teacher_logits(self) -> Path:
        """The stored teacher logits."""
        return self.teacher / "logits"

    @property
    def unlabelled_logits(self) -> Path:
        """The stored teacher logits of the unlabelled rows."""
        return self.teacher / "logits-unlabelled"

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.root / "runs"

    def run(self, arm: str, seed: int) -> RunLayout:
        """Name the folder of one arm × seed."""
        return RunLayout(self.runs / f"{arm}-seed{seed}")


def write_record(path: str | Path, record: RunRecord) -> None:
    """Write a run record with a checksum, atomically; numbers that are not finite become null."""
    write_json_atomic(path, seal(plain_json(record.model_dump())))


def read_record(path: str | Path) -> RunRecord:
    """Read a run record."""
    return _parse_record(_read_json(Path(path)), str(path))


def write_results(path: str | Path, records: Iterable[RunRecord]) -> None:
    """Write `{"runs": [...]}` atomically."""
    write_json_atomic(path, {"runs": [record.model_dump() for record in records]})


def read_results(path: str | Path) -> list[RunRecord]:
    """Read the records of a `results.json`."""
    content = _read_json(Path(path))
    runs = content.get("runs")
    if not isinstance(runs, list):
        raise ArtifactError(f"{path}: expected a list under 'runs', found {type(runs).__name__}. {_RERUN}")
    return [_parse_record(run, f"{path}, run {row}") for row, run in enumerate(runs)]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there is no such file. Run the experiment first, or check the path.") from None
    except (ValueError, RecursionError) as fault:
        raise ArtifactError(
            f"{path}: expected a whole JSON file, but it is cut off or damaged: {fault}. {_RERUN}"
        ) from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(content).__name__}. {_RERUN}")
    return content


def _parse_record(content: Any, where: str) -> RunRecord:
    """Check version and fields of a record."""
    if not isinstance(content, dict):
        raise ArtifactError(f"{where}: expected a JSON object, found {type(content).__name__}. {_RERUN}")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        if isinstance(version, int) and version > SCHEMA_VERSION:
            remedy = "It was written by a newer kdlora: upgrade with `pip install --upgrade kdlora`."
        else:
            remedy = f"It was written by an older kdlora: {_RERUN[0].lower()}{_RERUN[1:]}"
        raise ArtifactError(f"{where}: expected schema_version {SCHEMA_VERSION}, found {version!r}. {remedy}")
    try:
        record = RunRecord.model_validate({key: value for key, value in content.items() if key != CHECKSUM})
    except ValidationError as fault:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}" for error in fault.errors()
        )
        raise ArtifactError(f"{where}: expected a run record, but {faults}. {_RERUN}") from None
    if not is_sealed_or_old(content):
        raise ArtifactError(f"{where}: its content does not fit its checksum, so it was damaged or edited. {_RERUN}")
    return record
