"""The processes of a benchmark, one for each model, seen from the benchmark; `benchmark_worker` is their other side."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from kdlora.errors import ModelError


class ModelProcess:
    """A model's process, seen from the benchmark.

    Attributes:
        name: of the model.
        process: it runs `benchmark_worker`.
    """

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer.

        Args:
            do: what `benchmark_worker` shall do.
            arguments: of that.

        Raises:
            ModelError: the process ended, or what it says went wrong.
        """
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a worker without pipes")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise ModelError(f"{self.name}: its process ended with code {code} during {do!r} (out of memory?).")
        answer = json.loads(line)
        if "error" in answer:
            raise ModelError(answer["error"])
        return answer["value"]


@contextlib.contextmanager
def model_process(name: str, threads: int) -> Iterator[ModelProcess]:
    """Start a process for one model, and end it.

    Args:
        name: of the model, for messages.
        threads: of its libraries.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "kdlora.deploy.benchmark_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield ModelProcess(name, process)
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
