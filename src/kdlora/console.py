"""A console for what strangers wrote; it loads nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from kdlora.errors import harmless


class SafeConsole(Console):
    """A console on which names from data and folders cannot move the cursor or hide text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Give the parts that are printed."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(harmless(part.text), part.style)
