"""What a model costs, the paper's two tables in its own form with our figures, and those of differences and runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdlora.config import ARMS as ALL_ARMS
from kdlora.evidence.records import RunRecord
from kdlora.evidence.stats import MeanSd, mean_sd
from kdlora.report.collect import Experiment, Run, headline_split
from kdlora.report.findings import Comparison, retention, retention_interval
from kdlora.report.page import Block, Cell, Figure, Link, Row, Table, strong
from kdlora.report.paper import ARMS, CLAIMS, COSTS, FAMILY_TITLES, Claim, family_of, published_scores
from kdlora.report.plots import Series, Style, arm_style, differences, score_against_cost
from kdlora.report.shipped import TEACHER
from kdlora.report.wording import (
    arm_title,
    cores_of,
    count,
    duration,
    interval_cell,
    metric_title,
    milliseconds,
    model_title,
    of_label,
    p_value,
    plus_minus,
    points,
    score_title,
    share,
    shown,
    signed,
    size,
)


@dataclass(frozen=True)
class Cost:
    """One thing that a model costs; the spread of a cost over seeds is in the table of runs."""

    title: str
    read: Callable[[RunRecord], float | None]
    write: Callable[[float | None], str]
    by_machine: bool = False

    def mean(self, runs: Sequence[Run]) -> float | None:
        values = [float(value) for run in runs if (value := self.read(run.record)) is not None]
        return float(np.mean(values)) if values else None

    def text(self, runs: Sequence[Run]) -> str:
        return self.write(self.mean(runs))

    def is_alike(self, *arms: Sequence[Run]) -> bool:
        """Say whether the arms' costs can be compared: runs may be of several machines, or numbers of threads."""
        records = [run.record for runs in arms for run in runs if self.read(run.record) is not None]
        machines = {
            (one.device, one.machine.get("cpu"), frozenset(timed.threads for timed in one.latency)) for one in records
        }
        return not self.by_machine or len(machines) < 2


def _latency(rows: int) -> Callable[[RunRecord], float | None]:
    return lambda record: next((one.p50_ms for one in record.latency if one.batch_size == rows), None)


TRAINABLE = Cost("trainable", lambda one: one.trainable_parameters, count)
ADAPTER = Cost("adapter", lambda one: one.adapter_parameters or None, count)
HEAD = Cost("head", lambda one: one.head_parameters, count)
PARAMETERS = Cost("in all", lambda one: one.total_parameters, count)
MEMORY = Cost("training memory", lambda one: one.peak_memory_bytes, size, by_machine=True)
TIME = Cost("latency, batch 1", _latency(1), milliseconds, by_machine=True)
TIME_OF_32 = Cost("batch 32", _latency(32), milliseconds, by_machine=True)
DISK = Cost("on disk", lambda one: one.size_bytes, size)
UNLIKE = " Times and memory are of several machines or numbers of threads: do not compare them between rows."


def saving(experiment: Experiment, cost: Cost, *, arm: str, than: str) -> float | None:
    """Compute how many per cent less an arm costs than another; None where that cannot be said."""
    runs = [experiment.finished(name) for name in (arm, than)]
    one, other = map(cost.mean, runs)
    return None if one is None or not other or not cost.is_alike(*runs) else 100 * (1 - one / other)


def cost_plots(
    groups: Sequence[tuple[str, Style, Sequence[Run]]], split: str, mark: str = "cost", suffix: str = ""
) -> list[Figure | None]:
    plots = []
    for name, cost, axis, unit in (
        ("parameters", PARAMETERS, "parameters in all (millions)", 1e6),
        ("latency", TIME, "median time of one text (ms)", 1.0),
    ):
        if not cost.is_alike(*(runs for _, _, runs in groups)):
            continue
        series = []
        for title, style, runs in groups:
            pairs = [(cost.read(run.record), run.score(split)) for run in runs]
            points = tuple((one / unit, score) for one, score in pairs if one is not None and score is not None)
            series.append(Series(title, style, points))
        score, title = f"score on {split} (0 to 100)", f"Score against {name}{suffix}"
        plots.append(score_against_cost(series, title=title, cost=axis, score=score, identity=f"{mark}-{name}"))
    return plots


SEEDS_NOTE = "Mean ± sample standard deviation over seeds; the small numbers are the seeds and lead to their records."
_COSTS = (TRAINABLE, ADAPTER, HEAD, PARAMETERS, MEMORY, TIME, TIME_OF_32, DISK)
_CLAIMED = {"total": PARAMETERS, "trainable": TRAINABLE, "memory_mb": MEMORY, "seconds": TIME}


def derived(text: str) -> Cell:
    """Make a cell of a figure that comes from several arms; it leads to the table of runs."""
    return Cell(text, (Link("runs", "#runs"),) if text != "–" else ())


def published_row(title: str, values: Sequence[float | None]) -> Row:
    return (Cell(f"paper, {title}" if title else "paper", quiet=True), *map(points, values))


def mean_of(values: Sequence[float | None]) -> float | None:
    """Average the rows of a column; None where one is missing, for means of other rows cannot be compared."""
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept and len(kept) == len(values) else None


def score_blocks(experiment: Experiment, comparisons: Sequence[Comparison], draws: int) -> list[Block | None]:
    paired = [(one.title, one.difference) for one in comparisons if one.difference is not None]
    return [
        _score_table(experiment),
        _claims_table(experiment, draws) if experiment.shows_paper else None,
        _difference_table(comparisons) if comparisons else None,
        differences(paired, "Differences with their intervals"),
    ]


def _score_table(experiment: Experiment) -> Table:
    """Show the arms' scores; of a GLUE task in the form of the paper's Table 1, with the paper's rows for the task."""
    ours = [arm for arm in ARMS if experiment.task.name or arm in experiment.arms]
    arms = [*ours, *(arm for arm in experiment.arms if arm not in ARMS)]
    score, task = experiment.task.metrics, experiment.task.name
    found = dict.fromkeys(name for run in experiment.runs for name in run.metrics(experiment.split))
    others = [name for name in found if name not in score and ":" not in name]  # beside the score's own, with groups
    title = strong("score, here" if task else "score")
    rows: list[Row] = [(title, *(_score_cell(experiment, arm) for arm in arms))]
    rows += [_metric_row(experiment, arms, name) for name in (*(score if len(score) > 1 else ()), *others)]
    published = [
        published_row(f"{FAMILY_TITLES[family]}{', ' if group else ''}{group}", [scores.get(arm) for arm in arms])
        for group in (("", "matched", "mismatched") if task == "mnli" else ("",))
        for family, scores in published_scores(f"{task}-{group}" if group else task).items()
    ]
    caption = f"Table 1. Score: {score_title(experiment.task)}, 0 to 100, {experiment.split} split"
    return Table(caption, ("", *map(arm_title, arms)), (*rows, *published), note=SEEDS_NOTE)


def _score_cell(experiment: Experiment, arm: str) -> Cell:
    if runs := experiment.finished(arm):
        return Cell(strong(plus_minus(experiment.score(arm))), experiment.links(runs))
    failed = [run for run in experiment.unfinished if run.record.arm == arm]
    if not failed:
        return Cell("–")
    return Cell("failed" if failed[0].record.status == "failed" else "not finished", experiment.links(failed))


def _metric_row(experiment: Experiment, arms: Sequence[str], name: str) -> Row:
    """Show one metric of every arm; fractions as per cent, errors as they are."""
    runs = [experiment.finished(arm) for arm in arms]
    found = [[value for run in own if (value := run.metrics(experiment.split).get(name)) is not None] for own in runs]
    scale, digits, unit = 100.0, 1, " (%)"
    if name.startswith(("mse", "mae")):
        least = min((value for values in found for value in values if value > 0), default=1.0)
        scale, digits, unit = 1.0, max(3, 2 - math.floor(math.log10(least))), ""
    cells = [Cell(f"{metric_title(of_label(name, experiment.task))}{unit}")]
    for own, values in zip(runs, found, strict=True):
        text = plus_minus(mean_sd(scale * value for value in values), digits)
        cells.append(Cell(text, experiment.links(own) if values else ()))
    return tuple(cells)


def cost_blocks(experiment: Experiment) -> list[Block | None]:
    groups = [(arm_title(arm), arm_style(arm), experiment.finished(arm)) for arm in experiment.arms]
    return [_cost_table(experiment), _asked_table(experiment), *cost_plots(groups, experiment.split)]


def _cost_table(experiment: Experiment) -> Table:
    rows: list[Row] = []
    for arm in experiment.arms:
        if runs := experiment.finished(arm):
            title = strong(arm_title(arm)) if arm == experiment.student_arm else arm_title(arm)
            seeds = Cell("" if len(runs) > 1 else str(runs[0].record.seed), experiment.links(runs))
            rows.append((model_title(runs[0].record.model), title, *(cost.text(runs) for cost in _COSTS), seeds))
    record = experiment.runs[0].record
    published = COSTS.get(family_of(record.teacher_model, record.student_model) or "", {})
    for arm, one in published.items():
        counts = (count(one.trainable[0]), "–", "–", count(one.total))
        measured = (f"{one.memory_mb:.1f} MB", f"{one.seconds:.2f} s", "–", "–", "–")
        rows.append((Cell(f"paper, {one.model}", quiet=True), arm_title(arm), *counts, *measured))
    threads = sorted({one.threads for run in experiment.runs for one in run.record.latency})
    note = f"{_hardware(experiment)}. Latency: median of the merged model's forward pass in fp32"
    note += f", {', '.join(map(str, threads))} thread{'s' * (threads != [1])}." if threads else "."
    note += "" if TIME.is_alike(experiment.runs) else UNLIKE
    if published:
        note += (
            " The paper: rank 8, one A100; its time is for CoLA’s whole validation set, its memory is that of the GPU."
        )
    columns = ("model", "method", *(cost.title for cost in _COSTS), "seeds")
    return Table("Table 2. Costs", columns, tuple(rows), text_columns=2, note=note, compact=True)


def _asked_table(experiment: Experiment) -> Table | None:
    asked = next((run.record.asked for run in experiment.runs if run.record.asked is not None), None)
    if asked is None:
        return None
    price = shown(asked.cost_per_million, ",.2f")
    rows = [_a_million(f"{model_title(asked.model)}, asked", experiment.score("fft"), asked.per_second, price)]
    arm, models = experiment.student_arm, experiment.shipped.benchmark.models
    if models:
        own = [model for model in models if model.name != TEACHER]
        rows += [_a_million(one.name, mean_sd([one.score]), one.texts_per_second) for one in own]
    elif arm is not None and (batch := TIME_OF_32.mean(experiment.finished(arm))):
        rows.append(_a_million(f"the student, {arm_title(arm)}", experiment.score(arm), 32_000 / batch))
    note = (
        f"Asked: {asked.timed:,} questions in a row, {asked.concurrency} at a time; the price is that of all "
        f"{asked.questions:,}, repetitions included. The student: on this machine."
    )
    columns = ("", f"score on {experiment.split}", "texts/s", "time of a million", "price of a million")
    return Table("A million texts", columns, tuple(rows), note=note)


def _a_million(name: str, score: MeanSd | None, per_second: float | None, price: str = "–") -> Row:
    rate = "–" if per_second is None else f"{per_second:,.3g}" if per_second < 100 else f"{per_second:,.0f}"
    return name, plus_minus(score), rate, duration(1e6 / per_second if per_second else None), price


def _hardware(experiment: Experiment) -> str:
    def told(record: RunRecord) -> str:
        format_ = f"trained in {record.precision}" if record.precision else ""
        machine = record.machine
        parts = [record.device or "unknown device", machine.get("cpu", ""), cores_of(machine), format_]
        return ", ".join(part for part in parts if part)

    runs = [run for run in experiment.runs if run.record.arm != "words"] or experiment.runs
    records = [run.record for run in runs if run.record.status == "finished"] or [runs[0].record]
    return "Measured on " + "; ".join(dict.fromkeys(map(told, records)))


def _claims_table(experiment: Experiment, draws: int) -> Table | None:
    arm = experiment.student_arm
    if arm is None:
        return None

    def here(claim: Claim) -> Cell:
        if claim.of == "score":
            reach = retention_interval(experiment, arm, claim.than, draws=draws)
            told = f" ({points(reach.low)} to {points(reach.high)}%)" if reach else ""
            return derived(plus_minus(retention(experiment, arm, claim.than), unit="%") + told)
        return derived(share(saving(experiment, _CLAIMED[claim.of], arm=arm, than=claim.than)))

    rows: list[Row] = []
    for claim in CLAIMS:
        in_tables = (f"{claim.in_tables(family):.0f}%" for family in FAMILY_TITLES)
        rows.append((claim.text, here(claim), f"{claim.stated}%", *in_tables))
    columns = ("claim", "here", "paper says", *(f"its tables, {title}" for title in FAMILY_TITLES.values()))
    note = (
        "Shares of score: each seed against the other arm’s mean, with a 95% interval over rows and seeds. "
        "Memory: peak of training here, of the GPU in the "
        "paper. Time: median latency of one text here, CoLA’s validation set in the paper. "
        "A minus means that it costs more."
    )
    return Table(f"The paper’s claims, its own tables, and {arm_title(arm)} here", columns, tuple(rows), note=note)


def compared(one: Comparison) -> tuple[str, str, str]:
    """Write a comparison as points, interval and p; where it was not paired, the reason stands for the interval."""
    if one.difference is None:
        return signed(one.plain) if one.plain == one.plain else "–", one.reason, "–"
    return signed(one.plain), interval_cell(one.difference), p_value(one.difference.p)


def _difference_table(comparisons: Sequence[Comparison]) -> Table:
    rows: list[Row] = []
    for one in comparisons:
        value, *rest = compared(one)
        found = one.difference
        counts = ("–", "–") if found is None else (str(found.n_examples), str(found.n_seeds))
        rows.append((one.title, derived(value), *rest, *counts))
    columns = ("difference", "points", "95% interval", "p", "examples", "seeds")
    draws = next((one.difference.draws for one in comparisons if one.difference), 0)
    note = f"{draws:,} draws over examples, for shared seeds; p is two-sided." if draws else ""
    return Table("Differences in score", columns, tuple(rows), note=note, side=True)


def arm_table(records: Sequence[RunRecord]) -> Table:
    split = headline_split(records)
    arms: dict[str, list[Run]] = {arm: [] for arm in ALL_ARMS if any(record.arm == arm for record in records)}
    for record in records:
        if record.status == "finished":
            arms[record.arm].append(Run(record, Path()))

    def score(arm: str) -> str:
        found = [value for run in arms[arm] if (value := run.score(split)) is not None]
        return plus_minus(mean_sd(found), 2) if found else "not available" if arms[arm] else "failed"

    columns: dict[str, Callable[[str], str]] = {
        "arm": str,
        "seeds": lambda arm: str(len(arms[arm])),
        "score": score,
        "trainable": lambda arm: TRAINABLE.text(arms[arm]),
        "in all": lambda arm: PARAMETERS.text(arms[arm]),
        "time of a text": lambda arm: TIME.text(arms[arm]),
    }
    unlike = "" if TIME.is_alike(*arms.values()) else "; times are of several machines or numbers of threads"
    return Table.of(f"score on the {split} split, 0 to 100{unlike}", arms, columns)


def run_table(experiment: Experiment) -> Table:
    def status(run: Run) -> str:
        one = run.record
        return f"failed: {one.error or 'no reason was recorded'}" if one.status == "failed" else one.status

    def name(run: Run) -> Cell:
        link = Link(run.record.arm, experiment.href(run.path))
        return Cell(f"{arm_title(run.record.arm)}, seed {run.record.seed}", (link,))

    return Table.of(
        "Every run; each leads to its record",
        experiment.runs,
        {
            "run": name,
            "model": lambda run: model_title(run.record.model),
            "status": status,
            "score": lambda run: points(run.score(experiment.split), 2),
            "epoch kept": lambda run: shown(run.record.best_epoch, "g"),
            "trainable": lambda run: TRAINABLE.text([run]),
            "memory": lambda run: MEMORY.text([run]),
            "training": lambda run: duration(run.record.train_seconds),
            "training texts/s": lambda run: shown(run.record.examples_per_second, ".0f"),
            "batch 1": lambda run: TIME.text([run]),
        },
        text_columns=3,
    )
