"""The paper's two tables in its own form with our figures, and the tables of differences and runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from kdlora.evidence.stats import mean_sd
from kdlora.report.answer import time_of_one, total_parameters, training_memory
from kdlora.report.blocks import Cell, Link, Table
from kdlora.report.collect import Experiment, Run
from kdlora.report.findings import Comparison, mean_cost, retention, saving
from kdlora.report.paper import COSTS, FAMILY_TITLES, claims, family_of, published_scores
from kdlora.report.wording import (
    INTERVALS,
    arm_title,
    count,
    duration,
    interval_cell,
    metric_title,
    milliseconds,
    model_title,
    over_seeds,
    p_value,
    plus_minus,
    score_title,
    share,
    signed,
    size,
)

_PAPER_ARMS = {"fft": "fft", "lora": "lora", "kd-lora": "kd_lora"}


@dataclass(frozen=True)
class Links:
    """Makes links that work from the folder in which the report lies.

    Attributes:
        base: the report's folder.
        runs: anchor of the section that lists the runs.
    """

    base: Path
    runs: str

    def file(self, path: Path) -> str:
        """Give a relative, encoded address."""
        return quote(Path(os.path.relpath(path.resolve(), self.base.resolve())).as_posix())

    def to(self, run: Run) -> Link:
        """Link to a run's record."""
        return Link(str(run.record.seed), self.file(run.path), f"{run.record.arm}, seed {run.record.seed}")

    def to_all(self, runs: Sequence[Run]) -> tuple[Link, ...]:
        """Link to the records of several runs."""
        return tuple(self.to(run) for run in runs)

    def derived(self, text: str) -> Cell:
        """Make a cell of a figure that comes from several arms; it leads to the table of runs."""
        return Cell(text, (Link("runs", f"#{self.runs}"),) if text != "–" else ())


def score_table(experiment: Experiment, links: Links) -> Table:
    """Show the arms' scores in the form of the paper's Table 1, with the paper's rows for the same task."""
    arms = _shown_arms(experiment)
    rows = [(Cell("score, here", strong=True), *(_score_cell(experiment, arm, links) for arm in arms))]
    names = experiment.task.metrics if len(experiment.task.metrics) > 1 else ()
    rows += [_metric_row(experiment, arms, name, links) for name in (*names, *_other_metrics(experiment))]
    published = _published_rows(experiment.task.name, arms)
    first_quiet = len(rows)
    rows += published
    note = "Mean ± sample standard deviation over seeds; the small numbers are the seeds and lead to their records."
    if not published:
        note += " The paper has no figures for this task."
    caption = f"Table 1. Score: {score_title(experiment.task.metrics)}, 0 to 100, {experiment.split} split"
    quiet = frozenset(range(first_quiet, len(rows)))
    columns = ("", *(arm_title(arm) for arm in arms))
    return Table(caption, columns, tuple(rows), frozenset(range(1, len(columns))), quiet, note)


def _shown_arms(experiment: Experiment) -> list[str]:
    """List the paper's three methods, then the other arms of the experiment."""
    return [*_PAPER_ARMS, *(arm for arm in experiment.arms if arm not in _PAPER_ARMS)]


def _score_cell(experiment: Experiment, arm: str, links: Links) -> Cell:
    """Give an arm's score with its runs, or say that it failed."""
    runs = experiment.finished(arm)
    if runs:
        return Cell(plus_minus(experiment.score(arm)), links.to_all(runs), strong=True)
    failed = [run for run in experiment.unfinished() if run.record.arm == arm]
    if not failed:
        return Cell("–")
    return Cell("failed" if failed[0].record.status == "failed" else "not finished", links.to_all(failed))


def _other_metrics(experiment: Experiment) -> list[str]:
    """List the metrics that are reported beside the score's own, groups included."""
    names = [name for run in experiment.runs for name in _metrics(experiment, run)]
    return [name for name in dict.fromkeys(names) if name not in experiment.task.metrics]


def _metrics(experiment: Experiment, run: Run) -> dict[str, float | None]:
    """Give a run's metrics on the headline's split."""
    return run.record.test_metrics if experiment.split == "test" else run.record.metrics


def _metric_row(experiment: Experiment, arms: Sequence[str], name: str, links: Links) -> tuple[Cell, ...]:
    """Show one metric of every arm; fractions as per cent, errors as they are."""
    is_error = name.startswith(("mse", "mae"))
    cells = [Cell(f"{metric_title(name)}{'' if is_error else ' (%)'}")]
    for arm in arms:
        runs = experiment.finished(arm)
        values = [value for run in runs if (value := _metrics(experiment, run).get(name)) is not None]
        if not values:
            cells.append(Cell("–"))
            continue
        over = mean_sd([one if is_error else 100 * one for one in values])
        cells.append(Cell(plus_minus(over, 3 if is_error else 1), links.to_all(runs)))
    return tuple(cells)


def _published_rows(task: str, arms: Sequence[str]) -> list[tuple[Cell, ...]]:
    """Give the paper's figures for a GLUE task; MNLI has its two groups as well."""
    parts = (
        [(task, "")]
        if task != "mnli"
        else [("mnli", ""), ("mnli-matched", ", matched"), ("mnli-mismatched", ", mismatched")]
    )
    rows = []
    for part, suffix in parts:
        for family, figures in published_scores(part).items():
            values = [f"{getattr(figures, _PAPER_ARMS[arm]):.1f}" if arm in _PAPER_ARMS else "–" for arm in arms]
            rows.append((Cell(f"paper, {FAMILY_TITLES[family]}{suffix}"), *map(Cell, values)))
    return rows


def cost_table(experiment: Experiment, links: Links) -> Table:
    """Show the arms' costs in the form of the paper's Table 2, with the paper's rows for the same models."""
    columns = (
        "model",
        "method",
        "trainable",
        "adapter",
        "head",
        "in all",
        "training memory",
        "latency, batch 1",
        "batch 32",
        "on disk",
        "seeds",
    )
    rows = [_cost_row(experiment, arm, links) for arm in experiment.arms if experiment.finished(arm)]
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
    quiet = frozenset(range(len(rows), len(rows) + len(published)))
    numeric = frozenset(range(2, len(columns)))
    return Table("Table 2. Costs", columns, (*rows, *published), numeric, quiet, note, compact=True)


def _cost_row(experiment: Experiment, arm: str, links: Links) -> tuple[Cell, ...]:
    """Show the mean costs of one arm."""
    runs = experiment.finished(arm)

    def cell(read: Callable[[Run], float | None], write: Callable[[float | None], str]) -> Cell:
        return Cell(over_seeds(mean_cost(runs, read), write))

    return (
        Cell(model_title(runs[0].record.model)),
        Cell(arm_title(arm), strong=arm == experiment.student_arm),
        cell(lambda run: run.record.trainable_parameters, count),
        cell(lambda run: run.record.adapter_parameters or None, count),
        cell(lambda run: run.record.head_parameters, count),
        cell(total_parameters, count),
        cell(training_memory, size),
        cell(time_of_one, milliseconds),
        cell(lambda run: run.latency_ms(32), milliseconds),
        cell(lambda run: run.record.size_bytes, size),
        Cell("", links.to_all(runs)) if len(runs) > 1 else Cell(str(runs[0].record.seed), links.to_all(runs)),
    )


def _published_costs(family: str) -> list[tuple[Cell, ...]]:
    """Give the paper's Table 2 for a family."""
    costs = COSTS[family]
    rows = []
    for place, method in enumerate(("FFT", "LoRA", "KD-LoRA")):
        model = costs.student if method == "KD-LoRA" else costs.teacher
        total = costs.total[1 if method == "KD-LoRA" else 0]
        texts = [f"paper, {model}", method, count(costs.trainable[place]), "–", "–", count(total)]
        texts += [f"{costs.memory_mb[place]:.1f} MB", f"{costs.seconds[place]:.2f} s", "–", "–", "–"]
        rows.append(tuple(map(Cell, texts)))
    return rows


def _hardware(experiment: Experiment) -> str:
    """Say what the costs were measured on."""
    runs = [run for run in experiment.runs if run.record.arm != "words"] or experiment.runs
    record = next((run.record for run in runs if run.record.status == "finished"), runs[0].record)
    machine = record.machine
    parts = [record.device or "unknown device", machine.get("cpu", ""), record.precision]
    cores = f"{machine['cores']} cores" if "cores" in machine else ""
    return "Measured on " + ", ".join(part for part in (*parts, cores) if part)


def claims_table(experiment: Experiment, links: Links) -> Table | None:
    """Hold the paper's headline claims against its own tables and against this experiment."""
    arm = experiment.student_arm
    if arm is None:
        return None
    here = _our_claims(experiment, arm)
    rows = []
    for claim in claims():
        shown = [f"{claim.tables[family]:.0f}%" for family in FAMILY_TITLES]
        rows.append((Cell(claim.text), links.derived(here[claim.key]), Cell(f"{claim.stated:.0f}%"), *map(Cell, shown)))
    columns = ("claim", "here", "paper says", *(f"its tables, {title}" for title in FAMILY_TITLES.values()))
    caption = f"The paper’s claims, its own tables, and {arm_title(arm)} here"
    note = (
        "Shares of score: each seed against the other arm’s mean. Memory: peak of training here, of the GPU in the "
        "paper. Time: median latency of one text here, CoLA’s validation set in the paper. "
        "A minus means that it costs more."
    )
    return Table(caption, columns, tuple(rows), frozenset(range(1, 6)), note=note)


def _our_claims(experiment: Experiment, arm: str) -> dict[str, str]:
    """Compute this experiment's figures for the paper's claims, "–" where an arm is missing."""

    def saved(read: Callable[[Run], float | None], than: str) -> str:
        return share(saving(experiment, read, arm=arm, than=than))

    def trainable(run: Run) -> float | None:
        return run.record.trainable_parameters

    return {
        "kept-fft": plus_minus(retention(experiment, arm, "fft"), unit="%"),
        "kept-lora": plus_minus(retention(experiment, arm, "lora"), unit="%"),
        "total": saved(total_parameters, "fft"),
        "trainable-fft": saved(trainable, "fft"),
        "trainable-lora": saved(trainable, "lora"),
        "memory-fft": saved(training_memory, "fft"),
        "memory-lora": saved(training_memory, "lora"),
        "time": saved(time_of_one, "fft"),
    }


def difference_table(comparisons: Sequence[Comparison], links: Links, caption: str) -> Table:
    """List differences with intervals, p and n."""
    rows = []
    for one in comparisons:
        found = one.difference
        if found is None:
            cells = [links.derived(signed(one.plain)), Cell(one.reason), Cell("–"), Cell("–"), Cell("–")]
        else:
            texts = (interval_cell(found), p_value(found.p), str(found.n_examples), str(found.n_seeds))
            cells = [links.derived(signed(found.difference)), *map(Cell, texts)]
        rows.append((Cell(one.title), *cells))
    columns = ("difference", "points", "95% interval", "p", "examples", "seeds")
    draws = next((one.difference.draws for one in comparisons if one.difference), 0)
    note = f"{draws:,} draws over examples; p is two-sided. {INTERVALS}" if draws else ""
    return Table(caption, columns, tuple(rows), frozenset(range(1, 6)), note=note, side=True)


def run_table(experiment: Experiment, links: Links) -> Table:
    """List every run with its figures, failed ones too."""
    columns = ("run", "model", "status", "score", "best epoch", "trainable", "memory", "training", "texts/s", "batch 1")
    rows = tuple(_run_row(experiment, run, links) for run in experiment.runs)
    caption = "Every run; each leads to its record"
    return Table(caption, columns, rows, frozenset(range(3, len(columns))))


def _run_row(experiment: Experiment, run: Run, links: Links) -> tuple[Cell, ...]:
    """Show one run."""
    record, score = run.record, run.score(experiment.split)
    link = Link(record.arm, links.file(run.path))
    status = record.status if record.status != "failed" else f"failed: {record.error or 'no reason was recorded'}"
    speed = record.examples_per_second
    texts = (
        "–" if score is None else signed(score, 2, plus=False),
        "–" if record.best_epoch is None else f"{record.best_epoch:g}",
        count(record.trainable_parameters),
        size(record.peak_memory_bytes),
        duration(record.train_seconds),
        "–" if speed is None else f"{speed:.0f}",
        milliseconds(run.latency_ms(1)),
    )
    head = Cell(f"{arm_title(record.arm)}, seed {record.seed}", (link,))
    return (head, Cell(model_title(record.model)), Cell(status), *map(Cell, texts))
