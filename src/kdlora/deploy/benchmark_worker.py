"""The processes of a benchmark, one for each model: both ends, which speak in lines of JSON."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdlora.deploy.encode import Text
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.predict import Classifier
from kdlora.errors import KdLoraError, ModelError
from kdlora.system.environment import forget_peak, read_memory

_GRID_REPEATS = 3


class Worker:
    """Carries out the requests of `benchmark`, in the model's own process; `load` comes first."""

    classifier: Classifier
    level = 0

    def load(self, folder: str, threads: int, max_length: int | None) -> dict[str, Any]:
        """Import what runs the model, then load it; time and memory count from after the imports."""
        torch_needed = read_model_folder(folder).backend == "transformers"
        importlib.import_module("tokenizers")
        importlib.import_module("kdlora.deploy.torch_backend" if torch_needed else "onnxruntime")
        forget_peak()
        memory = read_memory()
        self.level = memory.resident if memory else 0

        def load() -> None:
            self.classifier = Classifier.load(folder, threads=threads, max_length=max_length)
            self.classifier.predict_logits(["a"])

        facts = {"load_seconds": _seconds(load)}
        names = ("size_bytes", "backend", "precision", "label_names", "kind", "max_length")
        return facts | {name: getattr(self.classifier.folder, name) for name in names}

    def time(self, batches: Sequence[Sequence[Text]], batch_size: int) -> list[float]:
        """Time each call from text to logits, in length-sorted batches, as `predict` makes them."""
        return [_seconds(self.classifier.predict_logits, texts, batch_size=batch_size) for texts in batches]

    def grid(self, batch_size: int, length: int) -> float:
        """Time one batch of full rows, median milliseconds; tokenisation is not part of it."""
        ids = np.random.default_rng(0).integers(10, 100, (batch_size, length), dtype=np.int64)
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        inputs = {name: arrays[name] for name in self.classifier.encoder.input_names}
        times = [_seconds(self.classifier.run, inputs) for _ in range(_GRID_REPEATS + 1)]
        return float(np.median(times[1:])) * 1e3

    def logits(self, texts: Sequence[Text]) -> list[list[float]]:
        """Give the logits, for the score."""
        found: list[list[float]] = self.classifier.predict_logits(texts).tolist()
        return found

    def memory(self) -> int | None:
        """Give the peak above the level after imports, bytes."""
        memory = read_memory()
        return memory.high_water - self.level if memory else None


def _seconds(call: Callable[..., object], *arguments: Any, **settings: Any) -> float:
    start = time.perf_counter()
    call(*arguments, **settings)
    return time.perf_counter() - start


def serve() -> None:
    """Read requests `{"do": name, ...arguments}` until the input ends; answer `{"value": …}` or `{"error": …}`."""
    # Only answers may go to the pipe: whatever a library prints goes to the error output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("do"))(**request)}
        except KdLoraError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class ModelProcess:
    """A model's process, seen from the benchmark."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kdlora.deploy.benchmark_worker"],  # not from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer."""
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

    def close(self) -> None:
        """End it, by closing its input."""
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


if __name__ == "__main__":
    serve()
