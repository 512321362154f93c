"""The picture of a benchmark: score, or throughput, against latency, size and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdlora.deploy.benchmark import BenchmarkResult, ModelFigures
from kdlora.evidence.storage import atomic_file


def plot_benchmark(result: BenchmarkResult, to: str | Path) -> None:
    """Draw one panel each for latency, size and memory, with a labelled point for each model.

    Args:
        result: of `benchmark`.
        to: image file; the format follows its extension.
    """
    from matplotlib.figure import Figure

    scored = all(model.score is not None for model in result.models)
    panels: list[tuple[str, Callable[[ModelFigures], float]]] = [
        ("latency of one text, p50, ms", lambda model: model.p50_ms),
        ("size on disk, MB", lambda model: model.size_bytes / 1e6),
    ]
    if all(model.peak_memory_bytes for model in result.models):
        panels.append(("peak memory, MB", lambda model: (model.peak_memory_bytes or 0) / 1e6))
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (label, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for model in result.models:
            height = model.score if scored and model.score is not None else model.texts_per_second
            axes.scatter([value(model)], [height], s=36)
            axes.annotate(model.name, (value(model), height), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("score" if scored else "texts per second")
        axes.margins(0.25)
        axes.grid(alpha=0.3)
    path = Path(to)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)
