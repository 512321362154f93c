"""The tables of a suite in the paper's form, as Markdown and HTML with curves; `table_files` has the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdlora.evidence.blocks import Block, Bullets, Cell, Inline, Page, Paragraph, Section, Strong, Table
from kdlora.evidence.paper import FAMILY_TITLES, VALIDATION_ROWS, impossible_scores
from kdlora.evidence.records import RunRecord
from kdlora.evidence.report import footer, write_page
from kdlora.evidence.tables import Links
from kdlora.evidence.wording import arm_title, signed
from kdlora.scale.cost_table import cost_table
from kdlora.scale.figures import (
    CONTROLS,
    Figure,
    Row,
    family_title,
    figure,
    gain,
    mean_of,
    published,
    retention,
    table_rows,
)
from kdlora.scale.plan import Plan
from kdlora.scale.run_tables import configuration_tables, convergence_curves, failed_runs, run_link
from kdlora.scale.table_files import write_files

Records = Mapping[str, RunRecord]


def write_tables(plan: Plan, root: Path, records: Records) -> tuple[Path, ...]:
    """Write the suite's tables: `suite.md`, `suite.html`, and Tables 1 and 2 and all runs as CSV and LaTeX.

    Args:
        plan: the suite's runs.
        root: the suite's folder.
        records: of the runs that have ended, by the run's key; the tables say what is missing.

    Returns:
        The files.
    """
    page = _page(plan, root, records)
    report = write_page(page, root / "suite.md", root / "suite.html")
    return (*report.paths, *write_files(plan, root, records))


def _page(plan: Plan, root: Path, records: Records) -> Page:
    links = Links(root, "runs")
    origin, written = footer()
    sections = [
        Section("Table 1: scores", "table-1", (score_table(plan, records, links), *_notes(plan))),
        Section("What is kept, and what the teacher adds", "gain", (gain_table(plan, records),)),
        Section("Table 2: costs", "table-2", (cost_table(plan, records, links),)),
        Section("Convergence", "curves", convergence_curves(plan, records)),
        Section("Configurations", "configurations", configuration_tables(plan, records, links)),
    ]
    failed = failed_runs(plan, records, links)
    if failed:
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


def score_table(plan: Plan, records: Records, links: Links) -> Table:
    """Show the scores in the form of the paper's Table 1, its own figures in the line below.

    Args:
        plan: the suite's runs.
        records: of the runs that have ended.
        links: where figures lead.
    """
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
    return Cell(text, tuple(run_link(links, taken.run.key, number) for number, taken in enumerate(one.taken, start=1)))


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


def gain_table(plan: Plan, records: Records) -> Table:
    """Show for each task and family what the student keeps, and what distillation adds to its control.

    Args:
        plan: the suite's runs.
        records: of the runs that have ended.
    """
    lines = []
    for family in plan.suite.families:
        for row in table_rows(plan, records):
            texts = [_per_cent(_kept(plan, records, row, family, of)) for of in ("fft", "lora")]
            lines.append(
                (
                    Cell(f"{family_title(plan, family)}, {row.title}"),
                    *map(Cell, texts),
                    *_gains(plan, records, row, family),
                )
            )
    arms = [arm for arm in plan.suite.arms if arm in CONTROLS]
    columns = ["", "KD-LoRA keeps of FFT", "of LoRA"]
    for arm in arms:
        title = f"{arm_title(arm)} − {arm_title(CONTROLS[arm])}"
        columns += [f"{title}, of the figures", "paired", "pairs won"]
    note = (
        "Points. Paired: mean ± sample standard deviation of the differences of all runs with the same configuration "
        "and seed, chosen or not, so no choice flatters it. Pairs won: how often the distilled run scores higher."
    )
    numeric = frozenset(range(1, len(columns)))
    return Table("Retention, and the control’s difference", tuple(columns), tuple(lines), numeric, note=note)


def _gains(plan: Plan, records: Records, row: Row, family: str) -> list[Cell]:
    cells: list[Cell] = []
    for arm in plan.suite.arms:
        if arm not in CONTROLS:
            continue
        found = gain(plan, records, row, family, arm)
        if found is None or found.paired is None:
            cells += [Cell("–"), Cell("–"), Cell("–")]
            continue
        plain = "–" if found.of_figures is None else signed(found.of_figures)
        spread = "" if found.paired.sd is None else f"\u00a0±\u00a0{found.paired.sd:.1f}"
        paired = f"{signed(found.paired.mean)}{spread} (n\u00a0{found.paired.n})"
        cells += [Cell(plain), Cell(paired), Cell(f"{found.better} of {found.paired.n}")]
    return cells


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{_score(value)}%"


def _score(value: float | None) -> str:
    return "–" if value is None else signed(value, plus=False)


_DOUBTS = (
    "There is no control: no student with LoRA and without a teacher, so the gain of distillation is never shown.",
    "The WNLI figure 56.3 is that of always giving the same answer (40 of 71).",
    "Configurations are chosen and reported on the same validation split.",
    "Table 2 states ten times the parameters of rank-8 LoRA on query and value: 12 layers of width 768 have 294,912, "
    "6 layers 147,456.",
    "“40% more compact” holds for DistilBERT alone: RoBERTa’s pair saves 34%, DeBERTaV3’s 23%. Inference time falls by "
    "12%, 38% and 28%, not by a uniform 30%.",
    "Memory is “during training” in one place and “during inference” in another.",
)


def _notes(plan: Plan) -> tuple[Block, ...]:
    """Say what does not hold up in the paper's tables, where its figures are shown."""
    if not any(plan.family_of_paper(family) for family in plan.suite.families):
        return (Paragraph(("The paper has no figures for these families.",), "note"),)
    listed = "; ".join(
        f"{task.upper()}, {FAMILY_TITLES[family]}, {arm_title(arm)}: {value}"
        for task, family, arm, value in impossible_scores()
    )
    sizes = " and ".join(f"{rows} ({task.upper()})" for task, rows in VALIDATION_ROWS.items())
    impossible = (
        f"With validation sets of {sizes} examples, the median of six accuracies is a multiple of half an example. "
        f"These figures are none: {listed}."
    )
    doubts = tuple((text,) for text in (*_DOUBTS, impossible))
    return (Paragraph(("What does not hold up in the paper’s tables:",)), Bullets(doubts))
