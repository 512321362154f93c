"""The part of the report on what was shipped: its cost and score beside the teacher's, and how it was checked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from kdlora.report.collect import Experiment
from kdlora.report.page import Block, Cell, Link, Paragraph, Prose, Table, Tile, strong
from kdlora.report.shipped import Calibration, Export, Parity
from kdlora.report.tables import Links
from kdlora.report.wording import points, signed

_STAGES = {"pytorch": "PyTorch", "onnx": "ONNX, as captured", "onnx-optimised": "ONNX, optimised"}
_STAGES |= {"openvino": "OpenVINO", "openvino-bf16": "OpenVINO in bf16"}
_INT8_STAGE = re.compile(r"(onnx|openvino)-int8 \((?P<recipe>.*)\)", re.DOTALL)


def shipped_blocks(experiment: Experiment, links: Links) -> list[Block | None]:
    layout, shipped = experiment.layout, experiment.shipped
    if shipped is None:
        return []
    benchmark = shipped.benchmark
    blocks: list[Block | None] = [Paragraph(told, "warning") for told in (*shipped.faults, *benchmark.notes)]
    if (page := layout.page / "index.html").is_file():
        how = f"a page for the browser, once its folder is served: python -m http.server -d {layout.page.name}"
        blocks.append((Tile("Try it", links.file(page), how, links.file(page)),))
    if benchmark.models:
        link = Link("benchmark.json", links.file(layout.benchmark))
        blocks.append(benchmark.table((link,)))
    blocks += _export_blocks(shipped.export, links.file(layout.export_record))
    if not layout.export_record.exists():
        told = "The student was not exported to ONNX: export.formats is empty, or the export failed, as the run said."
        blocks.append(Paragraph(told, "note"))
    if benchmark.calibration is not None:
        blocks.append(_calibration_table(benchmark.calibration))
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
            "largest logit difference": lambda one: (
                "–" if one.largest_difference is None else f"{one.largest_difference:.2g}"
            ),
            "same decisions": lambda one: _share(one.agreement),
            "of labelled rows": lambda one: (
                "–" if one.unseen is None else f"{_share(one.unseen)} of {one.labelled or 0:,}"
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


def _calibration_table(found: Calibration) -> Table:
    after = (f"{found.temperature:.3f}", f"{100 * found.ece_after:.2f}%", f"{found.nll_after:.4f}")
    rows = (
        ("before", "1", f"{100 * found.ece_before:.2f}%", f"{found.nll_before:.4f}"),
        ("after", *map(strong, after)),
    )
    columns = ("", "temperature", "expected calibration error", "log loss (nats)")
    told = (
        f"Fitted on {found.rows:,} validation rows and measured on the same, so “after” is a little too good. "
        "Ten bins. Logits are divided by the temperature: above 1, the student was too sure. Predictions stay the same."
    )
    return Table("Calibration of the shipped student", columns, rows, note=told, compact=True)
