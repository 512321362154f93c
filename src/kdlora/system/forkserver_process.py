"""The server's end of `forkserver`: it imports, forks a child for each request, and waits for its end.

Everything that is pickled here passes between a process and its own children.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import pickle
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from kdlora.errors import log_to_stderr
from kdlora.system.ownership import remove

BEGUN = b"begun"
"""What a child sends first: from then on there is something to save."""
_POLL_SECONDS = 0.05
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, prctl(2)

_preparations: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Place:
    """Where a child runs: what it takes over from the caller, and whether it may send."""

    path: tuple[str, ...]
    folder: str
    environment: dict[str, str]
    preload: str
    sends: bool
    log_level: int | None


@dataclass(frozen=True)
class Message:
    """A value on its way to the listener."""

    value: Any


@dataclass(frozen=True)
class Answer:
    """The end of a request: a value, or what was raised."""

    value: Any = None
    fault: BaseException | None = None


def before_fork(prepare: Callable[[], None]) -> Callable[[], None]:
    """Have a server call a function once, when it has imported the function's module; a decorator."""
    _preparations.append(prepare)
    return prepare


def serve(control_number: int, scratch: str, preload: str) -> NoReturn:
    """Take requests until the parent is gone; this is the server's main function."""
    tempfile.tempdir = scratch
    if preload:
        _preload(preload)
    with socket.socket(fileno=control_number) as control:
        while True:
            channel = _next_request(control)
            if channel is None:
                break
            with contextlib.suppress(EOFError, ConnectionError):
                place = _take_over(channel, scratch)
                if select.select([control], [], [], 0)[0]:
                    break  # the parent went away during the imports
                child = os.fork()
                if child == 0:
                    control.close()
                    _die_with_parent()
                    _carry_out(channel, place)
                channel.close()
                status = _wait(child, control)
                if status is None:
                    break
                control.sendall(str(status).encode())
    remove(Path(scratch))
    os._exit(0)  # the parent waits, and to tear down what was imported takes over a second


def _next_request(control: socket.socket) -> Connection | None:
    """Wait for the channel of a request; None where the parent is gone."""
    with contextlib.suppress(ConnectionError):  # it went without having read how the last child ended
        received, numbers, _, _ = socket.recv_fds(control, 1, 1)
        if received and numbers:
            return Connection(numbers[0])
    return None


def _die_with_parent() -> None:
    """End with the server, however that ends: a child that trains on would fight the next command for its folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _take_over(channel: Connection, scratch: str) -> Place:
    """Take the caller's place, and import the function's module so that later children have it already."""
    place: Place = pickle.loads(channel.recv_bytes())  # noqa: S301 - from our own parent
    sys.path[:] = place.path
    with contextlib.suppress(OSError):
        os.chdir(place.folder)
    os.environ.clear()
    os.environ.update(place.environment, TMPDIR=scratch)
    _preload(place.preload)
    return place


def _preload(module: str) -> None:
    """Import a module so that children have it already, and keep the garbage collector away from what it made.

    What comes with torch and transformers stays: to look for garbage among it costs the import, and every training
    once more at its start.
    """
    gc.disable()
    # A fault of the import is reported by the child, which runs into it again.
    with contextlib.suppress(Exception):
        importlib.import_module(module)
        while _preparations:
            _preparations.pop()()
    gc.freeze()
    gc.enable()


def _wait(child: int, control: socket.socket) -> int | None:
    """Wait for a child; ask it to end when the parent says so, and end it when the parent goes away (None)."""
    with _end_of(child) as ended:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            readable, _, _ = select.select([control.fileno(), *ended], [], [], _POLL_SECONDS)
            if control.fileno() in readable:
                wanted = control.recv(1)
                os.kill(child, signal.SIGTERM if wanted else signal.SIGKILL)
                if not wanted:
                    os.waitpid(child, 0)
                    return None


@contextlib.contextmanager
def _end_of(child: int) -> Iterator[list[int]]:
    """Give what becomes readable when a child ends; nothing where the system has no such descriptor."""
    opened: list[int] = []
    with contextlib.suppress(AttributeError, OSError):  # not Linux; an old kernel, or a container that forbids it
        opened.append(os.pidfd_open(child))
    try:
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _carry_out(channel: Connection, place: Place) -> None:
    """Run the request in the child, send the outcome, and end without the server's exit handlers."""
    status = 1
    channel.send(BEGUN)
    if place.log_level is not None:
        log_to_stderr(place.log_level)
    try:
        try:
            function, arguments = pickle.loads(channel.recv_bytes())  # noqa: S301 - from our own parent
            if place.sends:
                arguments = (*arguments, lambda *values: channel.send(Message(_one(values))))
            outcome = pickle.dumps(Answer(value=function(*arguments)))
        except BaseException as fault:
            outcome = pickle.dumps(Answer(fault=_portable(fault)))
        channel.send_bytes(outcome)
        status = 0
    finally:
        with contextlib.suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _one(values: tuple[Any, ...]) -> Any:
    """A single value is sent as it is, several as a tuple."""
    return values[0] if len(values) == 1 else values


def _portable(fault: BaseException) -> BaseException:
    """Make an exception that survives the way to the parent, the child's traceback in a note."""
    trace = "".join(traceback.format_exception(fault))
    text = f"{type(fault).__name__}: {fault}"
    try:
        copy = pickle.loads(pickle.dumps(fault))  # noqa: S301 - what was pickled in this line
        portable = copy if isinstance(fault, Exception) else RuntimeError(text)
    except Exception:
        portable = RuntimeError(text)
    portable.add_note(f"In the child process:\n{trace}")
    return portable
