"""The processes of one training: what they tell each other beside the gradients, and what stops them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from kdlora.system.launch import Launch

TIMEOUT_SECONDS = 600
"""Longest wait for another process. One that ends is noticed at once; this is for one that hangs."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model; `group` carries values in main memory, as a GPU's does not."""

    rank: int = 0
    count: int = 1
    group: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        if self.count == 1:
            return values
        shared = values.detach().cpu().clone()
        distributed.all_reduce(shared, group=self.group)
        return shared.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def first_says(self, value: Any) -> Any:
        if self.count == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, src=0, group=self.group)
        return shared[0]


ALONE = Processes()
_groups: list[Any] = []


def current_processes() -> Processes:
    """Name the processes that torch.distributed has joined with this one; all of them make the first call."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ALONE
    if not _groups:
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        whole = distributed.get_backend() == "gloo"
        _groups.append(distributed.group.WORLD if whole else distributed.new_group(backend="gloo", timeout=timeout))
    return Processes(distributed.get_rank(), distributed.get_world_size(), _groups[0])


def join_processes(launch: Launch, prefix: str, *, cuda: bool) -> Processes:
    """Meet the others, under a prefix of keys that no earlier meeting had, and wait for them."""
    # Trainer and Accelerate learn from these that they are not alone.
    os.environ |= {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.count), "LOCAL_RANK": str(launch.local_rank)}
    os.environ |= {"MASTER_ADDR": launch.address, "MASTER_PORT": str(launch.port)}
    warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)  # between Trainer and Accelerate
    if cuda:
        torch.cuda.set_device(launch.local_rank)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    store = TCPStore(launch.address, launch.port, is_master=False, timeout=timeout)
    distributed.init_process_group(
        "cuda:nccl,cpu:gloo" if cuda else "gloo",
        store=PrefixStore(prefix, store),
        rank=launch.rank,
        world_size=launch.count,
        timeout=timeout,
    )
    return current_processes()


class StopSignals:
    """Notes Ctrl-C and SIGTERM while a training runs, where nobody else has asked for them; a second one interrupts."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals, as only the main thread may; one too late for the training to heed still counts."""
        former: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    former[number] = signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        self.heed("after its last step")

    def heed(self, where: str) -> None:
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise KeyboardInterrupt(f"the training stopped {where} ({name}); the same call continues it")

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
