"""A server process that holds the imports and forks one child a request.

`multiprocessing` has such a server too, but its children import the caller's main script again, so that a plain
script without a `__main__` guard would start itself over and over. Ours takes functions of importable modules only.
This is the caller's end; the server's is `forkserver_process`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
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
from typing import Any

from kdlora.system.forkserver_process import BEGUN, Answer, Place
from kdlora.system.ownership import SCRATCH, owned_name, remove, remove_abandoned

GRACE_SECONDS = 8.0
"""Time that an interrupted child has to save what it can; the command promises to end within 10 s."""
_SERVER_SECONDS = 1.5
"""Time that a server has to end; one that imports does not see that it should."""

_Request = tuple[Callable[..., Any], tuple[Any, ...]]
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from kdlora.system.forkserver_process import serve; serve(int(sys.argv[1]), sys.argv[3], sys.argv[4])"
)


class ChildDiedError(RuntimeError):
    """A child ended without an answer: killed by a signal, or by an exit from within."""


class ForkServer:
    """The parent's end: one server process, one child at a time."""

    def __init__(self, preload: str = "") -> None:
        """Start the server; it ends with this process, however this process ends."""
        self.control, theirs = socket.socketpair()
        self.scratch = _make_scratch()
        self.was_asked = False
        command = [
            sys.executable,
            "-P",
            "-c",
            _START,
            str(theirs.fileno()),
            json.dumps(sys.path),
            self.scratch,
            preload,
        ]
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the child.
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()

    @property
    def is_alive(self) -> bool:
        """Whether the server can take a request."""
        return self.process.poll() is None

    def converse(self, preload: str, request: _Request, listen: Callable[[Any], None] | None) -> Answer:
        """Run a request in a fresh child, and pass on what it sends until it answers or dies."""
        root = logging.getLogger()
        level = root.level if root.handlers else None
        place = Place(tuple(sys.path), str(Path.cwd()), dict(os.environ), preload, listen is not None, level)
        body = pickle.dumps(request)
        self.was_asked = True
        ours, theirs = socket.socketpair()
        answer: Answer | None = None
        with Connection(ours.detach()) as channel, contextlib.suppress(EOFError, ConnectionError):
            with theirs:
                socket.send_fds(self.control, [b"r"], [theirs.fileno()])
            channel.send_bytes(pickle.dumps(place))
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
        try:
            self.process.wait(timeout=_SERVER_SECONDS if self.was_asked else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        remove(Path(self.scratch))


def _hear(channel: Connection, listen: Callable[[Any], None] | None) -> Answer:
    """Pass on what a child sends, until it answers."""
    while True:
        received = channel.recv()
        if isinstance(received, Answer):
            return received
        if listen is not None:
            listen(received.value)


def _make_scratch() -> str:
    """Make the folder for the temporary files of children, which end without tidying up; remove abandoned ones."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent, deep=False)
    scratch = parent / f"{SCRATCH}-{owned_name()}"
    scratch.mkdir(mode=0o700)
    return str(scratch)


_lock = threading.Lock()
_servers: list[ForkServer] = []


def findable_module(function: Callable[..., Any]) -> str:
    """Name the module that another process can import a function from."""
    name = f"{function.__module__}.{function.__qualname__}"
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ValueError(f"expected a function at the top of an importable module, got {name}")
    return function.__module__


def call_in_child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    listen: Callable[[Any], None] | None,
    *,
    preload: str,
) -> Any:
    """Run a function in a child of this process's one server, which is started on first use."""
    with _lock:
        if not _servers or not _servers[0].is_alive:
            close_server()
            _servers.append(ForkServer())
        answered = False
        try:
            answer = _servers[0].converse(preload, (function, arguments), listen)
            answered = True
        finally:
            if not answered:  # Ctrl-C, or a fault of the listener: the child must not go on
                close_server()
    if answer.fault is not None:
        raise answer.fault
    return answer.value


def start_server(preload: str) -> None:
    """Start this process's server before it is asked, so that it imports while the caller imports, too."""
    with _lock:
        if not _servers:
            _servers.append(ForkServer(preload))


def close_server() -> None:
    """End the server and its child; the next call starts a fresh one."""
    while _servers:
        _servers.pop().close()


atexit.register(close_server)


def _describe_death(status: int | None) -> str:
    """Say how a child ended."""
    if status is None:
        return "the process that ran this was ended from outside, together with its server"
    if status >= 0:
        return f"the process that ran this ended by itself with exit status {status}, without a result"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (the system may be out of memory)" if -status == signal.SIGKILL else ""
    return f"the process that ran this was killed by {name}{hint}"
