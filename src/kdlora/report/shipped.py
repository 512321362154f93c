"""What an experiment shipped, as it is written, read and shown: the export's checks, the benchmark, the calibration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kdlora.errors import ArtifactError, counted
from kdlora.evidence.records import ExperimentLayout
from kdlora.foreign import read_json
from kdlora.report.page import Block, Cell, Link, Paragraph, Prose, Table, Tile, html_table, strong
from kdlora.report.wording import cores_of, milliseconds, points, shown, signed, size, times
from kdlora.system.storage import plain_json

if TYPE_CHECKING:
    from kdlora.report.collect import Experiment

TEACHER = "teacher"
_BACKENDS = {"transformers": "PyTorch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
_STAGES = {"pytorch": "PyTorch", "onnx": "ONNX, as captured", "onnx-optimised": "ONNX, optimised"}
_STAGES |= {"openvino": "OpenVINO", "openvino-bf16": "OpenVINO in bf16"}
_INT8_STAGE = re.compile(r"(onnx|openvino)-int8 \((?P<recipe>.*)\)", re.DOTALL)
_RERUN = "Delete .deployed in the experiment's folder and run the same command again to write the file."

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class ModelFigures:
    """What one model costs, and how good it is."""

    name: str
    backend: str  # "transformers", "onnx" or "openvino"
    precision: str  # "fp32", "bf16" or "int8"
    p50_ms: Amount  # latency of one text, tokenisation included
    p95_ms: Amount
    p99_ms: Amount
    texts_per_second: Amount  # median over the rounds, in length-sorted batches, tokenisation included
    batch_size: Count  # the one with the best throughput
    load_seconds: Amount  # from nothing loaded to the first answer, after imports
    size_bytes: Count  # of the weights
    folder: str = ""
    peak_memory_bytes: Count | None = None  # above the level after imports; None where the system cannot tell
    score: Finite | None = None  # 0..100; None without labels
    thresholds: dict[str, Amount] = field(default_factory=dict)  # of labels, which the score is by; empty: none
    speeds: dict[int, Amount] = field(default_factory=dict)  # largest number of texts in a batch to texts a second


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does on the `rows` (or words) of its fit: log loss in nats, error of ten bins."""

    temperature: Amount  # divide logits by it; above 1 the model was too sure
    rows: Count
    nll_before: Finite
    nll_after: Finite
    ece_before: Amount
    ece_after: Amount


@dataclass(frozen=True)
class BenchmarkResult:
    """The content of `benchmark.json`: models measured in the same rounds, and the calibration; either may be missing.

    Ratios are to the first model; each model's process had so many threads, and read so many texts of the split.
    """

    models: tuple[ModelFigures, ...] = ()
    threads: Count | None = None
    rounds: Count | None = None
    texts: Count | None = None
    split: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()  # what was said of the deployment, such as why nothing was exported

    def _repr_html_(self) -> str:
        return html_table(self.table())

    def conditions(self) -> str:
        of = f" of the {self.split} split" if self.split else ""
        counts = ((self.texts, "text", of), (self.rounds, "round", ""), (self.threads, "thread", " for each model"))
        known = [f"{counted(value, what)}{more}" for value, what, more in counts if value]
        return ", ".join(
            filter(None, [*known, self.machine.get("cpu"), cores_of(self.machine), self.machine.get("memory")])
        )

    def table(self, links: tuple[Link, ...] = ()) -> Table:
        base = next((model for model in self.models if model.name == TEACHER), self.models[0])
        note = (
            f"{self.conditions() or 'The conditions were not recorded'}. Latency: one text at a time, tokenisation "
            "included. Texts/s: length-sorted batches of the size that is best for the model. "
            f"Speed-up: against {base.name}. Load time: until the first answer, after imports. Peak memory: above the "
            "level after imports. Score: 0 to 100, of the one seed that was shipped."
        )
        if fitted := [one.name for one in self.models if one.thresholds and one.score is not None]:
            note += f" By fitted thresholds: the score of {', '.join(fitted)}."
        columns: dict[str, Callable[[ModelFigures], Cell | str]] = {
            "model": lambda one: Cell(one.name, links),
            "runs on": lambda one: _BACKENDS.get(one.backend, one.backend),
            "precision": lambda one: one.precision,
            "latency p50": lambda one: milliseconds(one.p50_ms),
            "latency p99": lambda one: milliseconds(one.p99_ms),
            "speed-up of p50": lambda one: times(base.p50_ms, one.p50_ms),
            "texts/s": lambda one: f"{one.texts_per_second:,.0f}",
            "batch size": lambda one: str(one.batch_size),
            "speed-up of texts/s": lambda one: times(one.texts_per_second, base.texts_per_second),
            "load time": lambda one: f"{one.load_seconds:.2f}\u00a0s",
            "peak memory": lambda one: size(one.peak_memory_bytes),
            "size on disk": lambda one: size(one.size_bytes),
            "score": lambda one: points(one.score, 2),
        }
        caption = "Models measured side by side"
        return Table.of(caption, self.models, columns, text_columns=3, note=note, compact=True)


@dataclass(frozen=True)
class Parity:
    """How close a stage of the export is to its reference, another stage, on the same texts."""

    stage: str
    reference: str
    rows: Count
    agreement: Amount  # share of equal decisions; for regression, of values within 0.1 standard deviations
    largest_difference: Amount | None = None  # of two logits; None on disk where it was not finite
    score: Finite | None = None  # on the labelled rows, 0..100
    drop: Finite | None = None  # the reference's score minus that of the stage, points, and its 95% interval
    drop_low: Finite | None = None
    drop_high: Finite | None = None
    reason: str = ""  # which limits it broke, in figures; empty where it passed
    recall: dict[str, Amount] = field(default_factory=dict)  # of the types of entities for which it has a limit, 0..1
    unseen: Amount | None = None  # share of equal decisions on the labelled rows alone, without training texts
    labelled: Count | None = None  # their number

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Export:
    """The part of `kdlora_export.json` that says how the files were made."""

    stages: tuple[Parity, ...] = ()  # those that passed, in order
    attempts: tuple[Parity, ...] = ()  # stages and recipes of quantisation that did not
    recipe: str = ""  # of the quantisation that passed; empty without int8
    failure: str = ""  # why the export ended early
    fused: dict[str, int] = field(default_factory=dict)  # operator to count
    opset: int | None = None


@dataclass(frozen=True)
class Shipped:
    """What lies in an experiment folder beside the student, and sentences on what cannot be read of it."""

    benchmark: BenchmarkResult = BenchmarkResult()
    export: Export = Export()
    faults: tuple[str, ...] = ()


def read_shipped(layout: ExperimentLayout) -> Shipped:
    benchmark, fault = read_part(layout.benchmark, BenchmarkResult, _RERUN)
    export, other = read_part(layout.export_record, Export, _RERUN)
    return Shipped(benchmark or BenchmarkResult(), export or Export(), tuple(filter(None, (fault, other))))


def read_part(path: Path, form: type[Any], remedy: str) -> tuple[Any, str]:
    """Read a file if it is there, or say what is wrong with it, which costs its part of the report, no more."""
    try:
        return (TypeAdapter(form).validate_python(plain_json(read_json(path, remedy))) if path.exists() else None), ""
    except ArtifactError as error:
        return None, str(error).replace(str(path), path.name)  # the report may travel
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        where = f" at {place!r}" if place else ""
        return None, f"{path.name}: not the figures of this version{where}: {first['msg']}. {remedy}"


def shipped_blocks(experiment: Experiment) -> list[Block | None]:
    layout, shipped = experiment.layout, experiment.shipped
    if not (layout.benchmark.exists() or layout.export_record.exists()):
        return []
    benchmark = shipped.benchmark
    blocks: list[Block | None] = [Paragraph(told, "warning") for told in (*shipped.faults, *benchmark.notes)]
    if (page := layout.page / "index.html").is_file():
        served = f"python -m http.server --bind 127.0.0.1 -d {layout.page.name}"
        how = f"a page for the browser, once its folder is served: {served}"
        blocks.append((Tile("Try it", experiment.href(page), how, experiment.href(page)),))
    if benchmark.models:
        blocks.append(benchmark.table((Link("benchmark.json", experiment.href(layout.benchmark)),)))
    blocks += _export_blocks(shipped.export, experiment.href(layout.export_record))
    if not layout.export_record.exists():
        told = "The student was not exported to ONNX: export.formats is empty, or the export failed, as the run said."
        blocks.append(Paragraph(told, "note"))
    if benchmark.calibration is not None:
        blocks.append(_calibration_table(benchmark.calibration, experiment.task.kind))
    return blocks


def _export_blocks(export: Export, href: str) -> list[Block]:
    blocks: list[Block] = []
    if export.failure:
        told = f": {export.failure}. The stages before it are kept."
        blocks.append(Paragraph(strong("The export failed before its last stage") + told, "warning"))
    # As they were tried: what failed before the quantisation that passed stands before it.
    passed = [stage for stage in export.stages if not _INT8_STAGE.fullmatch(stage.stage)]
    stages = [*passed, *export.attempts, *(stage for stage in export.stages if stage not in passed)]
    if not stages:
        return blocks
    blocks.append(stage_table(export, stages, (Link("export record", href),)))
    failed = Prose("{}: <strong>failed</strong>, {}.")
    blocks.append(tuple(failed.format(_stage_title(one.stage), one.reason) for one in stages if one.reason))
    return blocks


def stage_table(export: Export, stages: Sequence[Parity], links: tuple[Link, ...] = ()) -> Table:
    fused = ", ".join(f"{number} {name}" for name, number in export.fused.items() if number)
    facts = [
        f"Quantisation: {export.recipe}." if export.recipe else "",
        f"Fused operators: {fused}." if fused else "",
        f"Opset {export.opset}." if export.opset is not None else "",
        "Each stage is compared with the one named, on the same texts. Scores and the second share of decisions are of "
        "the labelled rows alone, without training texts.",
    ]
    return Table.of(
        "The export, stage by stage",
        stages,
        {
            "stage": lambda one: Cell(_stage_title(one.stage), links),
            "held to": lambda one: _stage_title(one.reference),
            "outcome": lambda one: strong("failed") if one.reason else "passed",
            "rows": lambda one: f"{one.rows:,}",
            "largest logit difference": lambda one: shown(one.largest_difference, ".2g"),
            "same decisions": lambda one: _share(one.agreement),
            "of labelled rows": lambda one: (
                "–" if one.unseen is None else f"{_share(one.unseen)} ({one.labelled or 0:,} rows)"
            ),
            "score": lambda one: points(one.score, 2),
            "points lost": lambda one: signed(one.drop, 2),
            "95% interval": lambda one: (
                "–" if one.drop_low is None else f"{signed(one.drop_low, 2)} to {signed(one.drop_high, 2)}"
            ),
        },
        text_columns=3,
        note=" ".join(fact for fact in facts if fact),
        compact=True,
    )


def _share(value: float) -> str:
    """Round down, so that 100% means all."""
    return "100%" if value >= 1 else f"{math.floor(1e4 * value) / 100:.2f}%"


def _stage_title(stage: str) -> str:
    quantised = _INT8_STAGE.fullmatch(stage)
    return f"quantised: {quantised['recipe']}" if quantised else _STAGES.get(stage, stage)


def _calibration_table(found: Calibration, kind: str) -> Table:
    after = (f"{found.temperature:.3f}", f"{100 * found.ece_after:.2f}%", f"{found.nll_after:.4f}")
    rows = (
        ("before", "1", f"{100 * found.ece_before:.2f}%", f"{found.nll_before:.4f}"),
        ("after", *map(strong, after)),
    )
    columns = ("", "temperature", "expected calibration error", "log loss (nats)")
    of = "words" if kind == "tokens" else "rows"
    told = (
        f"Fitted on {found.rows:,} {of} of the validation split and measured on the same, so “after” is a little "
        "too good. Ten bins. Logits are divided by the temperature: above 1, the student was too sure. Predictions "
        "stay the same."
    )
    return Table("Calibration of the shipped student", columns, rows, note=told, compact=True)
