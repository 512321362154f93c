"""The pages and files of a suite: Tables 1 and 2 in the paper's form, curves, configurations, failures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlora.config import LORA_ARMS
from kdlora.evidence.records import RunRecord
from kdlora.experiment.figures import Figure, SuiteFigures, SuiteRow, retention, settings_text
from kdlora.experiment.plan import Plan, PlannedRun
from kdlora.report.costs import HEAD, MEMORY, TIME, TIME_OF_32, Cost
from kdlora.report.findings import CONTROLS
from kdlora.report.page import (
    Block,
    Cell,
    Link,
    Page,
    Paragraph,
    Prose,
    Row,
    Section,
    Table,
    strong,
    to_csv,
    to_latex,
    write_page,
)
from kdlora.report.paper import COSTS, RANKS
from kdlora.report.plots import Curve, arm_style, learning_curves
from kdlora.report.tables import Links, mean_of, published_row
from kdlora.report.wording import INTERVALS, arm_title, count, interval_cell, model_title, points, signed
from kdlora.system.storage import write_text_atomic

Runs = list[tuple[PlannedRun, RunRecord]]


def write_tables(plan: Plan, root: Path, records: Mapping[str, RunRecord]) -> tuple[Path, ...]:
    """Write the suite's tables: `suite.md`, `suite.html`, and Tables 1 and 2 and all runs as CSV and LaTeX."""
    figures, links = SuiteFigures(plan, records, root), Links(root, "runs")
    scores, costs = _score_table(figures, links), _cost_table(figures, links)
    sections = [
        Section("Table 1: scores", "table-1", (scores,)),
        Section("What is kept, and what the teacher adds", "gain", (_gain_table(figures),)),
        Section("Table 2: costs", "table-2", (costs,)),
        Section("Convergence", "curves", _convergence_curves(figures)),
        Section("Configurations", "configurations", _configuration_tables(figures, links)),
    ]
    if (failed := _failed_runs(figures, links)) is not None:
        sections.append(Section("Runs that failed", "failed", (failed,)))
    page = Page(plan.suite.name, "suite", _lead(figures), tuple(sections))
    report = write_page(page, root / "suite.md", root / "suite.html")
    contents = {
        "table1.csv": to_csv(_score_lines(figures)),
        "table1.tex": to_latex(scores),
        "table2.csv": to_csv(_cost_lines(figures)),
        "table2.tex": to_latex(costs),
        "runs.csv": to_csv(_run_lines(figures)),
    }
    for name, text in contents.items():
        write_text_atomic(root / name, text)
    return (*report.paths, *(root / name for name in contents))


def _lead(figures: SuiteFigures) -> Prose:
    plan = figures.plan
    statuses = [figures.records[run.key].status for run in plan.runs() if run.key in figures.records]
    failed = statuses.count("failed")
    told = f"{len(statuses) - failed:,} of {len(plan.runs()):,} runs finished"
    told += f", {failed:,} failed" if failed else ""
    pairs = [
        pair
        for row in figures.rows()
        for family in plan.suite.families
        if None not in (pair := tuple(figures.median(row, family, arm) for arm in ("kd-lora", "fft")))
    ]
    # A ratio of means, as with the paper's Score: a mean of ratios is ruled by the rows where a teacher learnt least.
    student, teacher = (mean_of([pair[side] for pair in pairs]) for side in (0, 1))
    kept = retention(student, teacher)
    if kept is None:
        return strong(told) + "."
    return Prose(
        "<strong>{}</strong>. KD-LoRA keeps <strong>{}</strong> of its teacher’s score ({} of {}, means of the rows "
        "below)."
    ).format(told, _per_cent(kept), points(student), points(teacher))


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{points(value)}%"


def _score_table(figures: SuiteFigures, links: Links) -> Table:
    """Show the scores in the form of the paper's Table 1, its own figures in the line below."""
    suite, rows = figures.plan.suite, figures.rows()
    columns = [(family, arm) for family in suite.families for arm in suite.arms]
    lines: list[Row] = []
    for row in rows:
        cells = [figures.plan.cells_of(row.task, family)[arm] for family, arm in columns]
        shown = (_figure_cell(figures.figure(cell, row.group), links) for cell in cells)
        lines.append((strong(row.title), *shown))
        lines += _published_line("", [figures.published(row, *column) for column in columns])
    ours = [mean_of([figures.median(row, *column) for row in rows]) for column in columns]
    lines.append((strong(f"Score, mean of {len(rows)} rows"), *(strong(points(one)) for one in ours)))
    theirs = [mean_of([figures.published(row, *column) for row in rows]) for column in columns]
    lines += _published_line("the same rows", theirs)
    titles = ("", *(f"{figures.family_title(family)}: {arm_title(arm)}" for family, arm in columns))
    note = (
        "CoLA: Matthews; STS-B: mean of Pearson and Spearman; MRPC and QQP: mean of accuracy and F1; else accuracy, or "
        f"the task’s own score. Each figure is the median over the best {suite.best} configurations (all, where there "
        "are fewer), a configuration being the mean of its seeds; n counts the runs in them, ± is their standard "
        "deviation (n − 1), and the small numbers lead to their records. As in the paper, configurations are chosen on "
        "the split that is reported where there is no test split: such a figure is too high. The best "
        f"{suite.best} of an arm are not those of another; the differences below are paired."
    )
    caption = f"Table 1. Median of the best {suite.best} configurations, 0 to 100"
    return Table(caption, titles, tuple(lines), note=note, compact=len(titles) > 7)


def _published_line(title: str, values: Sequence[float | None]) -> list[Row]:
    return [published_row(title, values)] if any(value is not None for value in values) else []


def _figure_cell(one: Figure, links: Links) -> Cell:
    """Write a figure with spread, n, and links to its runs."""
    if one.median is None:
        return Cell("failed" if one.failed else "–")
    text = points(one.median) if one.sd is None else f"{points(one.median)}\u00a0±\u00a0{one.sd:.1f}"
    text += f" (n\u00a0{len(one.taken)}" + (f", {one.failed} failed" if one.failed else "")
    text += f", {one.missing} to come)" if one.missing else ")"
    return Cell(text, _run_links(links, [taken.run for taken in one.taken]))


def _run_links(links: Links, runs: Sequence[PlannedRun]) -> tuple[Link, ...]:
    return tuple(
        Link(str(number), links.file(links.base / run.key / "run.json"), run.key)
        for number, run in enumerate(runs, start=1)
    )


def _gain_table(figures: SuiteFigures) -> Table:
    suite = figures.plan.suite
    lines: list[Row] = []
    for family in suite.families:
        for row in figures.rows():
            student, *others = (figures.median(row, family, arm) for arm in ("kd-lora", "fft", "lora"))
            kept = (_per_cent(retention(student, other)) for other in others)
            lines.append((f"{figures.family_title(family)}, {row.title}", *kept, *_gains(figures, row, family)))
    columns = ["", "KD-LoRA keeps of FFT", "of LoRA"]
    for arm in suite.arms:
        if arm in CONTROLS:
            title = f"{arm_title(arm)} − {arm_title(CONTROLS[arm])}"
            columns += [f"{title}, of the figures", "paired", "95% interval"]
    note = (
        "Points. Paired: mean difference of all runs with the same configuration and seed on validation, chosen or "
        f"not, so no choice flatters it; n counts them. {INTERVALS}"
    )
    return Table("Retention, and the control’s difference", tuple(columns), tuple(lines), note=note)


def _gains(figures: SuiteFigures, row: SuiteRow, family: str) -> list[str]:
    texts: list[str] = []
    for arm in figures.plan.suite.arms:
        if arm not in CONTROLS:
            continue
        found = figures.gain(row, family, arm)
        if found is None or found.paired is None:
            texts += ["–", "–", "–"]
            continue
        span = "predictions are missing" if found.difference is None else interval_cell(found.difference)
        texts += [signed(found.of_figures), f"{signed(found.paired)} (n\u00a0{found.pairs})", span]
    return texts


def _cost_table(figures: SuiteFigures, links: Links) -> Table:
    """Show the costs in the form of the paper's Table 2, its own figures in the line below."""
    lines: list[Row] = []
    for family in figures.plan.suite.families:
        for arm in figures.plan.suite.arms:
            if found := _finished(figures, family, arm):
                lines.append(_cost_line(figures, found, family, links))
                lines += _published_costs(figures.plan.family_of_paper(family), arm)
    columns = (
        *("family", "method", "model", "trainable", "head alone", "training memory", "latency, batch 1"),
        *("batch 32", "runs"),
    )
    note = (
        "Medians over all finished runs of a family and arm, on the first task of the suite that has any. Trainable: "
        "adapters and head, by rank. Memory: peak of the training above the level after imports (on CUDA of the "
        "allocator). Latency: median forward pass of the merged model. The paper’s memory is that of the GPU, its time "
        "that of CoLA’s whole validation set, on an A100."
    )
    return Table("Table 2. Costs", columns, tuple(lines), text_columns=3, note=note)


def _finished(figures: SuiteFigures, family: str, arm: str) -> Runs:
    cells = [figures.plan.cells_of(task, family)[arm] for task in figures.plan.suite.tasks]
    return next((found for cell in cells if (found := figures.finished(cell))), [])


def _cost_line(figures: SuiteFigures, found: Runs, family: str, links: Links) -> Row:
    run, record = found[0]
    costs = (cost.write(_typical(found, cost)) for cost in (HEAD, MEMORY, TIME, TIME_OF_32))
    trainable = count(record.trainable_parameters)
    if run.arm in LORA_ARMS:
        trainable = _by_rank({run.config.lora.rank: record.trainable_parameters for run, record in found})
    shown = Cell(f"n\u00a0{len(found)}", _run_links(links, [run for run, _ in found[:6]]))
    return (figures.family_title(family), arm_title(run.arm), model_title(record.model), trainable, *costs, shown)


def _by_rank(counts: Mapping[int, float | None]) -> str:
    return ", ".join(f"r\u00a0{rank}: {count(value)}" for rank, value in sorted(counts.items()))


def _typical(runs: Runs, cost: Cost) -> float | None:
    values = [value for _, record in runs if (value := cost.read(record)) is not None]
    return statistics.median(values) if values else None


def _published_costs(family: str, arm: str) -> list[Row]:
    one = COSTS.get(family, {}).get(arm)
    if one is None:
        return []
    trainable = _by_rank(dict(zip(RANKS, one.trainable, strict=True))) if arm in LORA_ARMS else count(one.trainable[0])
    figures = ("–", f"{one.memory_mb:.1f}\u00a0MB", "–", f"{one.seconds:.2f}\u00a0s in all", "")
    return [(Cell("paper", quiet=True), arm_title(arm), one.model, trainable, *figures)]


def _convergence_curves(figures: SuiteFigures) -> tuple[Block, ...]:
    drawn: list[Block] = []
    for task in figures.plan.suite.tasks:
        for family in figures.plan.suite.families:
            curves = [
                Curve.of(arm_title(arm), arm_style(arm), [one.record for one in figures.figure(cell).taken])
                for arm, cell in figures.plan.cells_of(task, family).items()
            ]
            title = f"{task}, {figures.family_title(family)}"
            plot = learning_curves(curves, title=title, value="validation score", identity=f"curve-{len(drawn)}")
            drawn += [plot] if plot is not None else []
    return tuple(drawn) or (Paragraph("No run has finished an epoch.", "note"),)


def _configuration_tables(figures: SuiteFigures, links: Links) -> tuple[Block, ...]:
    """List which configurations each figure of Table 1 is the median of."""
    tables: list[Block] = []
    for family in figures.plan.suite.families:
        lines: list[Row] = []
        for task in figures.plan.suite.tasks:
            for arm, cell in figures.plan.cells_of(task, family).items():
                taken = figures.figure(cell).taken
                for one, link in zip(taken, _run_links(links, [one.run for one in taken]), strict=True):
                    head = (f"{task}, {arm_title(arm)}", settings_text(one.run))
                    lines.append((*head, str(one.run.seed), f"{one.value:.2f}", Cell("", (link,))))
        columns = ("task and arm", "configuration", "seed", "score", "run")
        caption = f"{figures.family_title(family)}: the runs behind Table 1, the best first"
        tables.append(Table(caption, columns, tuple(lines), text_columns=2))
    return tuple(tables)


def _failed_runs(figures: SuiteFigures, links: Links) -> Table | None:
    lines: list[Row] = []
    for run in figures.plan.runs():
        record = figures.records.get(run.key)
        if record is not None and record.status == "failed":
            why = record.error or "no reason was recorded"
            head = f"{run.task}, {arm_title(run.arm)}, seed {run.seed}"
            lines.append((head, settings_text(run), why, Cell("", _run_links(links, [run]))))
    columns = ("run", "configuration", "why", "record")
    caption = "Failed; the same command tries them again"
    return Table(caption, columns, tuple(lines), text_columns=4) if lines else None


def _score_lines(figures: SuiteFigures) -> Iterable[Sequence[Any]]:
    yield ("row", "task", "family", "arm", "median", "sd", "n", "configurations", "failed", "missing", "paper", "runs")
    for row in figures.rows():
        for family in figures.plan.suite.families:
            for arm, cell in figures.plan.cells_of(row.task, family).items():
                one = figures.figure(cell, row.group)
                numbers = (one.median, one.sd, len(one.taken), one.configurations, one.failed, one.missing)
                paper, runs = figures.published(row, family, arm), _record_names([taken.run for taken in one.taken])
                yield (row.title, row.task, family, arm, *numbers, paper, runs)


def _record_names(runs: Sequence[PlannedRun]) -> str:
    return " ".join(f"{run.key}/run.json" for run in runs)


def _cost_lines(figures: SuiteFigures) -> Iterable[Sequence[Any]]:
    yield (
        *("family", "arm", "model", "rank", "trainable_parameters", "head_parameters", "total_parameters"),
        *("peak_memory_bytes", "latency_ms_batch_1", "latency_ms_batch_32", "n", "runs"),
    )
    for family in figures.plan.suite.families:
        for arm in figures.plan.suite.arms:
            found = _finished(figures, family, arm)
            for rank in sorted({run.config.lora.rank for run, _ in found}):
                of_rank = [(run, record) for run, record in found if run.config.lora.rank == rank]
                first = of_rank[0][1]
                head = (family, arm, first.model, rank if first.adapter_parameters else None)
                counts = (first.trainable_parameters, first.head_parameters, first.total_parameters)
                typical = [_typical(of_rank, cost) for cost in (MEMORY, TIME, TIME_OF_32)]
                yield (*head, *counts, *typical, len(of_rank), _record_names([run for run, _ in of_rank]))


def _run_lines(figures: SuiteFigures) -> Iterable[Sequence[Any]]:
    yield (
        *("task", "arm", "seed", "configuration", "status", "score", "test_score", "train_seconds"),
        *("examples_per_second", "peak_memory_bytes", "teacher", "error", "record"),
    )
    for run in figures.plan.runs():
        head = (run.task, run.arm, run.seed, settings_text(run))
        one = figures.records.get(run.key)
        if one is None:
            yield (*head, "to come", *[None] * 7, f"{run.key}/run.json")
            continue
        costs = (one.score, one.test_score, one.train_seconds, one.examples_per_second, one.peak_memory_bytes)
        yield (*head, one.status, *costs, one.fingerprints.get("taught_by"), one.error, f"{run.key}/run.json")
