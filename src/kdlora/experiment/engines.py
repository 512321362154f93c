"""What carries work out: this process, one piece after the other or one on each GPU, or a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from kdlora.config import Config
from kdlora.configfile import PATH_KEYS
from kdlora.distil.precision import visible_gpus
from kdlora.errors import ConfigError, KdLoraError
from kdlora.extras import check_installed
from kdlora.searchconfig import Resources
from kdlora.system.children import Children
from kdlora.system.environment import collect_versions

logger = logging.getLogger(__name__)

Hear = Callable[[Any, Any], None]
"""Called with a piece of work and each of its events."""
Work = Callable[[Any, Callable[[Any], None] | None], Any]
"""Carries out a piece, and passes its events on."""

KNOCK_SECONDS = 5.0
_POLL_SECONDS = 0.05
_MOST_FAILURES = 2
"""Pieces that may fail on a GPU, one after the other, before the others do all that is left."""
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


class OnGpus(Here):
    """As many pieces at a time as there are GPUs, each in children that see one of them and no other."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self._children = [Children(CUDA_VISIBLE_DEVICES=gpu) for gpu in gpus]
        self._failures = dict.fromkeys(self._children, 0)  # in a row, beyond those that all GPUs have in common
        self._failed = dict[Children, Any]()  # the arm that failed last on each

    def results(self, work: Work, next_piece: Callable[[], Any], hear: Hear | None = None) -> Iterator[tuple[Any, Any]]:
        """Do the same at the same time; what a piece raises, and Ctrl-C, interrupts the others, which save."""
        events: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        free, running = [*self._children], dict[Future[Any], tuple[Any, Children]]()
        with ThreadPoolExecutor(len(free)) as threads:
            try:
                while True:
                    while (
                        free
                        and self._failures[children := min(free, key=self._failures.__getitem__)] < _MOST_FAILURES
                        and (piece := next_piece()) is not None
                    ):
                        listen = None if hear is None else lambda event, piece=piece: events.put((piece, event))
                        free.remove(children)
                        running[threads.submit(children.carry_out, work, piece, listen)] = piece, children
                    if not running:
                        return
                    done, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
                    while hear is not None and not events.empty():
                        hear(*events.get())
                    for future in done:
                        piece, children = running.pop(future)
                        free.append(children)
                        result = future.result()
                        self._count(children, getattr(piece, "arm", None), failed=bool(getattr(result, "error", None)))
                        yield piece, result
            finally:
                for _, children in running.values():
                    children.interrupted.set()
                try:
                    while wait(running, _POLL_SECONDS).not_done:
                        pass
                finally:  # a second Ctrl-C cuts short what they save
                    if running:
                        self.close()

    def _count(self, children: Children, arm: Any, *, failed: bool) -> None:
        """Count failures: a full or broken GPU fails each piece at once, is free again, and takes the whole queue."""
        self._failures[children] = self._failures[children] + 1 if failed else 0
        if failed:
            self._failed[children] = arm
        for one in [] if failed else [one for one, last in self._failed.items() if last != arm]:
            self._failures[one] = min(self._failures[one], _MOST_FAILURES - 1)  # that arm may be at fault: one more try
        common = min(self._failures.values())  # as of an arm that fails wherever it runs
        self._failures = {one: count - common for one, count in self._failures.items()}
        if failed and self._failures[children] == _MOST_FAILURES:
            gpu = children.environment["CUDA_VISIBLE_DEVICES"]
            told = "GPU %s gets no more runs while others succeed: the last %d on it failed. Is it full, or broken?"
            logger.warning(told, gpu, _MOST_FAILURES)

    def close(self) -> None:
        for children in self._children:
            children.close()


class OnRay:
    """Hands pieces to Ray, which decides where they run; the folders are shared by all nodes."""

    def __init__(self, ray: Any, needs: Resources) -> None:
        self._ray, self._needs = ray, needs
        # A worker with a GPU would end after each piece, and with it the model that it may hold for the next one.
        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_retries": needs.retries, "max_calls": 0}
        self._work = ray.remote(**options)(_carry_out)
        self._pending: dict[Any, Any] = {}

    def results(self, work: Work, next_piece: Callable[[], Any], hear: Hear | None = None) -> Iterator[tuple[Any, Any]]:
        """Do the same on whichever nodes; an exception stands in a result's place, and no events are heard."""
        while True:
            while len(self._pending) < _QUEUED_PER_SLOT * self._slots() and (piece := next_piece()) is not None:
                self._pending[self._work.remote(work, piece)] = piece
            if not self._pending:
                return
            done, _ = self._ray.wait(list(self._pending), num_returns=1)
            yield self._pending.pop(done[0]), self._get(done[0])

    def _slots(self) -> int:
        """Count the runs that the cluster, which may grow and shrink, can hold at once; at least one."""
        have = self._ray.cluster_resources()
        slots = have.get("CPU", 0) / self._needs.cpus
        return max(1, int(min(slots, have.get("GPU", 0) / self._needs.gpus) if self._needs.gpus else slots))

    def _get(self, reference: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:  # Ray wraps what a worker raises in pages of its own
            return error.cause
        except RayError as error:
            return LostError(
                f"a worker was lost again and again, the last time by: {str(error).strip().splitlines()[-1]}"
            )

    def cancel(self) -> None:
        for reference in self._pending:
            self._ray.cancel(reference, force=True)


Engine = Here | OnRay


def _carry_out(work: Work, piece: Any) -> Any:
    return work(piece, None)


def gpus_for(config: Config, processes: int = 1) -> list[str]:
    """Name the GPUs of which each gets a run of its own; none where there are no two of them to share runs out to."""
    run = config.run
    gpus = [] if run.device == "cpu" or run.devices == "one" or processes > 1 else visible_gpus()
    return gpus if len(gpus) > 1 else []


def shared_machine(gpus: Sequence[str]) -> list[str]:
    """Say what a record must say of its times, where others ran beside it."""
    return [f"up to {len(gpus)} runs at a time, a GPU each (run.devices); they share the processor"] if gpus else []


@contextlib.contextmanager
def open_engine(on: str | None, needs: Resources, paths: Iterable[str], gpus: Sequence[str] = ()) -> Iterator[Engine]:
    """Give what carries work out: this machine, or a cluster each of whose nodes was seen to have some paths."""
    if on is None:
        with contextlib.closing(OnGpus(gpus)) if gpus else contextlib.nullcontext(Here()) as here:
            yield here
        return
    ray = connect(on)
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        if needs.gpus is None:  # Ray hides them from a task that asks for none
            needs = needs.model_copy(update={"gpus": 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0})
        check_nodes(ray, list(dict.fromkeys(paths)), needs)
        engine = OnRay(ray, needs)
        stack.callback(engine.cancel)
        yield engine


def local_paths(config: Config) -> list[str]:
    named = (getattr(getattr(config, section), key) for section, key in PATH_KEYS)
    return [name for name in named if name is not None and Path(name).is_absolute()]


def connect(on: str) -> Any:
    if on != "ray" and not on.startswith("ray://"):
        raise ConfigError(f"--on takes ray, or ray://HOST:PORT such as ray://head:10001; got {on!r}")
    check_installed("--on", "ray")
    import ray

    address = on if on != "ray" else os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto"):
        _refuse_somebody_elses()
    # Of a cluster that is started here, nothing is reported to anybody unless the user says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its dashboard takes code from whoever reaches its port, which is every user of this machine.
    options = {"ignore_reinit_error": True, "include_dashboard": False} if on == "ray" else {"address": on}
    try:
        if address not in ("", "auto", "local"):  # Ray itself would try for most of a minute
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as fault:
        if not address and isinstance(fault, OSError) and not isinstance(fault, ConnectionError):
            raise  # none was asked: that of this machine cannot be started, as on a full disk
        raise ConfigError(
            f"no Ray cluster answers at {address or on} ({fault}); check the address, which is one such as "
            "ray://head:10001, or start a cluster with `ray start --head`"
        ) from None
    return ray


def _refuse_somebody_elses() -> None:
    """Join no cluster that another user of this machine has noted down where Ray looks for one."""
    place = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    for path in (place, place / "ray_current_cluster"):
        if hasattr(os, "getuid") and path.exists() and path.stat().st_uid not in (0, os.getuid()):
            raise ConfigError(
                f"{path} belongs to another user, and names a Ray cluster that would run your code and hand results "
                "to you; name the cluster that you mean with --on ray://HOST:PORT, or set RAY_ADDRESS=local for one "
                "of your own"
            )


def _look_around(paths: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """Give this machine's name, which paths it lacks, and the versions of what is installed."""
    return socket.gethostname(), [path for path in paths if not Path(path).exists()], collect_versions()


def check_nodes(ray: Any, paths: Sequence[str], needs: Resources) -> None:
    """Look at every node: its paths, its kdlora, and whether any node can hold a run at all."""
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    sizes = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in nodes]
    if not any(cpus >= needs.cpus and gpus >= (needs.gpus or 0) for cpus, gpus in sizes):  # Ray would wait without end
        told = "; ".join(f"{cpus:g} cores and {gpus:g} GPUs" for cpus, gpus in sizes)
        raise ConfigError(
            f"a run needs {needs.cpus:g} cores and {needs.gpus or 0:g} GPUs (resources), but the cluster's nodes have "
            f"{told or 'nothing'}"
        )
    look = ray.remote(num_cpus=0, max_retries=0)(_look_around)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [look.options(scheduling_strategy=place).remote(list(paths)) for place in places]
    faults, own = [], collect_versions()
    for node, answer in zip(nodes, answers, strict=True):
        address = node["NodeManagerAddress"]
        try:
            host, missing, versions = ray.get(answer)
        except RayError as error:
            if any(now["Alive"] for now in ray.nodes() if now["NodeID"] == node["NodeID"]):  # else it left meanwhile
                reason = str(error).strip().splitlines()[-1]
                faults.append(f"node {address} cannot run kdlora ({reason}); install the same version there")
            continue
        faults += [f"node {address} ({host}) lacks {path}" for path in missing]
        if differing := ", ".join(name for name, version in versions.items() if own.get(name) != version):
            logger.warning(
                "node %s has other versions of %s; its figures may differ in their last digits", address, differing
            )
    if faults:
        remedy = "every node needs the same folders at the same paths: mount them there, or name a Hub data set"
        raise ConfigError("\n".join([f"{remedy}:", *(f"  - {fault}" for fault in faults)]))
