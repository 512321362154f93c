"""Take from a Python process what Linux has, and macOS or Windows lack; `sitecustomize.py` says when.

Not there: `fork`, descriptors over sockets, `/proc`, users, several signals, handles of folders. Refused, as Windows
does: to flush what is open for reading only, to ask about a process by signal 0, to make links, to rename or remove a
file that is open or mapped, and names that only other systems take.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

_GONE = {
    os: "fork forkpty pidfd_open getuid geteuid sched_getaffinity sched_setaffinity killpg",
    socket: "send_fds recv_fds",
    signal: "SIGHUP SIGALRM SIGUSR1 SIGUSR2 pthread_kill setitimer",
}
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$|^(con|nul|aux|prn)(\..*)?$', re.IGNORECASE)
_OWN_WAYS = (f"{os.sep}psutil{os.sep}", f"{os.sep}filelock{os.sep}", f"{os.sep}tempfile.py")
"""What knows another way on each system, and takes Linux' here."""
_readlink, _kill, _fsync = os.readlink, os.kill, os.fsync
_asked = threading.local()


def take_away() -> None:
    """Make this process one of another system, for good."""
    with contextlib.suppress(ImportError):
        import platformdirs  # noqa: F401 - it chooses by the system's name, and takes the user's number from Linux' `os`
    for module, names in _GONE.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    shutil._use_fd_functions = False
    os.environ.setdefault("USERNAME", "somebody")  # which Windows sets, and Python asks before the system's users
    os.kill, os.fsync, os.readlink = kill, fsync, readlink
    sys.addaudithook(_refuse)


def kill(process: int, number: int) -> None:
    """Signal 0 is Ctrl-C on Windows."""
    if number == 0 and not _has_own_way():
        raise RuntimeError(f"os.kill({process}, 0) interrupts the process on Windows")
    _kill(process, number)


def fsync(file: Any) -> None:
    """What is open for reading cannot be flushed."""
    number = file if isinstance(file, int) else file.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    _fsync(number)


def readlink(path: Any, **options: Any) -> Any:
    """Nothing lies below /proc."""
    _check_proc(os.fsdecode(path))
    return _readlink(path, **options)


def _check_proc(path: str) -> None:
    if path.startswith("/proc/") and not _has_own_way():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)


def _has_own_way() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _OWN_WAYS):
            return True
        frame = frame.f_back
    return False


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if getattr(_asked, "already", False) or event not in _CHECKS:
        return
    paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
    _asked.already = True
    try:
        _CHECKS[event](paths, arguments)
    finally:
        _asked.already = False


def _check_open(paths: list[str], arguments: tuple[Any, ...]) -> None:
    for path in paths[:1]:
        _check_proc(path)
        if arguments[1] is None and Path(path).is_dir() and not _has_own_way():  # os.open
            raise PermissionError(errno.EACCES, "Permission denied", path)
        if arguments[2] & os.O_CREAT:
            _check_name([path])


def _check_name(paths: list[str], arguments: tuple[Any, ...] = ()) -> None:
    if paths and _FORBIDDEN.search(Path(paths[0]).name):
        raise OSError(errno.EINVAL, "Invalid argument", paths[0])


def _check_rename(paths: list[str], arguments: tuple[Any, ...]) -> None:
    _check_free(paths)
    _check_name(paths[1:])


def _check_free(paths: list[str], arguments: tuple[Any, ...] = ()) -> None:
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123 - no imports that tests may patch
        used = {line.rstrip("\n").split(maxsplit=5)[5] for line in maps if "/" in line}
    for link in Path("/proc/self/fd").iterdir():
        try:
            used.add(_readlink(link))
        except OSError:
            continue
    for path in map(os.path.realpath, paths):
        busy = [name for name in used if name == path or name.startswith(path + os.sep)]
        if busy and not _has_own_way():
            raise PermissionError(errno.EACCES, "The file is used by another process", busy[0])


def _refuse_link(paths: list[str], arguments: tuple[Any, ...]) -> None:
    raise OSError(errno.EPERM, "A required privilege is not held by the client", *paths[:1])


_CHECKS = {
    "open": _check_open,
    "os.mkdir": _check_name,
    "os.rename": _check_rename,
    "os.remove": _check_free,
    "os.symlink": _refuse_link,
}
