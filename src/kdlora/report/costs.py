"""What a model costs: how each figure is read from a run's record, averaged over seeds, and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdlora.evidence.records import RunRecord
from kdlora.report.collect import Experiment, Run
from kdlora.report.page import Figure
from kdlora.report.plots import Series, Style, score_against_cost
from kdlora.report.wording import count, milliseconds, size


@dataclass(frozen=True)
class Cost:
    """One thing that a model costs; the spread of a cost over seeds is in the table of runs."""

    title: str
    read: Callable[[RunRecord], float | None]
    write: Callable[[float | None], str]

    def mean(self, runs: Sequence[Run]) -> float | None:
        """Average over the runs that measured it."""
        values = [float(value) for run in runs if (value := self.read(run.record)) is not None]
        return float(np.mean(values)) if values else None

    def text(self, runs: Sequence[Run]) -> str:
        """Write the average in its unit."""
        return self.write(self.mean(runs))


def _latency(rows: int) -> Callable[[RunRecord], float | None]:
    return lambda record: next((one.p50_ms for one in record.latency if one.batch_size == rows), None)


TRAINABLE = Cost("trainable", lambda one: one.trainable_parameters, count)
ADAPTER = Cost("adapter", lambda one: one.adapter_parameters or None, count)
HEAD = Cost("head", lambda one: one.head_parameters, count)
PARAMETERS = Cost("in all", lambda one: one.total_parameters, count)
MEMORY = Cost("training memory", lambda one: one.peak_memory_bytes, size)
TIME = Cost("latency, batch 1", _latency(1), milliseconds)
TIME_OF_32 = Cost("batch 32", _latency(32), milliseconds)
DISK = Cost("on disk", lambda one: one.size_bytes, size)


def saving(experiment: Experiment, cost: Cost, *, arm: str, than: str) -> float | None:
    """Compute how many per cent less an arm costs than another; None where either is unknown or the other is 0."""
    one, other = (cost.mean(experiment.finished(name)) for name in (arm, than))
    return None if one is None or not other else 100 * (1 - one / other)


def cost_plots(
    groups: Sequence[tuple[str, Style, Sequence[Run]]], split: str, mark: str, suffix: str = ""
) -> list[Figure | None]:
    """Draw the scores of named groups of runs against parameters, and against latency."""
    plots = []
    for name, cost, axis, unit in (
        ("parameters", PARAMETERS, "parameters in all (millions)", 1e6),
        ("latency", TIME, "median time of one text (ms)", 1.0),
    ):
        series = []
        for title, style, runs in groups:
            pairs = [(cost.read(run.record), run.score(split)) for run in runs]
            points = tuple((one / unit, score) for one, score in pairs if one is not None and score is not None)
            series.append(Series(title, style, points))
        score, title = f"score on {split} (0 to 100)", f"Score against {name}{suffix}"
        plots.append(score_against_cost(series, title=title, cost=axis, score=score, identity=f"{mark}-{name}"))
    return plots
