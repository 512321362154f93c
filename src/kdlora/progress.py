"""A progress bar for work that is counted; it loads nothing heavy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def counting_progress(unit: str, *, shown: bool = True) -> Iterator[Callable[[int, float | None], None] | None]:
    """Give a callable that draws a bar on standard error; None where nothing shall be drawn.

    Args:
        unit: what is counted, such as `rows`.
        shown: whether to draw at all; where standard error is no terminal nothing is drawn either.

    Yields:
        A callable that takes the number done and, where it is known, the share (0 to 1) that this is of all.
    """
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.completed:,} " + unit), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(unit, total=None)

        def advance(done: int, share: float | None) -> None:
            progress.update(bar, completed=done, total=done / share if share else None)

        yield advance
