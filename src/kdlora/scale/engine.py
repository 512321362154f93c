"""What carries out a suite's jobs: this process, one job after the other; `ray_engine` has the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kdlora.evidence.measure import run_in_child
from kdlora.scale.jobs import Job, Outcome, carry_out

JobListener = Callable[[Job, Any], None]


class Engine(Protocol):
    """Carries out jobs that do not depend on one another; what depends is submitted later."""

    @property
    def room(self) -> int:
        """How many more jobs it takes now."""

    @property
    def busy(self) -> bool:
        """Whether a job was submitted whose outcome was not fetched."""

    def submit(self, job: Job) -> None:
        """Take a job."""

    def wait(self) -> Outcome:
        """Give the outcome of the next job that ends."""

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function once for each tuple of arguments; an exception stands in its value's place."""


class SerialEngine:
    """One job after the other, each in a child forked from the warm server."""

    def __init__(self, listen: JobListener | None = None) -> None:
        self._listen = listen
        self._job: Job | None = None

    @property
    def room(self) -> int:
        """How many more jobs it takes now."""
        return 0 if self.busy else 1

    @property
    def busy(self) -> bool:
        """Whether a job was submitted whose outcome was not fetched."""
        return self._job is not None

    def submit(self, job: Job) -> None:
        """Take a job.

        Args:
            job: carried out by the next `wait`.
        """
        self._job = job

    def wait(self) -> Outcome:
        """Carry out the job that was submitted."""
        job, self._job, listen = self._job, None, self._listen
        assert job is not None  # `busy` says so beforehand
        return carry_out(job, None if listen is None else lambda event: listen(job, event))

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function in children, one after the other.

        Args:
            function: of an importable module.
            arguments: of each call.

        Returns:
            Values in order; an exception stands in its value's place.
        """
        return [_attempt(function, each) for each in arguments]


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return run_in_child(function, *arguments).value
    except Exception as error:
        return error
