"""Functions that the tests run in a process of their own."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdlora.system.environment import forget_peak, peak_since, read_memory


class TwoArgumentsError(Exception):
    """Cannot be rebuilt from its message alone, as many libraries' exceptions."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def where() -> tuple[int, str, str | None]:
    return os.getpid(), str(Path.cwd()), os.environ.get("KDLORA_TEST")


def peak_of_allocating(megabytes: int, forget: bool = False) -> int | None:
    level = read_memory()
    np.ones(megabytes * 2**20 // 8)
    if forget:
        forget_peak()
    return peak_since(level)


def fail(fault: Exception) -> None:
    raise fault


def raise_oddly() -> None:
    raise TwoArgumentsError("not", "rebuilt")


def count(to: int, send: Callable[..., None]) -> str:
    for number in range(to):
        send(number, to)
    send("done")
    return "counted"


def sleep_and_write(path: str, send: Callable[..., None]) -> None:
    send(os.getpid())
    time.sleep(30)
    Path(path).write_text("survived")


def tidy_up_when_asked(path: str, send: Callable[..., None]) -> None:
    """Take a while to save after SIGTERM, sending on as a training does."""

    def save(number: int, frame: object) -> None:
        for _ in range(8):
            send("x" * 100_000)
            time.sleep(0.1)
        Path(path).write_text("saved")
        os._exit(0)

    signal.signal(signal.SIGTERM, save)
    send(os.getpid())
    for _ in range(300):
        time.sleep(0.1)


def name_temporary_file() -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        return file.name, tempfile.mkdtemp(dir=os.environ["TMPDIR"])
