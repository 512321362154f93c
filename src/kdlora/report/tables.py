"""The paper's two tables in its own form with our figures, and the tables of differences and runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from kdlora.evidence.stats import mean_sd
from kdlora.report.collect import Experiment, Run
from kdlora.report.costs import ADAPTER, DISK, HEAD, MEMORY, PARAMETERS, TIME, TIME_OF_32, TRAINABLE, Cost, saving
from kdlora.report.findings import Comparison, retention
from kdlora.report.page import Cell, Link, Row, Table, strong
from kdlora.report.paper import ARMS, CLAIMS, COSTS, FAMILY_TITLES, Claim, family_of, published_scores
from kdlora.report.wording import (
    INTERVALS,
    arm_title,
    count,
    duration,
    interval_cell,
    metric_title,
    model_title,
    p_value,
    plus_minus,
    points,
    score_title,
    share,
    signed,
)

SEEDS_NOTE = "Mean ± sample standard deviation over seeds; the small numbers are the seeds and lead to their records."


@dataclass(frozen=True)
class Links:
    """Makes links that work from the folder in which the report lies; `runs` is the anchor of the table of runs."""

    base: Path
    runs: str

    def file(self, path: Path) -> str:
        """Give a relative, encoded address."""
        return quote(Path(os.path.relpath(path.resolve(), self.base.resolve())).as_posix())

    def to_all(self, runs: Sequence[Run]) -> tuple[Link, ...]:
        """Link to the records of several runs."""
        return tuple(
            Link(str(run.record.seed), self.file(run.path), f"{run.record.arm}, seed {run.record.seed}") for run in runs
        )

    def derived(self, text: str) -> Cell:
        """Make a cell of a figure that comes from several arms; it leads to the table of runs."""
        return Cell(text, (Link("runs", f"#{self.runs}"),) if text != "–" else ())


def score_table(experiment: Experiment, links: Links) -> Table:
    """Show the arms' scores in the form of the paper's Table 1, with the paper's rows for the same task."""
    arms = [*ARMS, *(arm for arm in experiment.arms if arm not in ARMS)]
    score = experiment.task.metrics
    found = dict.fromkeys(name for run in experiment.runs for name in _metrics(experiment, run))
    others = [name for name in found if name not in score]  # beside the score's own, groups included
    rows: list[Row] = [(Cell(strong("score, here")), *(_score_cell(experiment, arm, links) for arm in arms))]
    rows += [_metric_row(experiment, arms, name, links) for name in (*(score if len(score) > 1 else ()), *others)]
    published = _published_rows(experiment.task.name, arms)
    note = SEEDS_NOTE if published else f"{SEEDS_NOTE} The paper has no figures for this task."
    caption = f"Table 1. Score: {score_title(score)}, 0 to 100, {experiment.split} split"
    return Table(caption, ("", *map(arm_title, arms)), (*rows, *published), note=note)


def _score_cell(experiment: Experiment, arm: str, links: Links) -> Cell:
    runs = experiment.finished(arm)
    if runs:
        return Cell(strong(plus_minus(experiment.score(arm))), links.to_all(runs))
    failed = [run for run in experiment.unfinished if run.record.arm == arm]
    if not failed:
        return Cell("–")
    return Cell("failed" if failed[0].record.status == "failed" else "not finished", links.to_all(failed))


def _metrics(experiment: Experiment, run: Run) -> dict[str, float | None]:
    return run.record.test_metrics if experiment.split == "test" else run.record.metrics


def _metric_row(experiment: Experiment, arms: Sequence[str], name: str, links: Links) -> Row:
    """Show one metric of every arm; fractions as per cent, errors as they are."""
    is_error = name.startswith(("mse", "mae"))
    scale, digits, unit = (1, 3, "") if is_error else (100, 1, " (%)")
    cells = [Cell(f"{metric_title(name)}{unit}")]
    for arm in arms:
        runs = experiment.finished(arm)
        values = [scale * value for run in runs if (value := _metrics(experiment, run).get(name)) is not None]
        cells.append(Cell(plus_minus(mean_sd(values), digits), links.to_all(runs)) if values else Cell("–"))
    return tuple(cells)


def _published_rows(task: str, arms: Sequence[str]) -> list[Row]:
    """Give the paper's figures for a GLUE task; MNLI has its two groups as well."""
    groups = ("", "matched", "mismatched") if task == "mnli" else ("",)
    return [
        published_row(f"{FAMILY_TITLES[family]}{', ' if group else ''}{group}", [scores.get(arm) for arm in arms])
        for group in groups
        for family, scores in published_scores(f"{task}-{group}" if group else task).items()
    ]


def cost_table(experiment: Experiment, links: Links) -> Table:
    """Show the arms' costs in the form of the paper's Table 2, with the paper's rows for the same models."""
    costs = (TRAINABLE, ADAPTER, HEAD, PARAMETERS, MEMORY, TIME, TIME_OF_32, DISK)
    rows = [_cost_row(experiment, arm, costs, links) for arm in experiment.arms if experiment.finished(arm)]
    record = experiment.runs[0].record
    family = family_of(record.teacher_model, record.student_model)
    published = _published_costs(family) if family else []
    threads = sorted({one.threads for run in experiment.runs for one in run.record.latency})
    note = f"{_hardware(experiment)}. Latency: median of the merged model's forward pass"
    note += f", {', '.join(map(str, threads))} threads." if threads else "."
    if published:
        note += (
            " The paper: rank 8, one A100; its time is for CoLA’s whole validation set, its memory is that of the GPU."
        )
    columns = ("model", "method", *(cost.title for cost in costs), "seeds")
    return Table("Table 2. Costs", columns, (*rows, *published), text_columns=2, note=note, compact=True)


def _cost_row(experiment: Experiment, arm: str, costs: Sequence[Cost], links: Links) -> Row:
    runs = experiment.finished(arm)
    return (
        model_title(runs[0].record.model),
        strong(arm_title(arm)) if arm == experiment.student_arm else arm_title(arm),
        *(cost.text(runs) for cost in costs),
        Cell("" if len(runs) > 1 else str(runs[0].record.seed), links.to_all(runs)),
    )


def _published_costs(family: str) -> list[Row]:
    return [
        (
            Cell(f"paper, {one.model}", quiet=True),
            *(arm_title(arm), count(one.trainable[0]), "–", "–", count(one.total)),
            *(f"{one.memory_mb:.1f} MB", f"{one.seconds:.2f} s", "–", "–", "–"),
        )
        for arm, one in COSTS[family].items()
    ]


def _hardware(experiment: Experiment) -> str:
    runs = [run for run in experiment.runs if run.record.arm != "words"] or experiment.runs
    record = next((run.record for run in runs if run.record.status == "finished"), runs[0].record)
    machine = record.machine
    cores = f"{machine['cores']} cores" if "cores" in machine else ""
    parts = [record.device or "unknown device", machine.get("cpu", ""), record.precision, cores]
    return "Measured on " + ", ".join(part for part in parts if part)


def claims_table(experiment: Experiment, links: Links) -> Table | None:
    """Hold the paper's headline claims against its own tables and against this experiment."""
    arm = experiment.student_arm
    if arm is None:
        return None

    costs = {"total": PARAMETERS, "trainable": TRAINABLE, "memory_mb": MEMORY, "seconds": TIME}

    def here(claim: Claim) -> str:
        if claim.of == "score":
            return plus_minus(retention(experiment, arm, claim.than), unit="%")
        return share(saving(experiment, costs[claim.of], arm=arm, than=claim.than))

    rows: tuple[Row, ...] = tuple(
        (
            claim.text,
            links.derived(here(claim)),
            f"{claim.stated}%",
            *(f"{claim.in_tables(family):.0f}%" for family in FAMILY_TITLES),
        )
        for claim in CLAIMS
    )
    columns = ("claim", "here", "paper says", *(f"its tables, {title}" for title in FAMILY_TITLES.values()))
    note = (
        "Shares of score: each seed against the other arm’s mean. Memory: peak of training here, of the GPU in the "
        "paper. Time: median latency of one text here, CoLA’s validation set in the paper. "
        "A minus means that it costs more."
    )
    return Table(f"The paper’s claims, its own tables, and {arm_title(arm)} here", columns, rows, note=note)


def difference_table(comparisons: Sequence[Comparison], links: Links) -> Table:
    """List differences with intervals, p and n."""
    rows: list[Row] = []
    for one in comparisons:
        found = one.difference
        figures = (one.reason, "–", "–", "–")
        if found is not None:
            figures = (interval_cell(found), p_value(found.p), str(found.n_examples), str(found.n_seeds))
        rows.append((one.title, links.derived(signed(one.plain)), *figures))
    columns = ("difference", "points", "95% interval", "p", "examples", "seeds")
    draws = next((one.difference.draws for one in comparisons if one.difference), 0)
    note = f"{draws:,} draws over examples; p is two-sided. {INTERVALS}" if draws else ""
    return Table("Differences in score", columns, tuple(rows), note=note, side=True)


def run_table(experiment: Experiment, links: Links) -> Table:
    """List every run with its figures, failed ones too."""
    columns = ("run", "model", "status", "score", "best epoch", "trainable", "memory", "training", "texts/s", "batch 1")
    rows = tuple(_run_row(experiment, run, links) for run in experiment.runs)
    return Table("Every run; each leads to its record", columns, rows, text_columns=3)


def _run_row(experiment: Experiment, run: Run, links: Links) -> Row:
    record, speed = run.record, run.record.examples_per_second
    return (
        Cell(f"{arm_title(record.arm)}, seed {record.seed}", (Link(record.arm, links.file(run.path)),)),
        model_title(record.model),
        record.status if record.status != "failed" else f"failed: {record.error or 'no reason was recorded'}",
        points(run.score(experiment.split), 2),
        "–" if record.best_epoch is None else f"{record.best_epoch:g}",
        TRAINABLE.text([run]),
        MEMORY.text([run]),
        duration(record.train_seconds),
        "–" if speed is None else f"{speed:.0f}",
        TIME.text([run]),
    )


def published_row(title: str, values: Sequence[float | None]) -> Row:
    """Show figures of the paper below ours."""
    return (Cell(f"paper, {title}" if title else "paper", quiet=True), *map(points, values))


def mean_of(values: Sequence[float | None]) -> float | None:
    """Average the rows of a column; None where one is missing, for means of other rows cannot be compared."""
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept and len(kept) == len(values) else None


def joint_table(experiments: Sequence[Experiment], base: Path) -> Table:
    """Show all experiments in the form of the paper's Table 1, with the mean where every cell is filled."""
    arms = [*ARMS, *sorted({arm for one in experiments for arm in one.arms} - set(ARMS))]
    rows: list[Row] = []
    for number, one in enumerate(experiments, start=1):
        links = Links(base, f"e{number}-runs")
        cells = [Cell(plus_minus(one.score(arm)), links.to_all(one.finished(arm))) for arm in arms]
        kept = retention(one, one.student_arm, "fft") if one.student_arm else None
        rows.append((one.name, *cells, links.derived(plus_minus(kept, unit="%"))))
    if len({one.task.name or one.name for one in experiments}) == len(experiments):
        ours = [[score.mean if (score := one.score(arm)) else None for one in experiments] for arm in arms]
        rows.append((strong("mean"), *(strong(points(mean_of(column))) for column in ours), ""))
        if all(one.task.name for one in experiments):
            theirs = [published_scores(one.task.name).get("bert", {}) for one in experiments]
            means = [mean_of([scores.get(arm) for scores in theirs]) for arm in arms]
            rows.append((*published_row("BERT, same tasks", means), "–"))
    columns = ("experiment", *map(arm_title, arms), "kept of FFT")
    return Table("Scores, 0 to 100", columns, tuple(rows), note=SEEDS_NOTE)
