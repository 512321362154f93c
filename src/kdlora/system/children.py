"""Functions run in processes of their own: the caller's end, and below it the other one.

A server imports once, hears by its standard input, answers by its standard output, and forks a child for each request.
Where a fork is not there (Windows), or not safe once libraries with threads are loaded (macOS), it carries out one
request itself and ends. All that is pickled here passes between a process and its own children.

`multiprocessing` has such a server too, but its children import the caller's main script again, so that a plain
script without a `__main__` guard would start itself over and over. Ours takes functions of importable modules only.
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
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar, cast

from kdlora.errors import log_to_stderr
from kdlora.system.ownership import SCRATCH, owned_name, remove, remove_abandoned

T = TypeVar("T")

GRACE_SECONDS = 60.0
"""Time that an interrupted training has to end its step and write its checkpoint; all else ends at once."""
_SERVER_SECONDS = 1.5
"""Time that a server has to end; one that imports does not see that it should."""
_POLL_SECONDS = 0.05
_TOUCH_SECONDS = 3600
"""So often the folder of temporary files gets a new date, by which alone another machine knows that it is in use."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, prctl(2)
_KILLED = 128
"""What a server adds to the number of the signal that killed its child, as a shell does."""
_BEGUN, _BURIED = "begun", "buried"
"""What comes first, when there is something to save; and last, when a forked child has ended after its answer."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from kdlora.system.children import serve; "
    "serve(*sys.argv[2:])"
)


class ChildDiedError(RuntimeError):
    """A child ended without an answer: killed by a signal, or by an exit from within."""


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


def run_in_child(function: Callable[..., T], *arguments: Any, on_message: Callable[[Any], None] | None = None) -> T:
    """Run a function of an importable module in a process of its own, in the caller's place, and give what it returns.

    `on_message` hears what the function sends, which then takes a sender as its last argument.
    """
    answer = _own.get().ask(function, arguments, on_message)
    if answer.fault is not None:
        raise answer.fault
    return answer.value


class Children:
    """A server, started anew where it is gone, whose children run one after the other and see what is named here."""

    def __init__(self, **environment: str) -> None:
        self.servers: list[Server] = []
        self.environment, self.interrupted, self._lock = environment, threading.Event(), threading.Lock()

    def prepare(self, module: str) -> None:
        """Start the server while this process still imports: a command begins that much sooner."""
        with self._lock:
            if not self.servers:
                self.servers.append(Server(self, module))

    def ask(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], listen: Callable[[Any], None] | None
    ) -> Answer:
        """Have a function run in a child."""
        with self._lock:
            if not self.servers or self.servers[0].process.poll() is not None:
                self.close()
                self.servers.append(Server(self))
            try:
                return self.servers[0].converse(function, arguments, listen)
            except BaseException:  # Ctrl-C, or a fault of the listener: the child must not go on
                self.close()
                raise

    def carry_out(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in this thread, which has no children but these."""
        _own.set(self)
        return function(*arguments)

    def close(self) -> None:
        """End the server and its child; the next call starts a fresh one."""
        with contextlib.suppress(IndexError):  # two threads may do so at once
            while True:
                self.servers.pop().close()

    def forget(self) -> None:
        """Leave the server to the process that started it; this one was forked from it."""
        for server in self.servers:
            server.requests.close()
            server.process.returncode = 0  # else Python warns that it runs
        self.servers, self.interrupted, self._lock = [], threading.Event(), threading.Lock()


class Server:
    """The process that has children, or is one, seen from its parent; it ends with this process, however this ends."""

    def __init__(self, owner: Children, preload: str = "") -> None:
        """Start it; it imports while this process goes on."""
        # Children end without tidying up: their temporary files have a folder, which goes with the server.
        parent = Path(tempfile.gettempdir())
        remove_abandoned(parent, deep=False)
        self.scratch, self.was_asked, self._owner = parent / f"{SCRATCH}-{owned_name()}", False, owner
        self.scratch.mkdir(mode=0o700)
        forks = "forks" if sys.platform == "linux" and hasattr(os, "fork") else ""
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the child. On Windows a group is that.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(sys.path), str(self.scratch), preload, forks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.requests = cast("IO[bytes]", self.process.stdin)
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, answers: IO[bytes]) -> None:
        """Take what comes off the pipe, in a thread: on Windows no signal ends a read."""
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError), answers:
            while True:
                content = pickle.load(answers)  # noqa: S301 - from our own child
                try:
                    self._heard.put(pickle.loads(content))  # noqa: S301
                except Exception as fault:  # of a class that this process cannot build
                    self._heard.put(Answer(fault=fault))
        self._heard.put(None)

    def _hear(self) -> Any:
        """Wait for what comes next; None where it is gone."""
        while not self._owner.interrupted.is_set():
            with contextlib.suppress(queue.Empty):
                return self._heard.get(timeout=_POLL_SECONDS)
        raise KeyboardInterrupt

    def _send(self, *parts: bytes) -> None:
        with contextlib.suppress(OSError):  # it died, as `_hear` tells
            for part in parts:
                _write(self.requests.fileno(), part)

    def converse(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], listen: Callable[[Any], None] | None
    ) -> Answer:
        """Have a function run in a child, and pass on what it sends, a single value as it is and several as a tuple."""
        root = logging.getLogger()
        level = root.level if root.handlers else None
        environment = os.environ | self._owner.environment
        place = Place(sys.path, str(Path.cwd()), environment, function.__module__, listen is not None, level)
        self.was_asked, begun = True, False
        try:
            self._send(pickle.dumps(place), pickle.dumps((function, arguments)))
            begun = self._hear() is not None
            while isinstance(received := self._hear() if begun else None, tuple) and not isinstance(received, Answer):
                if listen is not None:
                    listen(received[0] if len(received) == 1 else received)
            if received is not None and self._hear() is not None:
                return cast("Answer", received)
        except KeyboardInterrupt:
            if begun:  # before that it imports, which is slow, and there is nothing to save
                self._send(b"end")
                time_is_up = time.monotonic() + GRACE_SECONDS
                while time.monotonic() < time_is_up:  # a second Ctrl-C cuts that short; on Windows it ends no wait
                    with contextlib.suppress(queue.Empty):
                        if self._heard.get(timeout=_POLL_SECONDS) in (None, _BURIED):
                            break
            raise
        status = self.process.wait()
        return received or Answer(fault=ChildDiedError(_describe_death(status)))

    def close(self) -> None:
        """End it, and a child that may still run, by closing its input; kill it if need be."""
        with contextlib.suppress(OSError):
            self.requests.close()
        try:
            self.process.wait(timeout=_SERVER_SECONDS if self.was_asked else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        remove(self.scratch)


_shared = Children()
_own: ContextVar[Children] = ContextVar("children", default=_shared)
prepare_children, close_server = _shared.prepare, _shared.close
atexit.register(close_server)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)


def _write(number: int, content: bytes) -> None:
    """Send bytes, so that the other end can tell where they end."""
    rest = memoryview(pickle.dumps(content))  # no buffered file, which refuses a signal's handler that sends meanwhile
    while rest:
        rest = rest[os.write(number, rest) :]


def _describe_death(status: int) -> str:
    number = status - _KILLED if status > _KILLED else -status
    if number not in set(signal.Signals):
        return f"the process that ran this ended by itself with exit status {status}, without a result"
    name = signal.Signals(number).name
    hint = " (the system may be out of memory)" if name == "SIGKILL" else ""
    return f"the process that ran this was killed by {name}{hint}"


# The other end.


def serve(scratch: str, preload: str, forks: str) -> NoReturn:
    """Carry out requests until the parent is gone; the main function of a server."""
    tempfile.tempdir, status = scratch, 0
    answers, requests = os.dup(1), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what a library prints goes to the error output
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _preload(preload)
    while status == 0 and (request := _next_request(requests)) is not None:
        place, body = request
        _take_over(place, scratch)
        if not forks:
            threading.Thread(target=_heed, args=(requests, scratch), daemon=True).start()
            _carry_out(answers, place, body)
        if select.select([requests], [], [], 0)[0]:
            break  # the parent went away during the imports
        ended, lives = os.pipe()  # what the child holds closes when it ends
        child = os.fork()
        if child == 0:
            # A child that trains on would fight the next command for its folder.
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            _carry_out(answers, place, body)
        os.close(lives)
        status = _wait(child, requests, ended)
        os.close(ended)
        if status == 0:
            with contextlib.suppress(OSError):  # the parent may be gone
                _write(answers, pickle.dumps(_BURIED))
    remove(Path(scratch))
    # By its end the parent hears of a child that has not answered; to tear down what was imported takes over a second.
    os._exit(status if status >= 0 else _KILLED - status)


def _next_request(requests: IO[bytes]) -> tuple[Place, bytes] | None:
    """Wait for a place and a function with its arguments; None where the parent is gone."""
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        return pickle.loads(pickle.load(requests)), pickle.load(requests)  # noqa: S301 - from our own parent
    return None


def _take_over(place: Place, scratch: str) -> None:
    """Take the caller's place, and import the function's module so that later children have it already."""
    sys.path[:] = place.path
    with contextlib.suppress(OSError):
        os.chdir(place.folder)
    os.environ.clear()
    os.environ.update(place.environment, TMPDIR=scratch)
    _preload(place.preload)


def _preload(module: str) -> None:
    """Import a module so that children have it already, and keep the garbage collector away from what it made."""
    gc.disable()
    # A fault of the import is reported by the child, which runs into it again.
    with contextlib.suppress(Exception):
        importlib.import_module(module)
    gc.freeze()
    gc.enable()


def _wait(child: int, requests: IO[bytes], ended: int) -> int:
    """Wait for a child; ask it to end when the parent says so, and end it when the parent goes away."""
    touched = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - touched > _TOUCH_SECONDS:
            touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(tempfile.gettempdir())
        if requests.fileno() in select.select([requests.fileno(), ended], [], [], _POLL_SECONDS)[0]:
            try:
                pickle.load(requests)  # noqa: S301 - from our own parent
                os.kill(child, signal.SIGTERM)
            except (EOFError, pickle.UnpicklingError):
                os.kill(child, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _heed(requests: IO[bytes], scratch: str) -> NoReturn:
    """End this process, which carries out a request, when the parent says so, and at once when the parent is gone."""
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        while pickle.load(requests):  # noqa: S301 - from our own parent
            signal.raise_signal(signal.SIGTERM)
    remove(Path(scratch))
    os._exit(1)


def _carry_out(answers: int, place: Place, body: bytes) -> NoReturn:
    """Run the request in the child, send the outcome, and end without the server's exit handlers."""
    status = 1
    try:
        try:
            _write(answers, pickle.dumps(_BEGUN))
            if place.log_level is not None:
                log_to_stderr(place.log_level)
            function, arguments = pickle.loads(body)  # noqa: S301 - from our own parent
            sender = (lambda *values: _write(answers, pickle.dumps(values)),) if place.sends else ()
            outcome = pickle.dumps(Answer(value=function(*arguments, *sender)))
        except BaseException as fault:
            outcome = pickle.dumps(Answer(fault=_portable(fault)))
        _write(answers, outcome)
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
