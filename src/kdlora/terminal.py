"""What a person sees: a console that strangers' texts cannot trick, bars, the plan, and the table at the end.

Light: the packages that load torch are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from kdlora.errors import harmless

if TYPE_CHECKING:
    from kdlora.distil.trainer import ProgressEvent
    from kdlora.experiment.preview import ExperimentPlan
    from kdlora.experiment.run import ExperimentResult, Listener
    from kdlora.experiment.stages import Stage

Show = Callable[..., None]
"""Takes a bar's name, what is done, of how many (None: not known), how that reads, and a line for a log, if any."""


class SafeConsole(Console):
    """A console on which names from data and folders cannot move the cursor, hide text or be markup."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for part in super().render(renderable, options):
            yield part if part.control else Segment(harmless(part.text), part.style)

    def tell(self, text: str, style: str | None = None) -> None:
        """Print a line as it is: no colours by guess, no wrapping of paths."""
        self.print(text, style=style, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def draw_bars() -> Iterator[Show]:
    """Give what draws bars, in a terminal or below a notebook's cell; elsewhere it prints the lines for a log."""
    console = SafeConsole(stderr=True)
    if console.is_jupyter:
        yield NotebookBars().show
        return
    if not console.is_terminal:  # no log shall fill with bars
        yield lambda name, done, total, status, line="": console.tell(line) if line else None
        return
    texts = [TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[status]}")]
    columns = (texts[0], BarColumn(), texts[1])
    bars: dict[str, TaskID] = {}
    progress = Progress(*columns, TimeRemainingColumn(), console=console)

    def show(name: str, done: int | None, total: float | None, status: str, line: str = "") -> None:
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
        self._rows: dict[str, str] = {}
        self._shown: Any = None
        self._drawn_at = 0.0

    def show(self, name: str, done: int | None, total: float | None, status: str, line: str = "") -> None:
        """Take the state of a bar; all are drawn anew at most five times a second, and at a bar's beginning and end."""
        from IPython.display import HTML, display

        is_due = name not in self._rows or done == total or time.monotonic() - self._drawn_at >= 0.2
        amount = "" if total is None else f' value="{done}" max="{total}"'
        bar = f'<progress aria-label="{escape(name)}"{amount}></progress>'
        self._rows[name] = f'<tr><th scope="row">{escape(name)}</th><td>{bar}</td><td>{escape(status)}</td></tr>'
        if is_due:
            page = HTML(f"<table>{''.join(self._rows.values())}</table>")
            if self._shown is None:
                self._shown = display(page, display_id=True)
            else:
                self._shown.update(page)
            self._drawn_at = time.monotonic()


@contextlib.contextmanager
def live_progress() -> Iterator[Listener]:
    """Give a listener for `run_experiment` that draws a bar per stage, in a terminal or below a notebook's cell.

    Yields:
        The listener; where standard error is neither, it prints a line when a stage begins, so that no log fills.

    Examples:
        >>> with live_progress() as listen:
        ...     result = run_experiment(config, "runs/reviews", listen=listen)
    """
    titles = {"label": "the teacher reads the training rows", "deploy": "the student is exported and measured"}
    begun: set[str] = set()
    with draw_bars() as show:

        def listen(stage: Stage, event: Any) -> None:
            title = titles.get(stage.name, f"{stage.arm}, seed {stage.seed}")
            show(title, *_state(event), "" if title in begun else f"{time.strftime('%H:%M:%S')}    {title}")
            begun.add(title)

        yield listen


def _state(event: ProgressEvent | tuple[int, int] | str) -> tuple[int | None, int | None, str]:
    if isinstance(event, str):
        return None, None, event
    if isinstance(event, tuple):
        done, total = event
        return done, total, f"{done:,} of {total:,}"
    has_teacher = event.soft_loss is not None  # without one the loss is the hard loss
    parts = [
        f"epoch {event.epoch:.1f}/{event.epochs:g}",
        f"loss {event.loss:.3f}" if event.loss is not None else "",
        f"hard {event.hard_loss:.3f}" if has_teacher and event.hard_loss is not None else "",
        f"soft {event.soft_loss:.3f}" if event.soft_loss is not None else "",
        f"score {event.score:.1f}" if event.score is not None else "",
        f"{event.examples_per_second:.0f} examples/s" if event.examples_per_second else "",
    ]
    return event.step, event.steps, "  ".join(filter(None, parts))


def print_plan(plan: ExperimentPlan, console: SafeConsole) -> None:
    for name, text in plan.lines():
        console.tell(f"{name:<11} {text}")
    for note in plan.notes:
        console.tell(f"{'note':<11} {note}", style="dim")


def print_result(result: ExperimentResult, told: Collection[str] = ()) -> None:
    """Print the table of the arms, what was noted on the way and is not told yet, and where everything lies."""
    from kdlora.report.findings import read_choice
    from kdlora.report.tables import arm_table

    console, layout = SafeConsole(), result.layout
    for note in result.notes:
        if note not in told:
            console.tell(note, style="dim")
    found = arm_table(result.records)
    table = Table(title=found.caption)
    for name in found.columns:
        table.add_column(name, justify="left" if name == "arm" else "right", overflow="fold")
    for row in found.texts():
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
        if layout.page.exists():
            console.tell(
                f"page     python -m http.server --bind 127.0.0.1 --directory {shlex.quote(layout.page.as_posix())}"
            )
    console.tell(f"report   {layout.report_html}")
