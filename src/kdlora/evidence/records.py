"""The record of a run, and the one place that names the files of an experiment folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from kdlora.errors import ArtifactError, first_line
from kdlora.foreign import read_json
from kdlora.system.integrity import CHECKSUM, is_sealed_or_old, seal
from kdlora.system.storage import plain_json, write_json_atomic

SCHEMA_VERSION = 1

_SECTIONS: dict[str, dict[str, type]] = {
    "teacher": {"model": str},
    "student": {"model": str},
    "distil": {},
    "data": {"path": str, "subset": str, "revision": str, "augment": int},
}
"""What reports and cards read of a run's config, which may be a stranger's or of an earlier version."""
_RERUN = "Delete the run's folder and run the same command again."
_REWRITE = "The same `kdlora run` again writes it anew, from the records of its runs."


class Latency(BaseModel):
    """Time of one forward pass of the merged model, after warm-up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(gt=0, description="texts in one pass")
    p50_ms: float = Field(ge=0, description="median, milliseconds")
    p95_ms: float = Field(ge=0, description="95th percentile, milliseconds")
    threads: int = Field(gt=0, description="threads that the pass could use")


@dataclass(frozen=True)
class Asked:
    """How fast a language model answered whose answers are a table of probabilities, and for what price."""

    FILE: ClassVar[str] = "asked.json"

    model: str
    questions: int  # with or without an answer
    timed: int  # of these, those of the longest call, which the next two are of
    per_second: Annotated[float, Field(gt=0)] | None
    concurrency: int
    cost_per_million: float | None  # questions, where prices were given
    own_labels: bool = False  # people labelled nothing, and the likeliest answers are the training labels

    @classmethod
    def read(cls, folder: Path) -> Asked | None:
        """Read what `kdlora ask` left beside its table; None where the table is of other making."""
        file = folder / cls.FILE
        if not file.exists():
            return None
        remedy = "Delete it, and run kdlora ask again."
        content = read_json(file, remedy)
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as fault:
            raise ArtifactError(f"{file} is damaged: {first_line(fault)}. {remedy}") from None


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
    threshold: float | None = Field(
        default=None, gt=0, lt=1, description="probability above which a label of several is said; None: 0.5"
    )
    history: list[dict[str, Any]] = Field(default_factory=list, description="one entry a validation")
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
    asked: Asked | None = Field(default=None, description="the language model whose answers are the teacher")
    precision: str = ""
    device: str = ""
    truncated: dict[str, int] = Field(default_factory=dict, description="texts cut at max_length")
    fingerprints: dict[str, str] = Field(default_factory=dict, description="of config, data, base, teacher, …")
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of what was kept, by path from the root")
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str] = Field(default_factory=dict)
    git: dict[str, str] = Field(default_factory=dict)
    started: str = Field(default="", description="ISO 8601")
    finished: str = Field(default="", description="ISO 8601")
    notes: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _has_sections(cls, config: dict[str, Any]) -> dict[str, Any]:
        for name, keys in _SECTIONS.items():
            section = config.get(name) or {}
            known = isinstance(section, dict) and {key: section.get(key) for key in keys}
            if known is False or not all(isinstance(value, (keys[key], type(None))) for key, value in known.items()):
                raise ValueError(f"its section {name} is none of a config's")
        return config

    @property
    def teacher_arm(self) -> str:
        return "lora" if (self.config.get("teacher") or {}).get("tuning") == "lora" else "fft"

    def thresholds(self, temperature: float = 1.0) -> dict[str, float]:
        """Give each label the run's threshold, as a probability at a temperature; nothing where it is 0.5."""
        if self.threshold is None:
            return {}
        odds = (self.threshold / (1 - self.threshold)) ** (1 / temperature)
        return dict.fromkeys(self.task["label_names"], odds / (1 + odds))


class _Inside:
    """A file or folder of a layout: its name, and what it lies in."""

    def __init__(self, name: str, of: str = "root") -> None:
        self.name, self.of = name, of

    def __get__(self, layout: Any, owner: type) -> Path:
        return getattr(layout, self.of) / self.name


@dataclass(frozen=True)
class RunLayout:
    """The names inside the folder of one run."""

    root: Path

    record = _Inside("run.json")
    predictions = _Inside("predictions.parquet")  # logits and labels of the validation (and test) rows
    model = _Inside("model")  # of a fully tuned student
    adapter = _Inside("adapter")  # with its head
    checkpoints = _Inside("checkpoints")  # what an interrupted training continues from


@dataclass(frozen=True)
class ExperimentLayout:
    """The names inside an experiment folder, or in that of a suite's configuration."""

    root: Path
    shared_folder: Path | None = None  # of what a suite's configurations have in common
    shared_teacher: Path | None = None  # that another configuration trained
    texts: str = ""  # which texts the teacher labels; students of other texts share it

    config = _Inside("config.yaml")  # the resolved configuration, which reruns the experiment
    plan = _Inside("plan.json")  # what was said before the last trainings began
    results = _Inside("results.json")  # all run records in one file
    shipped = _Inside("shipped.json")  # which run `student/` and `adapter/` are, and why it was chosen
    report_md = _Inside("report.md")
    report_html = _Inside("report.html")  # one self-contained page
    lock = _Inside(".lock")  # held by the process that runs the experiment
    precision = _Inside("precision.json", of="shared")  # what `run.precision: auto` was found to be
    copies = _Inside("copies", of="shared")  # perturbed copies of the training texts
    examples = _Inside("examples.parquet")  # texts that the report may quote
    student = _Inside("student")  # what ships, merged
    adapter = _Inside("adapter")  # of what ships
    onnx = _Inside("student-onnx")  # what ships, for ONNX Runtime
    page = _Inside("page")  # what ships, for a browser; the demo makes it
    export_record = _Inside("kdlora_export.json", of="onnx")  # how the files there were made and checked
    benchmark = _Inside("benchmark.json")  # teacher and student as they are shipped, measured side by side
    deferral = _Inside("defer.json")  # the error rate that is promised, and what each model would have to hand on
    thresholds = _Inside("thresholds.json")  # above which probability what ships says a label, and what that does
    decided = _Inside(".decided")  # fingerprint of the two, where the config asked for them
    deployed = _Inside(".deployed")  # fingerprint of what `student-onnx/` and `benchmark.json` were made from
    exported = _Inside(".exported")  # the same without `benchmark.json`, between the export and the measurement
    teacher_logits = _Inside("logits", of="teacher")
    runs = _Inside("runs")

    @property
    def shared(self) -> Path:
        return self.shared_folder or self.root

    @property
    def teacher(self) -> Path:
        return self.shared_teacher or self.root / "teacher"

    @property
    def unlabelled_logits(self) -> Path:
        return self.teacher / (f"logits-unlabelled-{self.texts}" if self.texts else "logits-unlabelled")

    def run(self, arm: str, seed: int) -> RunLayout:
        return RunLayout(self.runs / f"{arm}-seed{seed}")


def write_record(path: str | Path, record: RunRecord) -> None:
    """Write a run record with a checksum, atomically; numbers that are not finite become null."""
    write_json_atomic(path, seal(plain_json(record.model_dump())))


def read_record(path: str | Path) -> RunRecord:
    return _parse_record(_read_json(Path(path), _RERUN), str(path), _RERUN)


def write_results(path: str | Path, records: Iterable[RunRecord]) -> None:
    write_json_atomic(path, {"runs": [record.model_dump() for record in records]})


def read_results(path: str | Path) -> list[RunRecord]:
    content = _read_json(Path(path), _REWRITE)
    runs = content.get("runs")
    if not isinstance(runs, list):
        raise ArtifactError(f"{path}: expected a list under 'runs', found {type(runs).__name__}. {_REWRITE}")
    return [_parse_record(run, f"{path}, run {row}", _REWRITE) for row, run in enumerate(runs)]


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"{path}: there is no such file. Run the experiment first, or check the path.")
    return read_json(path, remedy)


def _parse_record(content: Any, where: str, remedy: str) -> RunRecord:
    if not isinstance(content, dict):
        raise ArtifactError(f"{where}: expected a JSON object, found {type(content).__name__}. {remedy}")
    if (version := content.get("schema_version")) != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: expected schema_version {SCHEMA_VERSION}, found {version!r}. If a newer kdlora wrote it, "
            f"upgrade (`pip install --upgrade kdlora`); else {remedy[0].lower()}{remedy[1:]}"
        )
    try:
        record = RunRecord.model_validate(plain_json({key: one for key, one in content.items() if key != CHECKSUM}))
    except ValidationError as fault:
        faults = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in fault.errors())
        raise ArtifactError(f"{where}: expected a run record, but {faults}. {remedy}") from None
    if not is_sealed_or_old(content):
        raise ArtifactError(f"{where}: its content does not fit its checksum, so it was damaged or edited. {remedy}")
    return record
