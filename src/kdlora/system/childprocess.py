"""What a process of its own does: it imports, takes its caller's place, runs one function and answers.

On Linux a server imports once and forks a child for each request. Elsewhere a fork is not there (Windows), or not safe
once libraries with threads are loaded (macOS): there each request has a process that is started for it.
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
import queue
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Protocol

from kdlora.errors import log_to_stderr
from kdlora.system.ownership import remove

BEGUN = b"begun"
"""What a child sends first: from then on there is something to save."""
_POLL_SECONDS = 0.05
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, prctl(2)


class Place(NamedTuple):
    """Where a child runs: what it takes over from the caller, and whether it may send."""

    path: list[str]
    folder: str
    environment: dict[str, str]
    preload: str
    sends: bool
    log_level: int | None


class Answer(NamedTuple):
    """The end of a request: a value, or what was raised."""

    value: Any = None
    fault: BaseException | None = None


class Channel(Protocol):
    """How a child hears its request, and answers: a socket's `Connection`, or `Pipes`."""

    def send(self, value: Any) -> None:
        """Send a value, pickled."""

    def send_bytes(self, content: bytes) -> None:
        """Send what is pickled already."""

    def recv_bytes(self) -> bytes:
        """Wait for the next part of the request."""


_preparations: list[Callable[[], None]] = []


def before_fork(prepare: Callable[[], None]) -> Callable[[], None]:
    """Have a server call a function once, when it has imported the function's module; a decorator."""
    _preparations.append(prepare)
    return prepare


def serve(scratch: str, preload: str, control_number: str) -> NoReturn:
    """Take requests until the parent is gone, and fork a child for each; the main function of the server."""
    tempfile.tempdir = scratch
    if preload:
        _preload(preload)
    with socket.socket(fileno=int(control_number)) as control:
        while (channel := _next_request(control)) is not None:
            with contextlib.suppress(EOFError, ConnectionError):
                place = _take_over(channel, scratch)
                if select.select([control], [], [], 0)[0]:
                    break  # the parent went away during the imports
                ended, lives = os.pipe()  # what the child holds closes when it ends
                child = os.fork()
                if child == 0:
                    control.close()
                    # A child that trains on would fight the next command for its folder.
                    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
                    _carry_out(channel, place)
                channel.close()
                os.close(lives)
                status = _wait(child, control, ended)
                if status is None:
                    break
                os.close(ended)
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


def _take_over(channel: Channel, scratch: str) -> Place:
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


def _wait(child: int, control: socket.socket, ended: int) -> int | None:
    """Wait for a child; ask it to end when the parent says so, and end it when the parent goes away (None)."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if control.fileno() in select.select([control.fileno(), ended], [], [], _POLL_SECONDS)[0]:
            wanted = control.recv(1)
            os.kill(child, signal.SIGTERM if wanted else signal.SIGKILL)
            if not wanted:
                os.waitpid(child, 0)
                return None


def _carry_out(channel: Channel, place: Place) -> NoReturn:
    """Run the request in the child, send the outcome, and end without the server's exit handlers."""
    status = 1
    channel.send(BEGUN)
    if place.log_level is not None:
        log_to_stderr(place.log_level)
    try:
        try:
            function, arguments = pickle.loads(channel.recv_bytes())  # noqa: S301 - from our own parent
            sender = (lambda *values: channel.send(values),) if place.sends else ()
            outcome = pickle.dumps(Answer(value=function(*arguments, *sender)))
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


def _portable(fault: BaseException) -> BaseException:
    """Make an exception that survives the way to the parent, the child's traceback in a note."""
    trace = "".join(traceback.format_exception(fault))
    portable: BaseException = RuntimeError(f"{type(fault).__name__}: {fault}")
    with contextlib.suppress(Exception):
        if isinstance(fault, Exception):
            portable = pickle.loads(pickle.dumps(fault))  # noqa: S301 - what was pickled in this line
    portable.add_note(f"In the child process:\n{trace}")
    return portable


class Pipes:
    """The channel of a child that was started for one request: its standard input and output."""

    def __init__(self, scratch: str) -> None:
        """Take both for the request: what a library prints goes to the error output."""
        self._scratch, self._answers = scratch, os.dup(1)
        os.dup2(2, 1)
        requests = os.fdopen(os.dup(0), "rb")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        self._heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.recv_bytes = self._heard.get
        threading.Thread(target=self._listen, args=(requests,), daemon=True).start()

    def _listen(self, requests: IO[bytes]) -> None:
        """Pass the request on; end this process when the parent says so, and at once when the parent is gone."""
        try:
            for _ in range(2):
                self._heard.put(pickle.load(requests))  # noqa: S301 - from our own parent
            while pickle.load(requests):  # noqa: S301
                signal.raise_signal(signal.SIGTERM)
        except (EOFError, OSError, pickle.UnpicklingError):
            remove(Path(self._scratch))
        os._exit(1)

    def send(self, value: Any) -> None:
        """Send a value, pickled."""
        self.send_bytes(pickle.dumps(value))

    def send_bytes(self, content: bytes) -> None:
        """Send what is pickled already."""
        rest = memoryview(content)  # no buffered file, which refuses a signal's handler that sends during a write
        while rest:
            rest = rest[os.write(self._answers, rest) :]


def serve_once(scratch: str, preload: str) -> NoReturn:
    """Carry out one request in this process; the main function of a child where nothing is forked."""
    tempfile.tempdir = scratch
    channel = Pipes(scratch)
    if preload:
        _preload(preload)
    _carry_out(channel, _take_over(channel, scratch))
