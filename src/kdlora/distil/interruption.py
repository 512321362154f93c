"""Ctrl-C and SIGTERM in the middle of a training: the step ends, a checkpoint is written, then the training stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class TrainingStoppedError(KeyboardInterrupt):
    """A training was asked to stop, and has saved; the same call continues it."""


class StopSignals:
    """Notes Ctrl-C and SIGTERM while a training runs, where nobody else has asked for them.

    The second one interrupts at once, as the first would have done.
    """

    def __init__(self) -> None:
        """Take nothing yet."""
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Begin to take the signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._former[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back; one that came too late to be heeded by the training still counts."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if kind is None:
            self.heed("after its last step")

    def heed(self, where: str) -> None:
        """Stop the training if that was asked for.

        Args:
            where: what was saved, for the message.

        Raises:
            TrainingStoppedError: it was.
        """
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise TrainingStoppedError(f"the training stopped {where} ({name}); the same call continues it")

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
