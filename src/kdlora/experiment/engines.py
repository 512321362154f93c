"""What carries work out: this process, one piece after the other, or a Ray cluster; and the loop that feeds either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from kdlora.errors import KdLoraError
from kdlora.experiment.ray_cluster import check_nodes, connect, count_slots, settle_needs
from kdlora.searchconfig import Resources
from kdlora.system.children import run_in_child

Hear = Callable[[Any, Any], None]
"""Called with a piece of work and each of its events."""
Work = Callable[[Any, Callable[[Any], None] | None], Any]
"""Carries out a piece, and passes its events on."""

_QUEUED_PER_SLOT = 2
"""Pieces that wait at Ray for each that runs: enough to keep a node busy, few enough to start the best ones next."""


class LostError(KdLoraError):
    """A piece of work was lost with its node or its worker, more often than it is started again."""


class Engine(Protocol):
    """Carries out pieces of work that do not depend on one another; what depends is submitted later."""

    @property
    def room(self) -> int:
        """How many more pieces it takes now."""

    @property
    def busy(self) -> bool:
        """Whether a piece was submitted whose result was not fetched."""

    def submit(self, work: Work, piece: Any, hear: Hear | None) -> None:
        """Take a piece of work; on a cluster nothing is heard of it until it ends."""

    def wait(self) -> tuple[Any, Any]:
        """Give the next piece that ends, and its result; on a cluster an exception may stand there."""

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function in children, once for each tuple of arguments; an exception stands in its value's place."""


class Here:
    """One piece after the other, in this process and its children."""

    def __init__(self) -> None:
        self._given: tuple[Work, Any, Hear | None] | None = None

    @property
    def room(self) -> int:
        """How many more pieces it takes now."""
        return 0 if self.busy else 1

    @property
    def busy(self) -> bool:
        """Whether a piece was submitted whose result was not fetched."""
        return self._given is not None

    def submit(self, work: Work, piece: Any, hear: Hear | None) -> None:
        """Take a piece of work."""
        self._given = work, piece, hear

    def wait(self) -> tuple[Any, Any]:
        """Carry out the piece that was submitted."""
        assert self._given is not None  # `busy` says so beforehand
        (work, piece, hear), self._given = self._given, None
        return piece, work(piece, None if hear is None else lambda event: hear(piece, event))

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function in children, one after the other."""
        return [_answer(function, each) for each in arguments]


class OnRay:
    """Hands pieces to Ray, which decides where they run; the folders are shared by all nodes."""

    def __init__(self, ray: Any, resources: Resources) -> None:
        self._ray, self._resources = ray, resources
        # A worker with a GPU would end after each piece, and with it the model that it may hold for the next one.
        needs = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": resources.retries}
        self._work, self._answer = (ray.remote(max_calls=0, **needs)(function) for function in (_carry_out, _answer))
        self._pending: dict[Any, Any] = {}

    @property
    def room(self) -> int:
        """How many more pieces it takes now; the cluster may grow and shrink."""
        return _QUEUED_PER_SLOT * count_slots(self._ray, self._resources) - len(self._pending)

    @property
    def busy(self) -> bool:
        """Whether a piece was submitted whose result was not fetched."""
        return bool(self._pending)

    def submit(self, work: Work, piece: Any, hear: Hear | None) -> None:
        """Take a piece of work, of which nothing is heard until it ends."""
        self._pending[self._work.remote(work, piece)] = piece

    def wait(self) -> tuple[Any, Any]:
        """Give the next piece that ends, on whichever node, and its result."""
        from ray.exceptions import RayError, RayTaskError

        done, _ = self._ray.wait(list(self._pending), num_returns=1)
        piece = self._pending.pop(done[0])
        try:
            return piece, self._ray.get(done[0])
        except RayTaskError as error:  # Ray wraps what a worker raises in pages of its own
            return piece, error.cause
        except RayError as error:
            return piece, LostError(str(error).strip().splitlines()[-1])

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function on the cluster, once for each tuple of arguments, all at once."""
        return list(self._ray.get([self._answer.remote(function, each) for each in arguments]))

    def cancel(self) -> None:
        """End what still runs."""
        for reference in self._pending:
            self._ray.cancel(reference, force=True)


def _carry_out(work: Work, piece: Any) -> Any:
    return work(piece, None)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call a function in a child, so that no worker keeps its memory; what it raises is its answer."""
    try:
        return run_in_child(function, *arguments)
    except Exception as error:
        return error


@contextlib.contextmanager
def open_engine(on: str | None, needs: Resources, paths: Iterable[str]) -> Iterator[Engine]:
    """Give what carries work out: this process, or a cluster each of whose nodes was seen to have some paths."""
    if on is None:
        yield Here()
        return
    ray = connect(on)
    try:
        needs = settle_needs(ray, needs)
        check_nodes(ray, list(dict.fromkeys(paths)), needs)
        engine = OnRay(ray, needs)
        try:
            yield engine
        finally:
            engine.cancel()
    finally:
        ray.shutdown()


def carry_out_all(
    engine: Engine,
    work: Work,
    next_piece: Callable[[], Any | None],
    take: Callable[[Any, Any], None],
    hear: Hear | None = None,
) -> None:
    """Feed an engine until no piece is left; what one of them leaves may make others ready."""
    while True:
        while engine.room > 0 and (piece := next_piece()) is not None:
            engine.submit(work, piece, hear)
        if not engine.busy:
            return
        take(*engine.wait())
