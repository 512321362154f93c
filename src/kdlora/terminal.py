"""What a person sees while an experiment runs, and the table at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from html import escape
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from kdlora.console import SafeConsole
from kdlora.distil.session import ProgressEvent
from kdlora.evidence.records import RunRecord
from kdlora.evidence.summary import CAPTION, COLUMNS, summarise_arms
from kdlora.experiment.preview import ExperimentPlan
from kdlora.experiment.run import ExperimentResult, Listener
from kdlora.experiment.stages import Stage
from kdlora.report.choice import read_choice


@contextlib.contextmanager
def live_progress() -> Iterator[Listener | None]:
    """Give a listener for `run_experiment` that draws a bar per stage, in a terminal or below a notebook's cell.

    Example:
        ```python
        with live_progress() as listen:
            result = run_experiment(config, listen=listen)
        ```

    Yields:
        The listener; None where standard error is neither, so that no log fills with bars.
    """
    console = SafeConsole(stderr=True)
    if console.is_jupyter:
        yield NotebookBars().listen
        return
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
    progress = Progress(*columns, console=console)

    def listen(stage: Stage, event: Any) -> None:
        if stage not in bars:
            progress.start()  # not before: a question may be asked first
            bars[stage] = progress.add_task(_title(stage), total=None, status="")
        done, total, status = _state(event)
        if total is None:
            progress.update(bars[stage], status=status)
        else:
            progress.update(bars[stage], total=total, completed=done, status=status)

    try:
        yield listen
    finally:
        progress.stop()


class NotebookBars:
    """Bars below a notebook's cell, one a stage; they need IPython and no widgets."""

    def __init__(self) -> None:
        self._bars: dict[Stage, tuple[int, int | None, str]] = {}
        self._shown: Any = None
        self._drawn_at = 0.0

    def listen(self, stage: Stage, event: Any) -> None:
        """Take an event of a stage; the bars are drawn anew at most five times a second, and at a stage's end."""
        is_new = stage not in self._bars
        self._bars[stage] = _state(event)
        done, total, _ = self._bars[stage]
        if is_new or done == total or time.monotonic() - self._drawn_at >= 0.2:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import HTML, display

        page = HTML(self.html())
        if self._shown is None:
            self._shown = display(page, display_id=True)
        else:
            self._shown.update(page)
        self._drawn_at = time.monotonic()

    def html(self) -> str:
        """Give the bars as a table."""
        rows = ""
        for stage, (done, total, status) in self._bars.items():
            name = escape(_title(stage))
            amount = "" if total is None else f' value="{done}" max="{total}"'
            bar = f'<progress aria-label="{name}"{amount}></progress>'
            rows += f'<tr><th scope="row">{name}</th><td>{bar}</td><td>{escape(status)}</td></tr>'
        return f"<table>{rows}</table>"


def _state(event: Any) -> tuple[int, int | None, str]:
    """Give what is done, of how many, and how that reads."""
    if isinstance(event, str):
        return 0, None, event
    if isinstance(event, ProgressEvent):
        return event.step, event.steps, _status(event)
    done, total = event
    return done, total, f"{done:,} of {total:,}"


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


def print_plan(plan: ExperimentPlan, console: SafeConsole) -> None:
    """Print what an experiment is about to do."""
    for name, text in plan.lines():
        console.print(f"{name:<11} {text}", markup=False, highlight=False, soft_wrap=True)


def print_result(result: ExperimentResult) -> None:
    """Print the table of the arms, what was noted on the way, and where everything lies."""
    console = SafeConsole()
    for note in result.notes:
        console.print(note, style="dim", markup=False)
    console.print(_table(result.records))
    for record in result.failed:
        console.print(f"failed: {record.arm}, seed {record.seed}: {record.error}", style="red", markup=False)
    layout = result.layout
    if result.shipped is not None:
        shipped = f"{layout.student} ({result.shipped.arm}, seed {result.shipped.seed})"
        console.print(f"student  {shipped}", markup=False, soft_wrap=True)
        if (choice := read_choice(layout.shipped)) is not None:
            console.print(choice.sentence, markup=False)
        if layout.onnx.exists():
            console.print(f"onnx     {layout.onnx}", markup=False, soft_wrap=True)
    console.print(f"report   {layout.report_html}", markup=False, soft_wrap=True)


def _table(records: list[RunRecord]) -> Table:
    summary = summarise_arms(records)
    table = Table(title=summary.title, caption=CAPTION)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in summary.rows:
        table.add_row(*row)
    return table
