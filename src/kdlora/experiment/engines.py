"""What carries out a suite's jobs: this process, one after the other, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kdlora.evidence.records import write_record
from kdlora.experiment.jobs import Job, Outcome, carry_out, failed_record
from kdlora.experiment.ray_cluster import count_slots
from kdlora.searchconfig import Resources
from kdlora.system.children import run_in_child

JobListener = Callable[[Job, Any], None]


_QUEUED_PER_SLOT = 2
"""Jobs that wait at Ray for each that runs: enough to keep a node busy, few enough to start the best ones next."""


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
        """Take a job."""
        self._job = job

    def wait(self) -> Outcome:
        """Carry out the job that was submitted."""
        job, self._job, listen = self._job, None, self._listen
        assert job is not None  # `busy` says so beforehand
        return carry_out(job, None if listen is None else lambda event: listen(job, event))

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function in children, one after the other."""
        return [_attempt(function, each) for each in arguments]


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return run_in_child(function, *arguments)
    except Exception as error:
        return error


class RayEngine:
    """Hands jobs to Ray, which decides where they run; their folders are shared by all nodes.

    Attributes:
        ray: the module, connected.
    """

    def __init__(self, ray: Any, resources: Resources) -> None:
        """Take a connection."""
        self.ray = ray
        self._resources = resources
        self._needs = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": resources.retries}
        self._task = ray.remote(carry_out)
        self._pending: dict[Any, Job] = {}

    @property
    def room(self) -> int:
        """How many more jobs it takes now; the cluster may grow and shrink."""
        return _QUEUED_PER_SLOT * count_slots(self.ray, self._resources) - len(self._pending)

    @property
    def busy(self) -> bool:
        """Whether a job was submitted whose outcome was not fetched."""
        return bool(self._pending)

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._pending[self._task.options(**self._needs, name=job.key).remote(job)] = job

    def wait(self) -> Outcome:
        """Give the outcome of the next job that ends, on whichever node."""
        from ray.exceptions import RayError

        done, _ = self.ray.wait(list(self._pending), num_returns=1)
        job = self._pending.pop(done[0])
        try:
            outcome: Outcome = self.ray.get(done[0])
        except RayError as error:  # its node was lost too often, or a full disk there
            return _lost(job, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
        return outcome

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function on the cluster, once for each tuple of arguments, all at once."""
        task = self.ray.remote(_answer).options(**self._needs)
        return list(self.ray.get([task.remote(function, each) for each in arguments]))

    def close(self) -> None:
        """Cancel what still runs, and leave the cluster."""
        for reference in self._pending:
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call a function in a child, so that no worker keeps its memory; Ray would wrap what it raises."""
    from kdlora.system.children import run_in_child

    try:
        return run_in_child(function, *arguments)
    except Exception as error:
        return error


def _lost(job: Job, fault: str) -> Outcome:
    if job.kind == "label":
        return Outcome(job, None, fault, 0.0)
    record = failed_record(job, fault)
    write_record(job.layout.run(job.arm, job.seed).record, record)
    return Outcome(job, record, fault, 0.0)
