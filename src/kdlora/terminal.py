"""What a person sees: a console that strangers' texts cannot trick, bars, the plan, and the table at the end.

Light: the rooms that load torch are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from kdlora.errors import harmless

if TYPE_CHECKING:
    from kdlora.distil.session import ProgressEvent
    from kdlora.experiment.preview import ExperimentPlan
    from kdlora.experiment.run import ExperimentResult, Listener
    from kdlora.experiment.stages import Stage

Show = Callable[[str, int | None, float | None, str], None]
"""Takes a bar's name, what is done, of how many (None: not known) and how that reads."""


class SafeConsole(Console):
    """A console on which names from data and folders cannot move the cursor or hide text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Give the parts that are printed."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(harmless(part.text), part.style)

    def tell(self, text: str, style: str | None = None) -> None:
        """Print a line as it is: no markup, no colours by guess, no wrapping of paths."""
        self.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def draw_bars() -> Iterator[Show | None]:
    """Give what draws bars, in a terminal or below a notebook's cell; None where standard error is neither."""
    console = SafeConsole(stderr=True)
    if console.is_jupyter:
        yield NotebookBars().show
        return
    if not console.is_terminal:  # no log shall fill with bars
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
    bars: dict[str, TaskID] = {}
    progress = Progress(*columns, TimeRemainingColumn(), console=console)

    def show(name: str, done: int | None, total: float | None, status: str) -> None:
        if name not in bars:
            progress.start()  # not before: a question may be asked first
            bars[name] = progress.add_task(name, total=None, status="")
        progress.update(bars[name], total=total, completed=done, status=status)

    try:
        yield show
    finally:
        progress.stop()


class NotebookBars:
    """Bars below a notebook's cell; they need IPython and no widgets."""

    def __init__(self) -> None:
        self._bars: dict[str, tuple[int | None, float | None, str]] = {}
        self._shown: Any = None
        self._drawn_at = 0.0

    def show(self, name: str, done: int | None, total: float | None, status: str) -> None:
        """Take the state of a bar; all are drawn anew at most five times a second, and at a bar's beginning and end."""
        is_new = name not in self._bars
        self._bars[name] = done, total, status
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
        for name, (done, total, status) in self._bars.items():
            amount = "" if total is None else f' value="{done}" max="{total}"'
            bar = f'<progress aria-label="{escape(name)}"{amount}></progress>'
            rows += f'<tr><th scope="row">{escape(name)}</th><td>{bar}</td><td>{escape(status)}</td></tr>'
        return f"<table>{rows}</table>"


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
    with draw_bars() as show:
        yield None if show is None else lambda stage, event: show(_title(stage), *_state(event))


def _title(stage: Stage) -> str:
    titles = {"label": "teacher reads the training rows", "deploy": "export and measure the student"}
    return titles.get(stage.name, f"{stage.arm}, seed {stage.seed}")


def _state(event: ProgressEvent | tuple[int, int] | str) -> tuple[int | None, int | None, str]:
    """Give what is done, of how many, and how that reads."""
    if isinstance(event, str):
        return None, None, event
    if isinstance(event, tuple):
        done, total = event
        return done, total, f"{done:,} of {total:,}"
    parts = [f"epoch {event.epoch:.1f}/{event.epochs:g}"]
    terms = {"loss": event.loss}
    if event.soft_loss is not None:  # without a teacher the loss is the hard loss
        terms |= {"hard": event.hard_loss, "soft": event.soft_loss}
    parts += [f"{name} {value:.3f}" for name, value in terms.items() if value is not None]
    if event.score is not None:
        parts.append(f"score {event.score:.1f}")
    if event.examples_per_second:
        parts.append(f"{event.examples_per_second:.0f} examples/s")
    return event.step, event.steps, "  ".join(parts)


def print_plan(plan: ExperimentPlan, console: SafeConsole) -> None:
    """Print what an experiment is about to do."""
    for name, text in plan.lines():
        console.tell(f"{name:<11} {text}")


def print_result(result: ExperimentResult) -> None:
    """Print the table of the arms, what was noted on the way, and where everything lies."""
    from kdlora.evidence.records import SUMMARY, summarise_arms
    from kdlora.report.choice import read_choice

    console, layout = SafeConsole(), result.layout
    for note in result.notes:
        console.tell(note, style="dim")
    title, rows = summarise_arms(result.records)
    table = Table(title=title, caption="ex/s: rows trained per second; ms: median latency at batch 1")
    for name in SUMMARY:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for record in result.failed:
        console.tell(f"failed: {record.arm}, seed {record.seed}: {record.error}", style="red")
    if result.shipped is not None:
        console.tell(f"student  {layout.student} ({result.shipped.arm}, seed {result.shipped.seed})")
        if (choice := read_choice(layout.shipped)) is not None:
            console.tell(choice.sentence)
        if layout.onnx.exists():
            console.tell(f"onnx     {layout.onnx}")
    console.tell(f"report   {layout.report_html}")
