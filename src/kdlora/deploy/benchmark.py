"""Compare models side by side: latency, throughput, memory, size and score, each in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.deploy.benchmark_worker import ModelProcess
from kdlora.deploy.encode import Text, spread
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.gates import LabelledTexts
from kdlora.deploy.onnx_backend import default_threads
from kdlora.errors import ConfigError, DataError
from kdlora.report.shipped import BenchmarkResult, ModelFigures
from kdlora.system.environment import collect_versions, describe_machine

_WORDS = ("The", "film", "was", "a", "quiet", "and", "moving", "story")
_DEFAULT_TEXTS = [" ".join((_WORDS * 8)[:length]) for length in (4, 8, 12, 16, 24, 32, 48, 64)] * 16
_LATENCY_TEXTS = 100
_SEARCH_TEXTS = 256
_GRID = tuple(product((1, 8, 32), (16, 64, 128)))


def benchmark(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    texts: Sequence[Text] | LabelledTexts = (),
    *,
    max_length: int | None = None,
    threads: int | None = None,
    rounds: int = 3,
    batch_sizes: Sequence[int] = (8, 32, 64),
    grid: Sequence[tuple[int, int]] = _GRID,
    progress: Callable[[str], None] | None = None,
) -> BenchmarkResult:
    """Measure models side by side. In each round every model is timed in turn, so that drift hits all alike.

    Args:
        models: folders, or name to folder; an `.onnx` file chooses one of a folder's two.
        texts: what to classify; by default made-up texts of 4 to 64 words. A score needs labels and their task.
        max_length: longest input in tokens, for all models; by default each model's own.
        threads: of each model; by default `OMP_NUM_THREADS`, else one a core that this process may use.
        rounds: interleaved rounds.
        batch_sizes: tried for the best throughput.
        grid: (batch size, length in tokens) of single forward passes; those that a model cannot hold are left out.
        progress: called with a short sentence at each step.

    Returns:
        The figures of all models.

    Raises:
        ConfigError: no models, or settings that make no sense.
        ModelError: not a model folder, an adapter that is not merged, a model whose process ended.
        DataError: an empty text, labels without a task, or labels that do not fit.
    """
    named = models if isinstance(models, Mapping) else {str(path): path for path in models}
    if not named:
        raise ConfigError("benchmark: expected at least one model.")
    count = default_threads() if threads is None else threads
    if rounds < 1 or count < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError("benchmark: rounds, threads and batch sizes must be at least 1.")
    given = texts if isinstance(texts, LabelledTexts) else LabelledTexts(texts or _DEFAULT_TEXTS)
    if given.labels is not None and given.task is None:
        raise DataError("benchmark: labels need a task.")
    rows = given.checked_texts("text")
    for path in named.values():
        read_model_folder(path)
    say = progress or (lambda step: None)
    with contextlib.ExitStack() as stack:
        found = []
        for name, path in named.items():
            process = stack.enter_context(contextlib.closing(ModelProcess(name, count)))
            say(f"{name}: loading")
            facts = process.ask("load", folder=str(path), threads=count, max_length=max_length)
            found.append(_Model(name, str(path), process, facts))
        _time_models(found, rows, rounds, batch_sizes, say)
        for model in found:
            model.peak_memory_bytes = model.process.ask("memory")
            model.score = _score(model, given, rows)
        _time_grid(found, grid, say)
    figures = tuple(model.figures(len(rows)) for model in found)
    return BenchmarkResult(figures, count, rounds, len(rows), machine=describe_machine(), versions=collect_versions())


@dataclass
class _Model:
    """A model in its process, and what was found out about it so far."""

    name: str
    folder: str
    process: ModelProcess
    facts: dict[str, Any]
    batch_size: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds of single texts."""
    seconds: list[float] = field(default_factory=list)
    """Of all texts, a round each."""
    peak_memory_bytes: int | None = None
    score: float | None = None
    grid_ms: dict[str, float] = field(default_factory=dict)

    def time(self, batches: Sequence[Sequence[Text]], batch_size: int = 1) -> list[float]:
        """Time calls of the model, seconds each."""
        found: list[float] = self.process.ask("time", batches=batches, batch_size=batch_size)
        return found

    def figures(self, texts: int) -> ModelFigures:
        """Put the figures together."""
        p50, p95, p99 = (float(np.percentile(self.latencies, part)) * 1e3 for part in (50, 95, 99))
        return ModelFigures(
            name=self.name,
            backend=self.facts["backend"],
            precision=self.facts["precision"],
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            texts_per_second=texts / float(np.median(self.seconds)),
            batch_size=self.batch_size,
            load_seconds=self.facts["load_seconds"],
            size_bytes=self.facts["size_bytes"],
            folder=self.folder,
            peak_memory_bytes=self.peak_memory_bytes,
            score=self.score,
            grid_ms=self.grid_ms,
        )


def _time_models(
    models: Sequence[_Model], texts: list[Text], rounds: int, batch_sizes: Sequence[int], say: Callable[[str], None]
) -> None:
    """Find each model's best batch size, then time all models round by round."""
    some = spread(texts, _SEARCH_TEXTS)
    singles = [[text] for text in spread(texts, _LATENCY_TEXTS)]
    for model in models:
        say(f"{model.name}: warm-up and batch size")
        model.time(singles[:10])
        model.time([some[:64]], batch_sizes[0])
        model.batch_size = min((model.time([some], size), size) for size in batch_sizes)[1]
    for turn in range(rounds):
        for model in models:
            say(f"round {turn + 1} of {rounds}: {model.name}")
            model.latencies += model.time(singles)
            model.seconds += model.time([texts], model.batch_size)


def _time_grid(models: Sequence[_Model], grid: Sequence[tuple[int, int]], say: Callable[[str], None]) -> None:
    """Time each cell for all models before the next cell."""
    longest = min(model.facts["max_length"] for model in models)
    for size, length in grid:
        if length <= longest:
            say(f"batch {size} x length {length}")
            for model in models:
                model.grid_ms[f"{size}x{length}"] = model.process.ask("grid", batch_size=size, length=length)


def _score(model: _Model, given: LabelledTexts, texts: list[Text]) -> float | None:
    """Score a model by label name; one whose labels are others (an untrained base) has no score."""
    task, names = given.task, model.facts["label_names"]
    if given.labels is None or task is None or model.facts["kind"] != task.kind:
        return None
    if task.kind != "regression" and sorted(names) != sorted(task.label_names):
        return None
    logits = np.asarray(model.process.ask("logits", texts=texts))
    if task.kind != "regression":
        logits = logits[:, [names.index(name) for name in task.label_names]]
    return given.score(task, logits)
