"""Compare models side by side: latency, throughput, memory, size and score, each in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.data.tasks import Task
from kdlora.deploy.benchmark_worker import ModelProcess, model_process
from kdlora.deploy.encode import Text, check_text, spread
from kdlora.deploy.folder import Precision, read_model_folder
from kdlora.deploy.predict import default_threads
from kdlora.errors import ConfigError, DataError
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.report.shipped import BenchmarkResult, ModelFigures
from kdlora.system.environment import collect_versions, describe_machine

Progress = Callable[[str], None]

DEFAULT_TEXTS = (
    tuple(
        " ".join(
            ["The", "film", "was", "a", "quiet", "and", "moving", "story"][position % 8] for position in range(length)
        )
        for length in (4, 8, 12, 16, 24, 32, 48, 64)
    )
    * 16
)
"""Texts of mixed lengths for a benchmark without data."""
_LATENCY_TEXTS = 100
_SEARCH_TEXTS = 256
_GRID_REPEATS = 3


def benchmark(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    texts: Sequence[Text] = (),
    *,
    labels: Sequence[Any] | np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    task: Task | None = None,
    precision: Precision = "auto",
    max_length: int | None = None,
    threads: int | None = None,
    rounds: int = 3,
    batch_sizes: Sequence[int] = (8, 32, 64),
    grid_batches: Sequence[int] = (1, 8, 32),
    grid_lengths: Sequence[int] = (16, 64, 128),
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure models side by side. In each round every model is timed in turn, so that drift hits all alike.

    Args:
        models: folders, or name to folder; an `.onnx` file chooses one of a folder's two.
        texts: what to classify; by default made-up texts of 4 to 64 words.
        labels: of `texts`; without them no score is computed.
        groups: of `texts` (MNLI).
        task: what is scored; needed with labels.
        precision: which ONNX file of a folder that has several.
        max_length: longest input in tokens, for all models; by default each model's own.
        threads: of each model; by default `OMP_NUM_THREADS`, else one a core that this process may use.
        rounds: interleaved rounds.
        batch_sizes: tried for the best throughput.
        grid_batches: batch sizes of the grid; empty for no grid.
        grid_lengths: lengths of the grid in tokens; those that a model cannot hold are left out.
        progress: called with a short sentence at each step.

    Returns:
        The figures of all models.

    Raises:
        ConfigError: no models, or settings that make no sense.
        ModelError: not a model folder, an adapter that is not merged, a model whose process ended.
        DataError: an empty text, labels without a task, or labels that do not fit.
    """
    named = _name_models(models)
    count = default_threads() if threads is None else threads
    if rounds < 1 or count < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError("benchmark: rounds, threads and batch sizes must be at least 1.")
    if labels is not None and (task is None or len(labels) != len(texts)):
        raise DataError("benchmark: labels need a task, and one label for each text.")
    rows = [check_text(text, f"text {row}") for row, text in enumerate(texts or DEFAULT_TEXTS)]
    for path in named.values():
        read_model_folder(path, precision=precision)
    say = progress or (lambda step: None)
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(model_process(name, count)) for name in named}
        facts = {name: _load(workers[name], path, count, precision, max_length, say) for name, path in named.items()}
        timed = _time_models(workers, rows, rounds, batch_sizes, say)
        for name, worker in workers.items():
            timed[name]["peak_memory_bytes"] = worker.ask("memory")
            timed[name]["score"] = None
            if labels is not None and task is not None:
                timed[name]["score"] = _score(worker, facts[name], task, rows, np.asarray(labels), groups)
        longest = min(fact["max_length"] for fact in facts.values())
        grids = _time_grid(workers, grid_batches, [length for length in grid_lengths if length <= longest], say)
    figures = [_figures(name, path, facts[name], timed[name], grids[name]) for name, path in named.items()]
    return BenchmarkResult(
        tuple(figures), count, rounds, len(rows), machine=describe_machine(), versions=collect_versions()
    )


def _load(
    worker: ModelProcess, path: Path, threads: int, precision: Precision, max_length: int | None, say: Progress
) -> dict[str, Any]:
    """Load a model in its process and give what it says about itself."""
    say(f"{worker.name}: loading")
    facts: dict[str, Any] = worker.ask(
        "load", folder=str(path), threads=threads, precision=precision, max_length=max_length
    )
    return facts


def _figures(
    name: str, path: Path, facts: Mapping[str, Any], timed: Mapping[str, Any], grid: dict[str, float]
) -> ModelFigures:
    """Join what was found out about one model."""
    return ModelFigures(
        name=name,
        folder=str(path),
        backend=facts["backend"],
        precision=facts["precision"],
        load_seconds=facts["load_seconds"],
        size_bytes=facts["size_bytes"],
        grid_ms=grid,
        **timed,
    )


def _time_models(
    workers: Mapping[str, ModelProcess], texts: list[Text], rounds: int, batch_sizes: Sequence[int], say: Progress
) -> dict[str, dict[str, Any]]:
    """Find each model's best batch size, then time all models round by round."""
    some = spread(texts, _SEARCH_TEXTS)
    singles = spread(texts, _LATENCY_TEXTS)
    best: dict[str, int] = {}
    for name, worker in workers.items():
        say(f"{name}: warm-up and batch size")
        worker.ask("latency", texts=singles[:10])
        worker.ask("throughput", texts=some[:64], batch_size=batch_sizes[0])
        tried = [(worker.ask("throughput", texts=some, batch_size=size), size) for size in batch_sizes]
        best[name] = min(tried)[1]
    latencies: dict[str, list[float]] = {name: [] for name in workers}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds):
        for name, worker in workers.items():
            say(f"round {turn + 1} of {rounds}: {name}")
            latencies[name] += worker.ask("latency", texts=singles)
            seconds[name].append(worker.ask("throughput", texts=texts, batch_size=best[name]))
    return {
        name: {
            "p50_ms": float(np.percentile(latencies[name], 50)),
            "p95_ms": float(np.percentile(latencies[name], 95)),
            "p99_ms": float(np.percentile(latencies[name], 99)),
            "texts_per_second": len(texts) / float(np.median(seconds[name])),
            "batch_size": best[name],
        }
        for name in workers
    }


def _time_grid(
    workers: Mapping[str, ModelProcess], batches: Sequence[int], lengths: Sequence[int], say: Progress
) -> dict[str, dict[str, float]]:
    """Time each cell for all models before the next cell."""
    grids: dict[str, dict[str, float]] = {name: {} for name in workers}
    for size in batches:
        for length in lengths:
            say(f"batch {size} x length {length}")
            for name, worker in workers.items():
                cell = worker.ask("grid", batch_size=size, length=length, repeats=_GRID_REPEATS)
                grids[name][f"{size}x{length}"] = cell
    return grids


def _score(
    worker: ModelProcess,
    facts: Mapping[str, Any],
    task: Task,
    texts: list[Text],
    labels: np.ndarray,
    groups: Sequence[str] | None,
) -> float | None:
    """Score a model by label name; one whose labels are others (an untrained base) has no score."""
    if facts["kind"] != task.kind:
        return None
    found = facts["label_names"]
    if task.kind != "regression" and sorted(found) != sorted(task.label_names):
        return None
    logits = np.asarray(worker.ask("logits", texts=texts))
    if task.kind != "regression":
        logits = logits[:, [found.index(name) for name in task.label_names]]
    try:
        return score(task, compute_metrics(task, logits, labels, groups))
    except ValueError as error:
        raise DataError(f"the labels do not fit the {task.kind} task: {error}") from None


def _name_models(models: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Name each model by its path, as short as tells them apart."""
    if isinstance(models, Mapping):
        named = {name: Path(path) for name, path in models.items()}
    else:
        named = {str(path): Path(path) for path in models}
    if not named:
        raise ConfigError("benchmark: expected at least one model.")
    return named
