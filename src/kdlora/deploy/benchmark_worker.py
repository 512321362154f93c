"""The processes of a benchmark, one for each model: both ends, which speak in lines of JSON."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kdlora.deploy.encode import Text
from kdlora.deploy.predict import Classifier
from kdlora.errors import KdLoraError, ModelError
from kdlora.system.environment import forget_peak, read_memory


class Worker:
    """Carries out the requests of `benchmark`."""

    def __init__(self) -> None:
        """Start without a model."""
        self.classifier: Classifier | None = None
        self.level = 0

    def load(self, folder: str, threads: int, precision: Any, max_length: int | None) -> dict[str, Any]:
        """Import what runs the model, then load it; time and memory count from after the imports."""
        from kdlora.deploy.folder import read_model_folder

        torch_needed = read_model_folder(folder, precision=precision).backend == "transformers"
        importlib.import_module("tokenizers")
        importlib.import_module("kdlora.deploy.torch_backend" if torch_needed else "onnxruntime")
        forget_peak()
        memory = read_memory()
        self.level = memory.resident if memory else 0
        start = time.perf_counter()
        self.classifier = Classifier.load(folder, precision=precision, threads=threads, max_length=max_length)
        self.classifier.predict_logits(["a"])
        described = self.classifier.folder
        return {
            "load_seconds": time.perf_counter() - start,
            "size_bytes": described.size_bytes,
            "backend": described.backend,
            "precision": described.precision,
            "label_names": list(described.label_names),
            "kind": described.kind,
            "max_length": described.max_length,
        }

    def latency(self, texts: Sequence[Text]) -> list[float]:
        """Time single texts from text to logits, milliseconds."""
        model = self._model()
        times = []
        for text in texts:
            start = time.perf_counter()
            model.predict_logits([text])
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def throughput(self, texts: Sequence[Text], batch_size: int) -> float:
        """Time all texts in length-sorted batches, as `predict` makes them, seconds."""
        start = time.perf_counter()
        self._model().predict_logits(texts, batch_size=batch_size)
        return time.perf_counter() - start

    def grid(self, batch_size: int, length: int, repeats: int) -> float:
        """Time one batch of full rows, median milliseconds; tokenisation is not part of it."""
        model = self._model()
        ids = np.random.default_rng(0).integers(10, 100, (batch_size, length), dtype=np.int64)
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        inputs = {name: arrays[name] for name in model.encoder.input_names}
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model.run(inputs)
            times.append((time.perf_counter() - start) * 1e3)
        return float(np.median(times[1:]))

    def logits(self, texts: Sequence[Text]) -> list[list[float]]:
        """Give the logits, for the score."""
        found: list[list[float]] = self._model().predict_logits(texts).tolist()
        return found

    def memory(self) -> int | None:
        """Give the peak above the level after imports, bytes."""
        memory = read_memory()
        return memory.high_water - self.level if memory else None

    def _model(self) -> Classifier:
        """Give the loaded model."""
        if self.classifier is None:
            raise RuntimeError("load comes first")
        return self.classifier


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


if __name__ == "__main__":
    serve()


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


@contextlib.contextmanager
def model_process(name: str, threads: int) -> Iterator[ModelProcess]:
    """Start a process for one model, and end it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "kdlora.deploy.benchmark_worker"],  # not from the current folder
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
