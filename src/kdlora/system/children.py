"""Functions run in processes of their own; here is the caller's end, in `childprocess.py` the other one.

`multiprocessing` has such a server too, but its children import the caller's main script again, so that a plain
script without a `__main__` guard would start itself over and over. Ours takes functions of importable modules only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from kdlora.system.childprocess import BEGUN, Answer, Place
from kdlora.system.ownership import SCRATCH, owned_name, remove, remove_abandoned

T = TypeVar("T")

GRACE_SECONDS = 8.0
"""Time that an interrupted child has to save what it can; the command promises to end within 10 s."""
_SERVER_SECONDS = 1.5
"""Time that a server has to end; one that imports does not see that it should."""
_POLL_SECONDS = 0.05
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from kdlora.system import childprocess; "
    "getattr(childprocess, sys.argv[1])(*sys.argv[3:])"
)


class ChildDiedError(RuntimeError):
    """A child ended without an answer: killed by a signal, or by an exit from within."""


def run_in_child(function: Callable[..., T], *arguments: Any, on_message: Callable[[Any], None] | None = None) -> T:
    """Run a function in a process of its own, so that its memory is its own, and give what it returns.

    The child has the caller's environment and working directory. `on_message` hears what the function sends, which
    then takes a sender as its last argument.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ValueError(f"expected a function at the top of an importable module, got {name}")
    with _lock:
        if not _servers or _servers[0].process.poll() is not None:
            close_server()
            _servers.append(_start())
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
        if not _servers:
            _servers.append(_start(module))


def _start(module: str = "") -> ForkServer | StartedChild:
    can_fork = sys.platform == "linux" and hasattr(os, "fork")
    return ForkServer(module) if can_fork else StartedChild(module)


def close_server() -> None:
    """End the server and its child; the next call starts a fresh one."""
    while _servers:
        _servers.pop().close()


_lock = threading.Lock()
_servers: list[ForkServer | StartedChild] = []
atexit.register(close_server)


class ForkServer:
    """The parent's end: one server process, one child at a time."""

    def __init__(self, preload: str = "") -> None:
        """Start the server; it ends with this process, however this process ends."""
        self.control, theirs = socket.socketpair()
        self.scratch = _make_scratch()
        self.was_asked = False
        details = ("serve", json.dumps(sys.path), self.scratch, preload, str(theirs.fileno()))
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
    ) -> Answer:
        """Run a function in a fresh child, and pass on what it sends until it answers or dies."""
        place, body = _pickle_place(function, listen), pickle.dumps((function, arguments))
        self.was_asked = True
        ours, theirs = socket.socketpair()
        answer: Answer | None = None
        with Connection(ours.detach()) as channel, contextlib.suppress(EOFError, ConnectionError):
            with theirs:
                socket.send_fds(self.control, [b"r"], [theirs.fileno()])
            channel.send_bytes(place)
            channel.send_bytes(body)
            begun = False
            try:
                begun = channel.recv() == BEGUN
                answer = _hear(channel, listen)
            except KeyboardInterrupt:
                if begun:  # before that the server imports, which is slow, and there is nothing to save
                    self._end_child(channel)
                raise
        status = self._exit_status()
        return answer or Answer(fault=ChildDiedError(_describe_death(status)))

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
        _bury(self)


class StartedChild:
    """The same where nothing is forked: a process for one request, which ends when its input is closed."""

    def __init__(self, preload: str = "") -> None:
        """Start the child, which imports while this process goes on."""
        self.scratch, self.was_asked = _make_scratch(), False
        details = ("serve_once", json.dumps(sys.path), self.scratch, preload)
        # As above, Ctrl-C reaches the parent alone; a group of its own is what Windows has for that.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *details],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self._requests = cast("IO[bytes]", self.process.stdin)
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, answers: IO[bytes]) -> None:
        """Take what the child sends off the pipe, in a thread: on Windows no signal ends a read."""
        try:
            with answers:
                while True:
                    self._heard.put(pickle.load(answers))  # noqa: S301 - from our own child
        except (EOFError, OSError, pickle.UnpicklingError):
            self._heard.put(None)
        except Exception as fault:  # of a class that this process cannot build
            self._heard.put(Answer(fault=fault))

    def recv(self) -> Any:
        """Wait for what the child sends."""
        while True:
            with contextlib.suppress(queue.Empty):
                if (received := self._heard.get(timeout=_POLL_SECONDS)) is None:
                    raise EOFError
                return received

    def _send(self, *parts: bytes) -> None:
        with contextlib.suppress(OSError):  # it died, as `recv` tells
            for part in parts:
                pickle.dump(part, self._requests)
            self._requests.flush()

    def converse(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], listen: Callable[[Any], None] | None
    ) -> Answer:
        """Send the request, and pass on what the child sends until it answers or dies."""
        self.was_asked, begun, answer = True, False, None
        self._send(_pickle_place(function, listen), pickle.dumps((function, arguments)))
        try:
            with contextlib.suppress(EOFError):
                begun = self.recv() == BEGUN
                answer = _hear(self, listen)
        except KeyboardInterrupt:
            if begun:
                self._send(b"end")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(GRACE_SECONDS)
            raise
        status = self.process.wait()
        return answer or Answer(fault=ChildDiedError(_describe_death(status)))

    def close(self) -> None:
        """End the child, by closing its input."""
        with contextlib.suppress(OSError):
            self._requests.close()
        _bury(self)


def _pickle_place(function: Callable[..., Any], listen: Callable[[Any], None] | None) -> bytes:
    root = logging.getLogger()
    level = root.level if root.handlers else None
    path, module = str(Path.cwd()), function.__module__
    return pickle.dumps(Place(sys.path, path, dict(os.environ), module, listen is not None, level))


def _bury(server: ForkServer | StartedChild) -> None:
    """Wait until a process has ended, and end it if need be."""
    try:
        server.process.wait(timeout=_SERVER_SECONDS if server.was_asked else 0)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    remove(Path(server.scratch))


def _hear(channel: Connection | StartedChild, listen: Callable[[Any], None] | None) -> Answer:
    """Pass on what a child sends, a single value as it is and several as a tuple, until it answers."""
    while not isinstance(received := channel.recv(), Answer):
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
