"""The pages and files of a suite: Tables 1 and 2 in the paper's form, curves, configurations, failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kdlora.config import LORA_ARMS, Arm
from kdlora.evidence.records import RunRecord
from kdlora.experiment.figures import (
    Figure,
    Row,
    family_title,
    figure,
    gain,
    mean_of,
    published,
    retention,
    settings_text,
    table_rows,
    typical,
)
from kdlora.experiment.plan import Plan
from kdlora.report.blocks import Block, Cell, Inline, Link, Page, Paragraph, Section, Strong, Table
from kdlora.report.experiment_tables import Links
from kdlora.report.findings import CONTROLS
from kdlora.report.paper import COSTS, RANKS
from kdlora.report.plots import Curve, arm_style, learning_curves
from kdlora.report.report import footer, write_page
from kdlora.report.table_files import to_csv, to_latex
from kdlora.report.wording import INTERVALS, arm_title, count, interval_cell, milliseconds, model_title, signed, size
from kdlora.system.storage import write_text_atomic

Records = Mapping[str, RunRecord]


def write_tables(plan: Plan, root: Path, records: Records) -> tuple[Path, ...]:
    """Write the suite's tables: `suite.md`, `suite.html`, and Tables 1 and 2 and all runs as CSV and LaTeX."""
    links = Links(root, "runs")
    scores, costs = _score_table(plan, records, links), _cost_table(plan, records, links)
    report = write_page(_page(plan, root, records, links, scores, costs), root / "suite.md", root / "suite.html")
    contents = {
        "table1.csv": to_csv(_score_lines(plan, records)),
        "table1.tex": to_latex(scores),
        "table2.csv": to_csv(_cost_lines(plan, records)),
        "table2.tex": to_latex(costs),
        "runs.csv": to_csv(_run_lines(plan, records)),
    }
    for name, text in contents.items():
        write_text_atomic(root / name, text)
    return (*report.paths, *(root / name for name in contents))


def _page(plan: Plan, root: Path, records: Records, links: Links, scores: Table, costs: Table) -> Page:
    origin, written = footer()
    sections = [
        Section("Table 1: scores", "table-1", (scores,)),
        Section("What is kept, and what the teacher adds", "gain", (_gain_table(plan, root, records),)),
        Section("Table 2: costs", "table-2", (costs,)),
        Section("Convergence", "curves", _convergence_curves(plan, records)),
        Section("Configurations", "configurations", _configuration_tables(plan, records, links)),
    ]
    if failed := _failed_runs(plan, records, links):
        sections.append(Section("Runs that failed", "failed", failed))
    return Page(plan.suite.name, f"{origin} suite", _lead(plan, records), tuple(sections), written)


def _lead(plan: Plan, records: Records) -> tuple[Inline, ...]:
    runs = plan.runs()
    ended = [records[run.key] for run in runs if run.key in records]
    failed = sum(record.status == "failed" for record in ended)
    told = f"{len(ended) - failed:,} of {len(runs):,} runs finished"
    told += f", {failed:,} failed" if failed else ""
    pairs = [
        pair
        for row in table_rows(plan, records)
        for family in plan.suite.families
        if None not in (pair := tuple(_median(plan, records, row, family, arm) for arm in ("kd-lora", "fft")))
    ]
    # A ratio of means, as with the paper's Score: a mean of ratios is ruled by the rows where a teacher learnt least.
    student, teacher = (mean_of([pair[side] for pair in pairs]) for side in (0, 1))
    kept = retention(student, teacher)
    if kept is None:
        return (Strong(told), ".")
    scores = f" of its teacher’s score ({_score(student)} of {_score(teacher)}, means of the rows below)."
    return (Strong(told), ". KD-LoRA keeps ", Strong(_per_cent(kept)), scores)


def _median(plan: Plan, records: Records, row: Row, family: str, arm: str) -> float | None:
    cell = plan.cells_of(row.task, family).get(arm)
    return None if cell is None else figure(plan, records, cell, row.group).median


def _kept(plan: Plan, records: Records, row: Row, family: str, of: str) -> float | None:
    return retention(_median(plan, records, row, family, "kd-lora"), _median(plan, records, row, family, of))


def _score_table(plan: Plan, records: Records, links: Links) -> Table:
    """Show the scores in the form of the paper's Table 1, its own figures in the line below."""
    rows, lines, quiet = table_rows(plan, records), [], set()
    columns = [(family, arm) for family in plan.suite.families for arm in plan.suite.arms]
    for row in rows:
        figures = [figure(plan, records, plan.cells_of(row.task, family)[arm], row.group) for family, arm in columns]
        lines.append((Cell(row.title, strong=True), *(_figure_cell(one, links) for one in figures)))
        theirs = [published(plan, row, *column) for column in columns]
        if any(value is not None for value in theirs):
            quiet.add(len(lines))
            lines.append((Cell("paper"), *(_plain(value) for value in theirs)))
    ours = [mean_of([_median(plan, records, row, *column) for row in rows]) for column in columns]
    lines.append((Cell(f"Score, mean of {len(rows)} rows", strong=True), *(_plain(one, strong=True) for one in ours)))
    theirs = [mean_of([published(plan, row, *column) for row in rows]) for column in columns]
    if any(value is not None for value in theirs):
        quiet.add(len(lines))
        lines.append((Cell("paper, the same rows"), *(_plain(value) for value in theirs)))
    titles = ("", *(f"{family_title(plan, family)}: {arm_title(arm)}" for family, arm in columns))
    numeric = frozenset(range(1, len(titles)))
    caption = f"Table 1. Median of the best {plan.suite.best} configurations, 0 to 100"
    return Table(caption, titles, tuple(lines), numeric, frozenset(quiet), _score_note(plan), compact=len(titles) > 7)


def _figure_cell(one: Figure, links: Links) -> Cell:
    """Write a figure with spread, n, and links to its runs."""
    if one.median is None:
        return Cell("failed" if one.failed else "–")
    text = _score(one.median) if one.sd is None else f"{_score(one.median)}\u00a0±\u00a0{one.sd:.1f}"
    text += f" (n\u00a0{len(one.taken)}" + (f", {one.failed} failed" if one.failed else "")
    text += f", {one.missing} to come)" if one.missing else ")"
    return Cell(text, tuple(_run_link(links, taken.run.key, number) for number, taken in enumerate(one.taken, start=1)))


def _plain(value: float | None, *, strong: bool = False) -> Cell:
    return Cell(_score(value), strong=strong and value is not None)


def _score_note(plan: Plan) -> str:
    suite = plan.suite
    return (
        "CoLA: Matthews; STS-B: mean of Pearson and Spearman; MRPC and QQP: mean of accuracy and F1; else accuracy, or "
        f"the task’s own score. Each figure is the median over the best {suite.best} configurations (all, where there "
        "are fewer), a configuration being the mean of its seeds; n counts the runs in them, ± is their standard "
        "deviation (n − 1), and the small numbers lead to their records. As in the paper, configurations are chosen on "
        "the split that is reported where there is no test split: such a figure is too high. The best "
        f"{suite.best} of an arm are not those of another; the differences below are paired."
    )


def _gain_table(plan: Plan, root: Path, records: Records) -> Table:
    """Show for each task and family what the student keeps, and what distillation adds to its control."""
    lines = []
    for family in plan.suite.families:
        for row in table_rows(plan, records):
            texts = [_per_cent(_kept(plan, records, row, family, of)) for of in ("fft", "lora")]
            lines.append(
                (
                    Cell(f"{family_title(plan, family)}, {row.title}"),
                    *map(Cell, texts),
                    *_gains(plan, root, records, row, family),
                )
            )
    arms = [arm for arm in plan.suite.arms if arm in CONTROLS]
    columns = ["", "KD-LoRA keeps of FFT", "of LoRA"]
    for arm in arms:
        title = f"{arm_title(arm)} − {arm_title(CONTROLS[arm])}"
        columns += [f"{title}, of the figures", "paired", "95% interval"]
    note = (
        "Points. Paired: mean difference of all runs with the same configuration and seed on validation, chosen or "
        f"not, so no choice flatters it; n counts them. {INTERVALS}"
    )
    numeric = frozenset(range(1, len(columns)))
    return Table("Retention, and the control’s difference", tuple(columns), tuple(lines), numeric, note=note)


def _gains(plan: Plan, root: Path, records: Records, row: Row, family: str) -> list[Cell]:
    cells: list[Cell] = []
    for arm in plan.suite.arms:
        if arm not in CONTROLS:
            continue
        found = gain(plan, root, records, row, family, arm)
        if found is None or found.paired is None:
            cells += [Cell("–"), Cell("–"), Cell("–")]
            continue
        plain = "–" if found.of_figures is None else signed(found.of_figures)
        span = "predictions are missing" if found.difference is None else interval_cell(found.difference)
        cells += [Cell(plain), Cell(f"{signed(found.paired)} (n\u00a0{found.pairs})"), Cell(span)]
    return cells


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{_score(value)}%"


def _score(value: float | None) -> str:
    return "–" if value is None else signed(value, plus=False)


def _cost_table(plan: Plan, records: Records, links: Links) -> Table:
    """Show the costs in the form of the paper's Table 2, its own figures in the line below."""
    lines: list[tuple[Cell, ...]] = []
    quiet: set[int] = set()
    for family in plan.suite.families:
        for arm in plan.suite.arms:
            found = _finished_of(plan, records, family, arm)
            if found:
                lines.append(_cost_line(plan, found, family, arm, links))
                theirs = _published_costs(plan, family, arm)
                if theirs:
                    quiet.add(len(lines))
                    lines.append(theirs)
    columns = (
        "family",
        "method",
        "model",
        "trainable",
        "head alone",
        "training memory",
        "latency, batch 1",
        "batch 32",
        "runs",
    )
    note = (
        "Medians over all finished runs of a family and arm, on the first task of the suite that has any. Trainable: "
        "adapters and head, by rank. Memory: peak of the training above the level after imports (on CUDA of the "
        "allocator). Latency: median forward pass of the merged model. The paper’s memory is that of the GPU, its time "
        "that of CoLA’s whole validation set, on an A100."
    )
    return Table("Table 2. Costs", columns, tuple(lines), frozenset(range(3, 9)), frozenset(quiet), note)


def _finished_of(plan: Plan, records: Records, family: str, arm: str) -> list[tuple[str, RunRecord, Any]]:
    """List the finished runs of an arm and family on the first task that has any: key, record, LoRA rank."""
    for task in plan.suite.tasks:
        cell = plan.cells_of(task, family)[arm]
        found = [
            (run.key, records[run.key], run.config.lora.rank)
            for run in cell.runs
            if run.key in records and records[run.key].status == "finished"
        ]
        if found:
            return found
    return []


def _cost_line(
    plan: Plan, found: Sequence[tuple[str, RunRecord, Any]], family: str, arm: Arm, links: Links
) -> tuple[Cell, ...]:
    runs = [record for _, record, _ in found]
    texts = (
        _trainable_text(found, arm),
        count(typical(runs, lambda one: one.head_parameters)),
        size(typical(runs, lambda one: one.peak_memory_bytes)),
        *(milliseconds(typical(runs, partial(_latency_ms, rows=rows))) for rows in (1, 32)),
    )
    shown = tuple(_run_link(links, key, number) for number, (key, _, _) in enumerate(found[:6], start=1))
    head = (Cell(family_title(plan, family)), Cell(arm_title(arm)), Cell(model_title(runs[0].model)))
    return (*head, *map(Cell, texts), Cell(f"n\u00a0{len(found)}", shown))


def _trainable_text(found: Sequence[tuple[str, RunRecord, Any]], arm: Arm) -> str:
    """Write the trainable parameters, for each rank where the arm has adapters."""
    if arm not in LORA_ARMS:
        return count(found[0][1].trainable_parameters)
    by_rank = {rank: record.trainable_parameters for _, record, rank in found}
    return ", ".join(f"r\u00a0{rank}: {count(value)}" for rank, value in sorted(by_rank.items()))


def _latency_ms(record: RunRecord, rows: int) -> float | None:
    """Give the median time of a forward pass of so many rows."""
    return next((one.p50_ms for one in record.latency if one.batch_size == rows), None)


def _published_costs(plan: Plan, family: str, arm: str) -> tuple[Cell, ...] | None:
    place = {"fft": 0, "lora": 1, "kd-lora": 2}.get(arm)
    costs = COSTS.get(plan.family_of_paper(family))
    if costs is None or place is None:
        return None
    by_rank = {"lora": costs.lora_by_rank, "kd-lora": costs.kd_lora_by_rank}.get(arm)
    trainable = count(costs.trainable[0])
    if by_rank:
        trainable = ", ".join(f"r\u00a0{rank}: {count(value)}" for rank, value in zip(RANKS, by_rank, strict=True))
    model = costs.student if arm == "kd-lora" else costs.teacher
    texts = ("paper", arm_title(arm), model, trainable, "–", f"{costs.memory_mb[place]:.1f}\u00a0MB")
    return (*map(Cell, texts), Cell("–"), Cell(f"{costs.seconds[place]:.2f}\u00a0s in all"), Cell(""))


def _run_link(links: Links, key: str, number: int) -> Link:
    """Link to the record of a run."""
    return Link(str(number), links.file(links.base / key / "run.json"), key)


def _convergence_curves(plan: Plan, records: Records) -> tuple[Block, ...]:
    """Draw the validation score over the epochs, of the best configurations of each arm."""
    drawn: list[Block] = []
    for task in plan.suite.tasks:
        for family in plan.suite.families:
            curves = []
            for arm, cell in plan.cells_of(task, family).items():
                histories = tuple(_history(one.record) for one in figure(plan, records, cell).taken)
                curves.append(Curve(arm_title(arm), arm_style(arm), histories))
            title = f"{task}, {family_title(plan, family)}"
            plot = learning_curves(curves, title=title, value="validation score", identity=f"curve-{len(drawn)}")
            if plot is not None:
                drawn.append(plot)
    return tuple(drawn) or (Paragraph(("No run has finished an epoch.",), "note"),)


def _history(record: RunRecord) -> tuple[tuple[float, float], ...]:
    points = [(entry.get("epoch"), entry.get("score")) for entry in record.history]
    return tuple((float(epoch), float(score)) for epoch, score in points if epoch is not None and score is not None)


def _configuration_tables(plan: Plan, records: Records, links: Links) -> tuple[Block, ...]:
    """List which configurations each figure of Table 1 is the median of."""
    blocks: list[Block] = []
    for family in plan.suite.families:
        lines = []
        for task in plan.suite.tasks:
            for arm, cell in plan.cells_of(task, family).items():
                for number, one in enumerate(figure(plan, records, cell).taken, start=1):
                    link = (_run_link(links, one.run.key, number),)
                    texts = (settings_text(one.run.settings), str(one.run.seed), f"{one.value:.2f}")
                    lines.append((Cell(f"{task}, {arm_title(arm)}"), *map(Cell, texts), Cell("", link)))
        columns = ("task and arm", "configuration", "seed", "score", "run")
        caption = f"{family_title(plan, family)}: the runs behind Table 1, the best first"
        blocks.append(Table(caption, columns, tuple(lines), frozenset({2, 3})))
    return tuple(blocks)


def _failed_runs(plan: Plan, records: Records, links: Links) -> tuple[Block, ...]:
    """List the runs that failed, with their reasons; nothing where none did."""
    lines = []
    for run in plan.runs():
        record = records.get(run.key)
        if record is not None and record.status == "failed":
            name = f"{run.task}, {arm_title(run.arm)}, seed {run.seed}"
            texts = (name, settings_text(run.settings), record.error or "no reason was recorded")
            lines.append((*map(Cell, texts), Cell("", (_run_link(links, run.key, 1),))))
    if not lines:
        return ()
    columns = ("run", "configuration", "why", "record")
    return (Table("Failed; the same command tries them again", columns, tuple(lines)),)


def _score_lines(plan: Plan, records: Records) -> Iterable[Sequence[Any]]:
    yield ("row", "task", "family", "arm", "median", "sd", "n", "configurations", "failed", "missing", "paper", "runs")
    for row in table_rows(plan, records):
        for family in plan.suite.families:
            for arm, cell in plan.cells_of(row.task, family).items():
                one = figure(plan, records, cell, row.group)
                numbers = (one.median, one.sd, len(one.taken), one.configurations, one.failed, one.missing)
                runs = " ".join(f"{taken.run.key}/run.json" for taken in one.taken)
                yield (row.title, row.task, family, arm, *numbers, published(plan, row, family, arm), runs)


def _cost_lines(plan: Plan, records: Records) -> Iterable[Sequence[Any]]:
    yield (
        *("family", "arm", "model", "rank", "trainable_parameters", "head_parameters", "total_parameters"),
        *("peak_memory_bytes", "latency_ms_batch_1", "latency_ms_batch_32", "n", "runs"),
    )
    for family in plan.suite.families:
        for arm in plan.suite.arms:
            found = _finished_of(plan, records, family, arm)
            for rank in sorted({rank for _, _, rank in found}):
                of_rank = [(key, record) for key, record, one in found if one == rank]
                runs = [record for _, record in of_rank]
                head = (family, arm, runs[0].model, rank if runs[0].adapter_parameters else None)
                counts = (runs[0].trainable_parameters, runs[0].head_parameters, runs[0].total_parameters)
                memory = typical(runs, lambda one: one.peak_memory_bytes)
                times = [typical(runs, partial(_latency_ms, rows=rows)) for rows in (1, 32)]
                yield (*head, *counts, memory, *times, len(runs), " ".join(f"{key}/run.json" for key, _ in of_rank))


def _run_lines(plan: Plan, records: Records) -> Iterable[Sequence[Any]]:
    yield (
        *("task", "arm", "seed", "configuration", "status", "score", "test_score", "train_seconds"),
        *("examples_per_second", "peak_memory_bytes", "teacher", "error", "record"),
    )
    for run in plan.runs():
        head = (run.task, run.arm, run.seed, settings_text(run.settings))
        one = records.get(run.key)
        if one is None:
            yield (*head, "to come", *[None] * 7, f"{run.key}/run.json")
            continue
        figures = (one.score, one.test_score, one.train_seconds, one.examples_per_second, one.peak_memory_bytes)
        yield (*head, one.status, *figures, one.fingerprints.get("taught_by"), one.error, f"{run.key}/run.json")
