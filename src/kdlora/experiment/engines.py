"""What carries work out: this process, one piece after the other, or a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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


class Here:
    """One piece after the other, in this process and its children."""

    def results(self, work: Work, next_piece: Callable[[], Any], hear: Hear | None = None) -> Iterator[tuple[Any, Any]]:
        """Carry out pieces until there is none, and give each with its result, which may make others ready."""
        while (piece := next_piece()) is not None:
            yield piece, work(piece, None if hear is None else functools.partial(hear, piece))

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function in children, once for each tuple of arguments; an exception stands in its value's place."""
        return [_answer(function, each) for each in arguments]


class OnRay:
    """Hands pieces to Ray, which decides where they run; the folders are shared by all nodes."""

    def __init__(self, ray: Any, resources: Resources) -> None:
        self._ray, self._resources = ray, resources
        # A worker with a GPU would end after each piece, and with it the model that it may hold for the next one.
        needs = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": resources.retries}
        self._work, self._answer = (ray.remote(max_calls=0, **needs)(function) for function in (_carry_out, _answer))
        self._pending: dict[Any, Any] = {}

    def results(self, work: Work, next_piece: Callable[[], Any], hear: Hear | None = None) -> Iterator[tuple[Any, Any]]:
        """Do the same on whichever nodes; an exception stands in a result's place, and no events are heard."""
        while True:
            room = _QUEUED_PER_SLOT * count_slots(self._ray, self._resources)  # the cluster may grow and shrink
            while len(self._pending) < room and (piece := next_piece()) is not None:
                self._pending[self._work.remote(work, piece)] = piece
            if not self._pending:
                return
            done, _ = self._ray.wait(list(self._pending), num_returns=1)
            yield self._pending.pop(done[0]), self._get(done[0])

    def _get(self, reference: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:  # Ray wraps what a worker raises in pages of its own
            return error.cause
        except RayError as error:
            return LostError(str(error).strip().splitlines()[-1])

    def call_all(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function on the cluster, once for each tuple of arguments, all at once."""
        return list(self._ray.get([self._answer.remote(function, each) for each in arguments]))

    def cancel(self) -> None:
        """End what still runs."""
        for reference in self._pending:
            self._ray.cancel(reference, force=True)


Engine = Here | OnRay


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
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        needs = settle_needs(ray, needs)
        check_nodes(ray, list(dict.fromkeys(paths)), needs)
        engine = OnRay(ray, needs)
        stack.callback(engine.cancel)
        yield engine
