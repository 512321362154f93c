"""One experiment by several processes: number 0 plans, decides and writes; the others train along when it says so.

Every stage is a process of its own here as well: each of the started processes forks a child for it, and the children
meet under a name of their own, so that none hears the echo of an earlier stage.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from kdlora.config import Config
from kdlora.distil.precision import resolve_device
from kdlora.distil.processes import join_processes
from kdlora.errors import ConfigError, KdLoraError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.settle import with_recorded
from kdlora.experiment.stages import label_training_rows, train_run
from kdlora.system.children import ChildDiedError, run_in_child
from kdlora.system.launch import LAUNCH_KEYS, Launch, check_launch, read_launch

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_MEETING_SECONDS = 120
_REPORT_SECONDS = 10
"""How long a process may take to say why it failed, once another one has."""
_FAREWELL_SECONDS = 3
_LOOPBACK = ("127.0.0.1", "localhost")

_FAULTS: dict[str, type[Exception]] = {"mistake": KdLoraError, "died": ChildDiedError}
_STAGES: dict[str, Callable[..., Any]] = {stage.__name__: stage for stage in (train_run, label_training_rows)}


class Team:
    """The processes of an experiment, seen from one of them."""

    def __init__(self, launch: Launch, store: Any = None) -> None:
        self.launch, self.store, self.number = launch, store, 0

    def run(
        self,
        stage: Callable[..., Any],
        config: Config,
        layout: ExperimentLayout,
        *details: Any,
        on_message: Callable[[Any], None],
    ) -> Any:
        """Carry out a stage in a child of every process, and give what the child of this one returned."""
        self.number += 1
        said = {"stage": stage.__name__, "details": details} | _experiment(config, layout)
        self.store.set(f"stage-{self.number}", json.dumps(said))
        try:
            return self._take_part(stage.__name__, config, layout, details, on_message)
        except KdLoraError:
            raise
        except Exception as fault:
            raise self._reason(fault) from fault

    def _take_part(
        self, stage: str, config: Config, layout: ExperimentLayout, details: Any, on_message: Callable[[Any], None]
    ) -> Any:
        prefix = f"kdlora/{self.launch.attempt}/stage-{self.number}"
        arguments = (self.launch, prefix, stage, config, layout, details)
        return run_in_child(carry_out_together, *arguments, on_message=on_message)

    def follow(self, config: Config, layout: ExperimentLayout) -> dict[str, Any]:
        """Take part in every stage that process 0 announces, if it is one of what this process was started with."""
        while (said := self._next_stage()) is not None:
            outcome = {"kind": "done", "text": ""}
            try:
                config = with_recorded(config, layout.config)  # what the first process has settled
                if said["stage"] not in _STAGES or said != said | _experiment(config, layout):
                    raise ConfigError(
                        "process 0 announces a stage of another config or folder than this process was started with; "
                        "start all processes with the same command, from the same folder"
                    )
                self._take_part(said["stage"], config, layout, said["details"], lambda event: None)
            except Exception as fault:
                outcome = _told(fault)
                logger.info("process %d: %s", self.launch.rank, fault)
            self.store.set(f"outcome-{self.number}-{self.launch.rank}", json.dumps(outcome))
        end: dict[str, Any] = json.loads(self.store.get("end"))
        self.store.set(f"left-{self.launch.rank}", "")
        if end["kind"] != "done":
            told = KdLoraError if end["kind"] == "mistake" else ConnectionError
            raise told(f"process 0 stopped: {end['text']}")
        return end

    def _next_stage(self) -> dict[str, Any] | None:
        """Wait for the next stage; None at the end. Asks again and again, so that Ctrl-C is heard."""
        self.number += 1
        key = f"stage-{self.number}"
        while True:
            try:
                if self.store.check([key]):
                    said: dict[str, Any] = json.loads(self.store.get(key))
                    return said
                if self.store.check(["end"]):
                    return None
            except distributed.DistError as fault:
                raise ConnectionError(f"process 0 of this run is gone ({fault}); the same command continues") from None
            time.sleep(_POLL_SECONDS)

    def _reason(self, fault: Exception) -> Exception:
        """Find out why a stage failed here: the first process that fails takes the others with it."""
        told = [f"process 0: {type(fault).__name__}: {fault}"]
        for rank in range(1, self.launch.count):
            key = f"outcome-{self.number}-{rank}"
            try:
                self.store.wait([key], timedelta(seconds=_REPORT_SECONDS))
                outcome = json.loads(self.store.get(key))
            except distributed.DistError:
                reason = f"process {rank} of this run is gone; the same command continues where it stopped"
                return ConnectionError(reason)
            if outcome["kind"] in _FAULTS:
                return _FAULTS[outcome["kind"]](f"process {rank}: {outcome['text']}")
            if outcome["kind"] == "fault":
                told.append(f"process {rank}: {outcome['text']}")
        return fault if isinstance(fault, OSError) or len(told) == 1 else RuntimeError("; ".join(told))

    def end(self, **said: Any) -> None:
        """Tell the others how it ended; the store may go with this process, so they get time to hear it."""
        if self.launch.count > 1:
            with suppress(distributed.DistError):
                self.store.set("end", json.dumps(said))
                left = [f"left-{rank}" for rank in range(1, self.launch.count)]
                self.store.wait(left, timedelta(seconds=_FAREWELL_SECONDS))


def _experiment(config: Config, layout: ExperimentLayout) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["run"]["arms"] = [arm for arm in config.run.arms if arm != "words"]  # process 0 may leave it out
    return {"config": values, "root": str(layout.root.resolve())}


def _told(fault: BaseException) -> dict[str, str]:
    kind = next((name for name, one in _FAULTS.items() if isinstance(fault, one)), "fault")
    name, text = type(fault).__name__, str(fault)
    return {"kind": kind, "text": f"{name}: {text}" if kind == "fault" and text else text or name}


@contextmanager
def gather_team(config: Config) -> Iterator[Team]:
    """Meet the other processes of this run, where `accelerate launch`, `torchrun` or `mpirun` started several."""
    check_launch(config)
    launch = read_launch()
    if launch.count == 1:
        yield Team(launch)
        return
    if _uses_cuda(config) and launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {launch.rank} is number {launch.local_rank} on this machine, which has "
            f"{torch.cuda.device_count()} GPUs; start as many processes as there are GPUs, or set run.device: cpu"
        )
    # What runs in process 0 alone must not take itself for one of several; a stage's child sets them again.
    kept = {key: os.environ.pop(key) for key in LAUNCH_KEYS if key in os.environ}
    team = Team(launch, _meet(launch))
    try:
        yield team
    except BaseException as fault:
        if launch.rank == 0:
            team.end(**_told(fault))
        raise
    finally:
        os.environ.update(kept)


def _meet(launch: Launch) -> Any:
    """Open the store through which the processes talk, on the loopback interface where all are on this machine."""
    is_master = launch.rank == 0 and not launch.hosted
    try:
        door = None
        if is_master and launch.address in _LOOPBACK:
            door = socket.create_server((_LOOPBACK[0], launch.port)).detach()
        store = TCPStore(
            launch.address,
            launch.port,
            is_master=is_master,
            timeout=timedelta(seconds=_MEETING_SECONDS),
            wait_for_workers=False,
            master_listen_fd=door,
        )
    except (distributed.DistError, RuntimeError, OSError) as fault:
        raise ConnectionError(
            f"process {launch.rank} of {launch.count} finds nobody at {launch.address}:{launch.port}: {fault}"
        ) from None
    return PrefixStore(f"kdlora/{launch.attempt}/plan", store)


def _uses_cuda(config: Config) -> bool:
    return resolve_device(config.run.device).type == "cuda"


def carry_out_together(
    launch: Launch,
    prefix: str,
    stage: str,
    config: Config,
    layout: ExperimentLayout,
    details: tuple[Any, ...],
    progress: Callable[..., None] | None = None,
) -> Any:
    """Meet the children of the other processes and carry out a stage with them; runs in a child."""
    join_processes(launch, prefix, cuda=_uses_cuda(config))
    try:
        return _STAGES[stage](config, layout, *details, progress)
    finally:
        distributed.destroy_process_group()
