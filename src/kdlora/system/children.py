"""Functions run in processes of their own: a server holds the imports and forks one child a request.

`multiprocessing` has such a server too, but its children import the caller's main script again, so that a plain
script without a `__main__` guard would start itself over and over. Ours takes functions of importable modules only.
Everything that is pickled here passes between a process and its own children.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from kdlora.errors import log_to_stderr
from kdlora.system.ownership import SCRATCH, owned_name, remove, remove_abandoned

T = TypeVar("T")

GRACE_SECONDS = 8.0
"""Time that an interrupted child has to save what it can; the command promises to end within 10 s."""
_SERVER_SECONDS = 1.5
"""Time that a server has to end; one that imports does not see that it should."""
_POLL_SECONDS = 0.05
_BEGUN = b"begun"
"""What a child sends first: from then on there is something to save."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, prctl(2)
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from kdlora.system.children import serve; serve(int(sys.argv[1]), sys.argv[3], sys.argv[4])"
)


class ChildDiedError(RuntimeError):
    """A child ended without an answer: killed by a signal, or by an exit from within."""


class _Place(NamedTuple):
    """Where a child runs: what it takes over from the caller, and whether it may send."""

    path: list[str]
    folder: str
    environment: dict[str, str]
    preload: str
    sends: bool
    log_level: int | None


class _Answer(NamedTuple):
    """The end of a request: a value, or what was raised."""

    value: Any = None
    fault: BaseException | None = None


# The caller's end.


def run_in_child(function: Callable[..., T], *arguments: Any, on_message: Callable[[Any], None] | None = None) -> T:
    """Run a function in a process of its own, so that its memory is its own, and give what it returns.

    The child is forked from a server that has imported the function's module, and has the caller's environment and
    working directory. `on_message` hears what the function sends, which then takes a sender as its last argument.
    Where the system cannot fork, the function runs in this process.
    """
    if not hasattr(os, "fork"):
        return function(*arguments, *(() if on_message is None else (on_message,)))
    name = f"{function.__module__}.{function.__qualname__}"
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ValueError(f"expected a function at the top of an importable module, got {name}")
    with _lock:
        if not _servers or _servers[0].process.poll() is not None:
            close_server()
            _servers.append(ForkServer())
        answer = None
        try:
            answer = _servers[0].converse(function, arguments, on_message)
        finally:
            if answer is None:  # Ctrl-C, or a fault of the listener: the child must not go on
                close_server()
    if answer.fault is not None:
        raise answer.fault
    value: T = answer.value
    return value


def prepare_children(module: str) -> None:
    """Start the server of children while this process still imports: a command begins that much sooner."""
    with _lock:
        if hasattr(os, "fork") and not _servers:
            _servers.append(ForkServer(module))


def close_server() -> None:
    """End the server and its child; the next call starts a fresh one."""
    while _servers:
        _servers.pop().close()


_lock = threading.Lock()
_servers: list[ForkServer] = []
atexit.register(close_server)


class ForkServer:
    """The parent's end: one server process, one child at a time."""

    def __init__(self, preload: str = "") -> None:
        """Start the server; it ends with this process, however this process ends."""
        self.control, theirs = socket.socketpair()
        self.scratch = _make_scratch()
        self.was_asked = False
        details = (str(theirs.fileno()), json.dumps(sys.path), self.scratch, preload)
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the child.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *details],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def converse(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], listen: Callable[[Any], None] | None
    ) -> _Answer:
        """Run a function in a fresh child, and pass on what it sends until it answers or dies."""
        root, module = logging.getLogger(), function.__module__
        level = root.level if root.handlers else None
        place = _Place(sys.path, str(Path.cwd()), dict(os.environ), module, listen is not None, level)
        body = pickle.dumps((function, arguments))
        self.was_asked = True
        ours, theirs = socket.socketpair()
        answer: _Answer | None = None
        with Connection(ours.detach()) as channel, contextlib.suppress(EOFError, ConnectionError):
            with theirs:
                socket.send_fds(self.control, [b"r"], [theirs.fileno()])
            channel.send_bytes(pickle.dumps(place))
            channel.send_bytes(body)
            begun = False
            try:
                begun = channel.recv() == _BEGUN
                answer = _hear(channel, listen)
            except KeyboardInterrupt:
                if begun:  # before that the server imports, which is slow, and there is nothing to save
                    self._end_child(channel)
                raise
        status = self._exit_status()
        return answer or _Answer(fault=ChildDiedError(_describe_death(status)))

    def _end_child(self, channel: Connection) -> None:
        """Ask the child to end, and give it time to save; a second Ctrl-C cuts that short."""
        with contextlib.suppress(OSError):
            self.control.sendall(b"t")
            until = time.monotonic() + GRACE_SECONDS
            # Bytes, not messages: the interruption may have come in the middle of one.
            while channel.poll(max(0.0, until - time.monotonic())) and os.read(channel.fileno(), 65536):
                pass

    def _exit_status(self) -> int | None:
        """Wait until the server has buried the child; None where the server itself died."""
        try:
            answer = self.control.recv(16)
        except ConnectionError:
            return None
        return int(answer) if answer else None

    def close(self) -> None:
        """End the server, and a child that may still run."""
        self.control.close()
        try:
            self.process.wait(timeout=_SERVER_SECONDS if self.was_asked else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        remove(Path(self.scratch))


def _hear(channel: Connection, listen: Callable[[Any], None] | None) -> _Answer:
    """Pass on what a child sends, a single value as it is and several as a tuple, until it answers."""
    while not isinstance(received := channel.recv(), _Answer):
        if listen is not None:
            listen(received[0] if len(received) == 1 else received)
    return received


def _make_scratch() -> str:
    """Make the folder for the temporary files of children, which end without tidying up; remove abandoned ones."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent, deep=False)
    scratch = parent / f"{SCRATCH}-{owned_name()}"
    scratch.mkdir(mode=0o700)
    return str(scratch)


def _describe_death(status: int | None) -> str:
    if status is None:
        return "the process that ran this was ended from outside, together with its server"
    if status >= 0:
        return f"the process that ran this ended by itself with exit status {status}, without a result"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (the system may be out of memory)" if -status == signal.SIGKILL else ""
    return f"the process that ran this was killed by {name}{hint}"


# The server's end: it imports, forks a child for each request, and waits for its end.

_preparations: list[Callable[[], None]] = []


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
        while (channel := _next_request(control)) is not None:
            with contextlib.suppress(EOFError, ConnectionError):
                place = _take_over(channel, scratch)
                if select.select([control], [], [], 0)[0]:
                    break  # the parent went away during the imports
                ended, lives = os.pipe()  # what the child holds closes when it ends
                child = os.fork()
                if child == 0:
                    control.close()
                    if sys.platform == "linux":  # a child that trains on would fight the next command for its folder
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


def _take_over(channel: Connection, scratch: str) -> _Place:
    """Take the caller's place, and import the function's module so that later children have it already."""
    place: _Place = pickle.loads(channel.recv_bytes())  # noqa: S301 - from our own parent
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


def _carry_out(channel: Connection, place: _Place) -> None:
    """Run the request in the child, send the outcome, and end without the server's exit handlers."""
    status = 1
    channel.send(_BEGUN)
    if place.log_level is not None:
        log_to_stderr(place.log_level)
    try:
        try:
            function, arguments = pickle.loads(channel.recv_bytes())  # noqa: S301 - from our own parent
            sender = (lambda *values: channel.send(values),) if place.sends else ()
            outcome = pickle.dumps(_Answer(value=function(*arguments, *sender)))
        except BaseException as fault:
            outcome = pickle.dumps(_Answer(fault=_portable(fault)))
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
