"""Compare models side by side: latency, throughput, memory, size and score.

Each model has a process of its own, which speaks with this one in lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from kdlora.data.tags import Words
from kdlora.deploy.folder import ModelFolder, Way, read_model_folder
from kdlora.deploy.gates import LabelledTexts, check_texts
from kdlora.deploy.network import spread
from kdlora.deploy.predict import Text, iterate_texts
from kdlora.deploy.tagger import Model, load_model
from kdlora.errors import ConfigError, DataError, KdLoraError, ModelError
from kdlora.report.shipped import BenchmarkResult, ModelFigures
from kdlora.system.environment import collect_versions, default_threads, describe_machine, forget_peak, read_memory

_WORDS = ("The", "film", "was", "a", "quiet", "and", "moving", "story")
_DEFAULT_TEXTS = [" ".join((_WORDS * 8)[:length]) for length in (4, 8, 12, 16, 24, 32, 48, 64)] * 16
_LATENCY_TEXTS = 100
_WARM_UP_TEXTS = 64
_PASS_SECONDS = 2.0  # what the slowest model may take for one pass over the texts
_LEAST_SECONDS = 0.5  # what a fast one is timed for in each round, pass after pass
_LIBRARIES = {
    "transformers": "kdlora.deploy.torch_backend",
    "onnx": "onnxruntime",
    "openvino": "kdlora.deploy.openvino_backend",
}
_START = (  # Ctrl-C reaches both processes; it is the parent's to tell
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from kdlora.deploy.benchmark import serve; serve()"
)


def benchmark(
    models: Sequence[str | Path] | Mapping[str, str | Path | Way],
    texts: Sequence[Text | Words] | LabelledTexts = (),
    *,
    max_length: int | None = None,
    threads: int | None = None,
    rounds: int = 3,
    batch_sizes: Sequence[int] = (8, 32, 64),
    scores: Mapping[str, float] | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchmarkResult:
    """Measure models side by side. In each round every model is timed in turn, so that drift hits all alike.

    Args:
        models: folders, or name to folder; an `.onnx` file chooses one of a folder's two, and a `Way` a runtime.
        texts: what to classify; by default made-up texts of 4 to 64 words, or pairs of them. All are scored, which
            needs labels and their task; a slow model limits how many are timed, the same for all.
        max_length: longest input in tokens, for all models; by default each model's own.
        threads: of each model; by default `OMP_NUM_THREADS`, else one a core, within a container's CPU limit.
        rounds: interleaved rounds. A model that is slow beside others reads each text alone in one of them, and after
            the first only in batches of its best size.
        batch_sizes: tried for the best throughput.
        scores: name to score on these texts, 0..100, of models that need not be scored again.
        progress: called with a short sentence at each step.

    Returns:
        The figures of all models.

    Raises:
        ConfigError: no models, or settings that make no sense.
        ModelError: not a model folder, an adapter that is not merged, a model whose process ended.
        DataError: an empty text, labels without a task, or labels that do not fit.

    Examples:
        >>> figures = benchmark({"teacher": "runs/reviews/teacher", "student": "runs/reviews/student"}, rounds=1)
    """
    named = models if isinstance(models, Mapping) else {str(path): path for path in models}
    count = default_threads() if threads is None else threads
    if not named or rounds < 1 or count < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError("benchmark: models, rounds, threads and batch sizes must be at least 1.")
    ways = {name: Way.of(path) for name, path in named.items()}
    example = _check_alike([*map(read_model_folder, ways.values())]).example
    given = texts
    if not isinstance(given, LabelledTexts):
        given = LabelledTexts(list(iterate_texts(given)) or [*map(example, _DEFAULT_TEXTS)])
    if given.labels is not None and given.task is None:
        raise DataError("benchmark: labels need a task.")
    rows = check_texts(given.texts, "" if given.offsets is None else "tokens", "text")
    say = progress or (lambda step: None)
    with contextlib.ExitStack() as stack:
        found = []
        for name, way in ways.items():
            say(f"{name}: loading")
            found.append(stack.enter_context(contextlib.closing(ModelProcess(name, way, count))))
            place = [str(way.folder), way.runtime, way.precision]
            found[-1].figures |= found[-1].ask("load", way=place, threads=count, max_length=max_length)
        # Words are found anew, as where texts are served.
        plain = [row.text if isinstance(row, Words) else row for row in rows]
        timed = _time_models(found, plain, rounds, batch_sizes, say)
        for model in found:
            model.figures["peak_memory_bytes"] = model.ask("memory")
            known = (scores or {}).get(model.name)
            model.figures["score"] = _score(model, given, rows, say) if known is None else known
    figures = tuple(ModelFigures(**model.figures) for model in found)
    return BenchmarkResult(figures, count, rounds, timed, machine=describe_machine(), versions=collect_versions())


def _check_alike(folders: Sequence[ModelFolder]) -> ModelFolder:
    """Refuse models that read different things; give one that says how many texts it reads, if any does."""
    if len({folder.kind == "tokens" for folder in folders}) > 1:
        raise ModelError("benchmark: some of the models mark entities and some classify texts; measure either.")
    if len({folder.texts for folder in folders if folder.texts}) > 1:
        raise ModelError("benchmark: some of the models read pairs of texts and some single ones; measure either.")
    return max(folders, key=lambda folder: folder.texts or 0)


def _time_models(
    models: Sequence[ModelProcess],
    texts: list[Text],
    rounds: int,
    batch_sizes: Sequence[int],
    say: Callable[[str], None],
) -> int:
    """Time all models round by round, for each batch size; return how many texts a pass has."""
    singles, some = [[text] for text in spread(texts, _LATENCY_TEXTS)], spread(texts, _WARM_UP_TEXTS)
    for model in models:
        say(f"{model.name}: warm-up")
        model.ask("time", batches=singles[:10])
        model.pace = model.ask("time", batches=[some], batch_size=batch_sizes[0], repeats=2)[1] / len(some)
    # All read the same texts, since batches of more texts are filled better.
    some = spread(texts, max(_WARM_UP_TEXTS, int(_PASS_SECONDS / max(model.pace for model in models))))
    fastest = min(model.pace for model in models)
    for turn in range(rounds):
        for model in models:
            say(f"round {turn + 1} of {rounds}: {model.name}")
            # One that is slow beside others reads each text alone in one round, and after the first its best batches.
            slow = model.pace * len(some) > 2 * _LEAST_SECONDS and model.pace > 2 * fastest
            model.latencies += model.ask("time", batches=singles[turn::rounds] if slow else singles)
            repeats = math.ceil(_LEAST_SECONDS / (model.pace * len(some)))
            for size in [min(batch_sizes, key=lambda size: model.seconds[size][0])] if slow and turn else batch_sizes:
                took = model.ask("time", batches=[some], batch_size=size, repeats=repeats)
                model.seconds.setdefault(size, []).extend(took)
    for model in models:
        for part in (50, 95, 99):
            model.figures[f"p{part}_ms"] = float(np.percentile(model.latencies, part)) * 1e3
        speeds = {size: len(some) / float(np.median(found)) for size, found in model.seconds.items()}
        best = max(speeds, key=speeds.__getitem__)
        model.figures |= {"batch_size": best, "texts_per_second": speeds[best]}
        model.figures["speeds"] = {1: 1e3 / model.figures["p50_ms"], **speeds}
    return len(some)


def _score(
    model: ModelProcess, given: LabelledTexts, texts: list[Text | Words], say: Callable[[str], None]
) -> float | None:
    """Score a model by label name; one whose labels are others (an untrained base) has no score."""
    task, folder = given.task, read_model_folder(model.way)
    if given.labels is None or task is None or folder.kind != task.kind:
        return None
    if task.kind != "regression" and sorted(folder.label_names) != sorted(task.label_names):
        return None
    say(f"{model.name}: scored on {len(texts):,} texts")
    logits = np.asarray(model.ask("logits", texts=texts))
    if task.kind != "regression":
        logits = logits[:, [folder.label_names.index(name) for name in task.label_names]]
    return given.score(task, logits)


class ModelProcess:
    """A model's process, seen from the benchmark, and what was found out about the model so far."""

    def __init__(self, name: str, way: Way, threads: int) -> None:
        self.name, self.way = name, way
        self.figures: dict[str, Any] = {"name": name, "folder": str(way.folder)}
        self.latencies: list[float] = []  # seconds of single texts
        self.pace = 0.0  # seconds a text, roughly
        self.seconds: dict[int, list[float]] = {}  # of a pass over the texts in batches of each size
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],  # not from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer."""
        requests = cast("IO[str]", self.process.stdin)
        with contextlib.suppress(BrokenPipeError):
            requests.write(json.dumps({"do": do, **arguments}) + "\n")
            requests.flush()
        line = cast("IO[str]", self.process.stdout).readline()
        if not line:
            code = self.process.wait()
            raise ModelError(f"{self.name}: its process ended with code {code} during {do!r} (out of memory?).")
        answer = json.loads(line)
        if "error" in answer:
            raise ModelError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End it, even in the middle of a request."""
        self.process.terminate()
        self.process.communicate()


def serve() -> None:
    """Read requests `{"do": name, ...arguments}` until the input ends; answer `{"value": …}` or `{"error": …}`."""
    # Only answers may go to the pipe: whatever a library prints goes to the error output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("do"))(**request)}
        except KdLoraError as error:
            answer = {"error": str(error)}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # the parent was stopped
            os._exit(1)


class _Worker:
    """Carries out the requests in the model's own process; `load` comes first."""

    model: Model
    level = 0

    def load(self, way: list[Any], threads: int, max_length: int | None) -> dict[str, Any]:
        """Import what runs the model, then load it; time and memory count from after the imports."""
        importlib.import_module("tokenizers")
        chosen = Way(Path(way[0]), *way[1:])
        importlib.import_module(_LIBRARIES[read_model_folder(chosen).backend])
        forget_peak()
        memory = read_memory()
        self.level = memory.resident if memory else 0
        start = time.perf_counter()
        self.model = load_model(chosen, threads=threads, max_length=max_length, decisions="thresholds")
        self.logits([self.model.folder.example("a")])
        figures = {"load_seconds": time.perf_counter() - start, "thresholds": dict(self.model.decisions.thresholds)}
        return figures | {name: getattr(self.model.folder, name) for name in ("backend", "precision", "size_bytes")}

    def time(self, batches: Sequence[Sequence[Any]], batch_size: int = 1, repeats: int = 1) -> list[float]:
        """Time each call from text to logits, in length-sorted batches, as `predict` makes them."""
        seconds = []
        for texts in [*batches] * repeats:
            start = time.perf_counter()
            self.model.predict_logits(texts, batch_size=batch_size)
            seconds.append(time.perf_counter() - start)
        return seconds

    def logits(self, texts: Sequence[Any]) -> list[list[float]]:
        """Give logits whose usual decision is the one by the fitted thresholds."""
        model = self.model
        given: list[Any] = [Words(*one) if model.marks_entities and isinstance(one, list) else one for one in texts]
        found: list[list[float]] = model.shift(model.predict_logits(given)).tolist()
        return found

    def memory(self) -> int | None:
        memory = read_memory()
        return memory.high_water - self.level if memory else None
