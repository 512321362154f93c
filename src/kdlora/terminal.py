"""What a person sees while an experiment runs, and the table at its end."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from kdlora.config import ARMS
from kdlora.distil.session import ProgressEvent
from kdlora.evidence.records import RunRecord
from kdlora.experiment.run import ExperimentResult, Listener
from kdlora.experiment.stages import Stage


@contextlib.contextmanager
def live_progress() -> Iterator[Listener | None]:
    """Give a listener that draws a bar per stage on standard error; None where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    bars: dict[Stage, TaskID] = {}
    with Progress(*columns, console=console) as progress:

        def listen(stage: Stage, event: Any) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(_title(stage), total=None, status="")
            if isinstance(event, str):
                progress.update(bars[stage], status=event)
            elif isinstance(event, ProgressEvent):
                progress.update(bars[stage], total=event.steps, completed=event.step, status=_status(event))
            else:
                done, total = event
                progress.update(bars[stage], total=total, completed=done, status=f"{done:,} of {total:,}")

        yield listen


def _title(stage: Stage) -> str:
    titles = {"label": "teacher reads the training rows", "deploy": "export and measure the student"}
    return titles.get(stage.name, f"{stage.arm}, seed {stage.seed}")


def _status(event: ProgressEvent) -> str:
    parts = [f"epoch {event.epoch:.1f}/{event.epochs:g}"]
    terms = {"loss": event.loss, "hard": event.hard_loss, "soft": event.soft_loss}
    if event.soft_loss is None:
        del terms["hard"], terms["soft"]  # without a teacher the loss is the hard loss
    parts += [f"{name} {value:.3f}" for name, value in terms.items() if value is not None]
    if event.score is not None:
        parts.append(f"score {event.score:.1f}")
    if event.examples_per_second:
        parts.append(f"{event.examples_per_second:.0f} examples/s")
    return "  ".join(parts)


def print_result(result: ExperimentResult) -> None:
    """Print the table of the arms, what was noted on the way, and where everything lies.

    Args:
        result: of an experiment.
    """
    console = Console()
    for note in result.notes:
        console.print(note, style="dim", markup=False)
    console.print(_table(result.records))
    for record in result.failed:
        console.print(f"failed: {record.arm}, seed {record.seed}: {record.error}", style="red", markup=False)
    layout = result.layout
    if result.shipped is not None:
        console.print(f"student  {layout.student} ({result.shipped.arm}, seed {result.shipped.seed})", markup=False)
        if layout.onnx.exists():
            console.print(f"onnx     {layout.onnx}", markup=False)
    console.print(f"report   {layout.report_html}", markup=False)


def _table(records: list[RunRecord]) -> Table:
    on_test = any(record.test_score is not None for record in records)
    table = Table(
        title=f"score on the {'test' if on_test else 'validation'} split, 0 to 100",
        caption="ex/s: rows trained per second; ms: median latency at batch 1",
    )
    table.add_column("arm", no_wrap=True)
    for name in ("n", "score", "sd", "trained", "params", "ex/s", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in ARMS:
        runs = [record for record in records if record.arm == arm]
        if runs:
            table.add_row(arm, *_cells([record for record in runs if record.status == "finished"], on_test))
    return table


def _cells(runs: list[RunRecord], on_test: bool) -> list[str]:
    scores = [value for run in runs if (value := run.test_score if on_test else run.score) is not None]
    if not runs:
        return ["0", "failed", "", "", "", "", ""]
    latencies = [entry.p50_ms for run in runs for entry in run.latency if entry.batch_size == 1]
    speeds = [run.examples_per_second for run in runs if run.examples_per_second]
    return [
        str(len(runs)),
        f"{statistics.mean(scores):.2f}" if scores else "not available",
        f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "–",
        f"{runs[0].trainable_parameters:,}" if runs[0].trainable_parameters is not None else "–",
        f"{runs[0].total_parameters:,}" if runs[0].total_parameters is not None else "–",
        f"{statistics.mean(speeds):.0f}" if speeds else "–",
        f"{statistics.mean(latencies):.1f}" if latencies else "–",
    ]
