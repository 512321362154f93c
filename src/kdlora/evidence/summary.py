"""The arms of an experiment in one small table, for terminals and notebooks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kdlora.config import ARMS
from kdlora.evidence.records import RunRecord

COLUMNS = ("arm", "n", "score", "sd", "trained", "params", "ex/s", "ms")
CAPTION = "ex/s: rows trained per second; ms: median latency at batch 1"


@dataclass(frozen=True)
class ArmSummary:
    """A row per arm, as text.

    Attributes:
        title: which split the scores are of.
        rows: cells in the order of `COLUMNS`.
    """

    title: str
    rows: tuple[tuple[str, ...], ...]


def summarise_arms(records: Sequence[RunRecord]) -> ArmSummary:
    """Put the runs of an experiment together, arm by arm."""
    on_test = any(record.test_score is not None for record in records)
    rows = []
    for arm in ARMS:
        runs = [record for record in records if record.arm == arm]
        if runs:
            rows.append((arm, *_cells([record for record in runs if record.status == "finished"], on_test)))
    return ArmSummary(f"score on the {'test' if on_test else 'validation'} split, 0 to 100", tuple(rows))


def _cells(runs: Sequence[RunRecord], on_test: bool) -> tuple[str, ...]:
    scores = [value for run in runs if (value := run.test_score if on_test else run.score) is not None]
    if not runs:
        return ("0", "failed", "", "", "", "", "")
    latencies = [entry.p50_ms for run in runs for entry in run.latency if entry.batch_size == 1]
    speeds = [run.examples_per_second for run in runs if run.examples_per_second]
    return (
        str(len(runs)),
        f"{statistics.mean(scores):.2f}" if scores else "not available",
        f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "–",
        f"{runs[0].trainable_parameters:,}" if runs[0].trainable_parameters is not None else "–",
        f"{runs[0].total_parameters:,}" if runs[0].total_parameters is not None else "–",
        f"{statistics.mean(speeds):.0f}" if speeds else "–",
        f"{statistics.mean(latencies):.1f}" if latencies else "–",
    )
