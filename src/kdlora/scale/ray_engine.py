"""Carries out a suite's jobs on a Ray cluster: a task for each, started again where its node is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdlora.evidence.records import write_record
from kdlora.scale.artefacts import carry_out_away
from kdlora.scale.jobs import Job, Outcome, carry_out, failed_record
from kdlora.scale.ray_cluster import count_slots
from kdlora.searchconfig import Resources

_QUEUED_PER_SLOT = 2
"""Jobs that wait at Ray for each that runs: enough to keep a node busy, few enough to start the best ones next."""


class RayEngine:
    """Hands jobs to Ray, which decides where they run; their folders are shared by all nodes.

    Attributes:
        ray: the module, connected.
    """

    def __init__(self, ray: Any, resources: Resources, *, root: Path | None = None, url: str | None = None) -> None:
        """Take a connection.

        Args:
            ray: the module, connected.
            resources: what a job needs, and how often it is started again.
            root: the suite's folder; with a URL it is this machine's alone.
            url: where nodes without a shared folder send weights and records.
        """
        self.ray = ray
        self._resources = resources
        self._needs = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": resources.retries}
        self._task = ray.remote(carry_out if url is None else carry_out_away)
        self._place = () if url is None else (root, url)
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
        """Take a job.

        Args:
            job: its folders must be there on every node.
        """
        self._pending[self._task.options(**self._needs, name=job.key).remote(job, *self._place)] = job

    def wait(self) -> Outcome:
        """Give the outcome of the next job that ends, on whichever node."""
        from ray.exceptions import RayError

        done, _ = self.ray.wait(list(self._pending), num_returns=1)
        job = self._pending.pop(done[0])
        try:
            outcome: Outcome = self.ray.get(done[0])
        except RayError as error:  # its node was lost too often, or a full disk there
            return _lost(job, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
        if self._place and outcome.record is not None:  # the node's own copy is not here
            write_record(job.layout.run(job.arm, job.seed).record, outcome.record)
        return outcome

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function on the cluster, once for each tuple of arguments, all at once.

        Args:
            function: of an importable module.
            arguments: of each call.

        Returns:
            Values in order; an exception stands in its value's place.
        """
        task = self.ray.remote(_answer).options(**self._needs)
        return list(self.ray.get([task.remote(function, each) for each in arguments]))

    def close(self) -> None:
        """Cancel what still runs, and leave the cluster."""
        for reference in self._pending:
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call a function in a child, so that no worker keeps its memory; Ray would wrap what it raises."""
    from kdlora.evidence.measure import run_in_child

    try:
        return run_in_child(function, *arguments).value
    except Exception as error:
        return error


def _lost(job: Job, fault: str) -> Outcome:
    if job.kind == "label":
        return Outcome(job, None, fault, 0.0)
    record = failed_record(job, fault)
    write_record(job.layout.run(job.arm, job.seed).record, record)
    return Outcome(job, record, fault, 0.0)
