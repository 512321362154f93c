"""The figures of a suite, and its pages and files: Tables 1 and 2 in the paper's form, what the teacher adds."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdlora.config import LORA_ARMS
from kdlora.data.tasks import GLUE, Task
from kdlora.errors import ArtifactError, counted
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import RunLayout, RunRecord
from kdlora.evidence.stats import Difference, PairedArms, contrast
from kdlora.experiment.plan import Plan, PlannedRun, whole_config
from kdlora.report.collect import Run, headline_split
from kdlora.report.findings import CONTROLS, Comparison, align
from kdlora.report.page import Cell, Link, Page, Prose, Row, Section, Table, strong, to_csv, to_latex, write_page
from kdlora.report.paper import COSTS, FAMILY_TITLES, RANKS, family_of, published_scores
from kdlora.report.tables import HEAD, MEMORY, TIME, TIME_OF_32, UNLIKE, Cost, compared, mean_of, published_row
from kdlora.report.wording import INTERVALS, arm_title, count, model_title, points
from kdlora.system.storage import write_text_atomic

_SCORES_NOTE = (
    "Scored on {splits}. CoLA: Matthews; STS-B: mean of Pearson and Spearman; MRPC and QQP: mean of accuracy and F1; "
    "else accuracy, or the task’s own score. Each figure is the median over the best {best} (all, "
    "where there are fewer), a configuration being the mean of its seeds; n counts the runs in them, ± is their "
    "standard deviation (n − 1), and the small numbers lead to their records. As in the paper, configurations are "
    "chosen on the split that is reported where there is no test split: such a figure is too high. The best "
    "{best} of an arm are not those of another; the differences below are paired."
)
_GAINS_NOTE = (
    "Points. Paired: mean difference of all runs with the same configuration and seed on the split of Table 1, chosen "
    f"or not, so no choice flatters it; n counts them, and each seed counts alike. {INTERVALS}"
)
_COSTS_NOTE = (
    "Medians over all finished runs of a family and arm, on the first task of the suite that has any. Trainable: "
    "adapters and head, by rank. Memory: peak of the training above the level after imports (on CUDA of the "
    "allocator). Latency: median forward pass of the merged model. The paper’s memory is that of the GPU, its time "
    "that of CoLA’s whole validation set, on an A100."
)
_GROUPS = {"matched": "m", "mismatched": "mm"}
_DRAWS = 1_000
"""For each row of a table; a suite of the paper's size compares 1,300 runs."""
Runs = list[tuple[PlannedRun, RunRecord]]


@dataclass(frozen=True)
class SuiteRow:
    """One row of Table 1: a task, or a group of its validation rows, our name of the paper's row, and the split."""

    task: str
    group: str
    title: str
    published: str
    split: str

    def score(self, record: RunRecord, split: str) -> float | None:
        if not self.group:
            return record.test_score if split == "test" else record.score
        value = mean_of([record.metrics.get(f"{name}_{self.group}") for name in record.task.get("metrics", ())])
        return None if value is None else 100 * value


@dataclass(frozen=True)
class Figure:
    """One cell of Table 1, in points, and how many of its runs and configurations there are."""

    median: float | None  # over the best configurations, each the mean of its seeds
    sd: float | None  # sample standard deviation of the runs in them
    taken: tuple[tuple[PlannedRun, float], ...]  # these runs, each with its value
    configurations: int
    failed: int
    missing: int


@dataclass(frozen=True)
class SuiteFigures:
    """A suite's figures, from the records that there are."""

    plan: Plan
    records: Mapping[str, RunRecord]
    root: Path

    @cached_property
    def rows(self) -> list[SuiteRow]:
        rows: list[SuiteRow] = []
        for task in self.plan.suite.tasks:
            found = [record for run, record in self.ended(self.plan.runs()) if run.task == task]
            name = next((str(record.task.get("name") or "") for record in found if record.task), "")
            is_name = re.sub("[-_]", "", task.lower()) == name  # else the suite calls it by a name of its own
            title = next((entry.folder for key, entry in GLUE.items() if is_name and key == name), task)
            groups = next((_groups_of(record) for record in found if record.status == "finished"), [])
            rows += [
                SuiteRow(task, group, f"{title}-{_GROUPS.get(group, group)}", f"{name}-{group}", "validation")
                for group in groups
            ] or [SuiteRow(task, "", title, name, headline_split(found))]
        return rows

    @cached_property
    def scores(self) -> dict[tuple[SuiteRow, str, str], Figure]:
        return {
            (row, family, arm): self.figure(row, runs)
            for row in self.rows
            for (task, family, arm), runs in self.plan.cells.items()
            if task == row.task
        }

    @cached_property
    def of_paper(self) -> dict[str, str]:
        """Say for each family of the suite which of the paper's has its models; empty for any other."""
        suite = self.plan.suite
        configs = {name: whole_config(suite, next(iter(suite.tasks)), name) for name in suite.families}
        return {name: family_of(one.teacher.model, one.student.model) or "" for name, one in configs.items()}

    def published(self, row: SuiteRow, family: str, arm: str) -> float | None:
        return published_scores(row.published).get(self.of_paper[family], {}).get(arm)

    def ended(self, runs: Sequence[PlannedRun]) -> Runs:
        return [(run, self.records[run.key]) for run in runs if run.key in self.records]

    def finished(self, runs: Sequence[PlannedRun]) -> Runs:
        return [(run, record) for run, record in self.ended(runs) if record.status == "finished"]

    def figure(self, row: SuiteRow, runs: Sequence[PlannedRun]) -> Figure:
        """Compute one cell of Table 1: the median of those that are best on validation, on the row's split."""
        ended, finished = self.ended(runs), self.finished(runs)
        by_configuration: dict[str, list[tuple[PlannedRun, float, float]]] = {}
        for run, record in finished:
            rank, value = row.score(record, "validation"), row.score(record, row.split)
            if rank is not None and value is not None:
                by_configuration.setdefault(run.folder, []).append((run, value, rank))
        ranked = sorted(by_configuration.values(), key=lambda seeds: -statistics.mean(rank for *_, rank in seeds))
        best = ranked[: self.plan.suite.best]
        taken = tuple((run, value) for seeds in best for run, value, _ in seeds)
        means = [statistics.mean(value for _, value, _ in seeds) for seeds in best]
        return Figure(
            median=statistics.median(means) if means else None,
            sd=statistics.stdev(value for _, value in taken) if len(taken) > 1 else None,
            taken=taken,
            configurations=len(by_configuration),
            failed=len(ended) - len(finished),
            missing=len(runs) - len(ended),
        )

    def median(self, row: SuiteRow, family: str, arm: str) -> float | None:
        found = self.scores.get((row, family, arm))
        return None if found is None else found.median

    def gain(self, row: SuiteRow, family: str, arm: str) -> tuple[Comparison | None, int]:
        """Compare a distilled arm with its control, by runs of the same configuration and seed, and count the pairs."""
        own, controls = (
            [
                (run, score)
                for run, record in self.ended(self.plan.cells.get((row.task, family, name), ()))
                if (score := row.score(record, row.split)) is not None
            ]
            for name in (arm, CONTROLS[arm])
        )
        twins = {_pairing(run): (run, score) for run, score in controls}
        pairs = [(one, twin) for one in own if (twin := twins.get(_pairing(one[0]))) is not None]
        if not pairs:
            return None, 0
        by_seed: dict[int, list[float]] = {}
        for one, twin in pairs:
            by_seed.setdefault(one[0].seed, []).append(one[1] - twin[1])
        paired = statistics.mean(map(statistics.mean, by_seed.values()))
        difference = self._contrast(row, [(one[0], twin[0]) for one, twin in pairs])
        return Comparison(arm, CONTROLS[arm], difference, paired, "predictions are missing"), len(pairs)

    def _contrast(self, row: SuiteRow, pairs: Sequence[tuple[PlannedRun, PlannedRun]]) -> Difference | None:
        """Compare runs on the row's split, pair by pair; None where predictions are not all here, or not alike."""
        try:
            found = [read_predictions(RunLayout(self.root / run.key).predictions) for pair in pairs for run in pair]
        except ArtifactError:
            return None
        aligned = align([one.only(row.split, row.group) for one in found])
        if aligned is None:
            return None
        logits = [one.decided for one in aligned]
        task = Task.from_dict(self.records[pairs[0][0].key].task)
        groups = None if row.group else aligned[0].groups
        seeds = [run.seed for run, _ in pairs]
        arms = PairedArms(task, aligned[0].labels, logits[::2], logits[1::2], groups, seeds, aligned[0].offsets)
        return contrast([arms], draws=_DRAWS)


def _groups_of(record: RunRecord) -> list[str]:
    metric = next(iter(record.task.get("metrics", ())), None) if record.task.get("name") else None  # of MNLI
    return [name.removeprefix(f"{metric}_") for name in record.metrics if name.startswith(f"{metric}_")]


def _pairing(run: PlannedRun) -> tuple[Any, ...]:
    """Say what a distilled run and its control have in common: everything but the distillation and its copies."""
    own = ("distil.", "data.augment")
    return (run.seed, *((key, str(value)) for key, value in run.settings if not key.startswith(own)))


def write_tables(plan: Plan, root: Path, records: Mapping[str, RunRecord]) -> tuple[Path, ...]:
    """Write the suite's tables: `suite.md`, `suite.html`, and Tables 1 and 2 and all runs as CSV and LaTeX."""
    figures = SuiteFigures(plan, records, root)
    scores, costs = _score_table(figures), _cost_table(figures)
    sections = [
        Section("Table 1: scores", "table-1", [scores]),
        Section("What is kept, and what the teacher adds", "gain", [_gain_table(figures)]),
        Section("Table 2: costs", "table-2", [costs]),
    ]
    page = Page(plan.suite.name, "suite", _lead(figures), tuple(sections))
    report = write_page(page, root / "suite.md", root / "suite.html")
    contents = {
        "table1.csv": to_csv(_score_lines(figures)),
        "table1.tex": to_latex(scores),
        "table2.tex": to_latex(costs),
        "runs.csv": to_csv(_run_lines(figures)),
    }
    for name, text in contents.items():
        write_text_atomic(root / name, text)
    return (*report.paths, *(root / name for name in contents))


def _lead(figures: SuiteFigures) -> Prose:
    runs = figures.plan.runs()
    statuses = [figures.records[run.key].status for run in runs if run.key in figures.records]
    failed = statuses.count("failed")
    told = f"{len(statuses) - failed:,} of {len(runs):,} runs finished" + (f", {failed:,} failed" if failed else "")
    sides = []
    for row, family in itertools.product(figures.rows, figures.plan.suite.families):
        teaching = figures.plan.teachers.get((row.task, family))
        sides.append([figures.median(row, family, arm) for arm in ("kd-lora", teaching[0].arm if teaching else "fft")])
    # A ratio of means, as with the paper's Score: a mean of ratios is ruled by the rows where a teacher learnt least.
    student, teacher = (mean_of([pair[side] for pair in sides if None not in pair]) for side in (0, 1))
    if not teacher or teacher <= 0:
        return strong(told) + "."
    return Prose(
        "<strong>{}</strong>. KD-LoRA scores <strong>{}</strong> of what the arm of its teachers does "
        "({} of {}, means of the rows below, each the median of an arm’s configurations and seeds, whichever taught)."
    ).format(told, _kept(student, teacher), points(student), points(teacher))


def _kept(student: float | None, other: float | None) -> str:
    return "–" if student is None or other is None or other <= 0 else f"{points(100 * student / other)}%"


def _score_table(figures: SuiteFigures) -> Table:
    """Show the scores in the form of the paper's Table 1, its own figures in the line below."""
    suite, rows = figures.plan.suite, figures.rows
    columns = [(family, arm) for family in suite.families for arm in suite.arms]
    lines: list[Row] = []
    for row in rows:
        lines.append((strong(row.title), *(_figure_cell(figures.scores[row, *column]) for column in columns)))
        lines += _published_line("", [figures.published(row, *column) for column in columns])
    ours = [mean_of([figures.median(row, *column) for row in rows]) for column in columns]
    of = strong(f"Score, mean of {counted(len(rows), 'row')}")
    lines.append((of, *("–" if one is None else strong(points(one)) for one in ours)))
    theirs = [mean_of([figures.published(row, *column) for row in rows]) for column in columns]
    lines += _published_line("the same rows", theirs)
    titles = ("", *(f"{FAMILY_TITLES.get(family, family)}: {arm_title(arm)}" for family, arm in columns))
    caption = f"Table 1. Median of the best {counted(suite.best, 'configuration')}, 0 to 100"
    titled = {row.split: ", ".join(one.title for one in rows if one.split == row.split) for row in rows}
    splits = " and ".join(f"{split} ({own})" if len(titled) > 1 else split for split, own in titled.items())
    note = _SCORES_NOTE.format(best=counted(suite.best, "configuration"), splits=splits)
    return Table(caption, titles, tuple(lines), note=note, compact=len(titles) > 7)


def _published_line(title: str, values: Sequence[float | None]) -> list[Row]:
    return [published_row(title, values)] if any(value is not None for value in values) else []


def _figure_cell(one: Figure) -> Cell:
    if one.median is None:
        return Cell("failed" if one.failed else "–")
    spread = "" if one.sd is None else f"\u00a0±\u00a0{one.sd:.1f}"
    absent = (f", {one.failed} failed" if one.failed else "") + (f", {one.missing} to come" if one.missing else "")
    text = f"{points(one.median)}{spread} (n\u00a0{len(one.taken)}{absent})"
    return Cell(text, _run_links([run for run, _ in one.taken]))


def _run_links(runs: Sequence[PlannedRun]) -> tuple[Link, ...]:
    return tuple(Link(str(place), quote(f"{run.key}/run.json"), run.key) for place, run in enumerate(runs, start=1))


def _gain_table(figures: SuiteFigures) -> Table:
    suite = figures.plan.suite
    distilled = [arm for arm in suite.arms if arm in CONTROLS]
    lines: list[Row] = []
    for family in suite.families:
        for row in figures.rows:
            student, *others = (figures.median(row, family, arm) for arm in ("kd-lora", "fft", "lora"))
            cells = [_kept(student, one) for one in others]
            for arm in distilled:
                found, pairs = figures.gain(row, family, arm)
                value, interval, _ = compared(found) if found else ("–", "–", "")
                cells += [f"{value} (n\u00a0{pairs})" if found else value, interval]
            lines.append((f"{FAMILY_TITLES.get(family, family)}, {row.title}", *cells))
    columns = ["", "KD-LoRA keeps of FFT", "of LoRA"]
    for arm in distilled:
        columns += [f"{arm_title(arm)} − {arm_title(CONTROLS[arm])}, paired", "95% interval"]
    return Table("Retention, and the control’s difference", tuple(columns), tuple(lines), note=_GAINS_NOTE)


def _cost_table(figures: SuiteFigures) -> Table:
    """Show the costs in the form of the paper's Table 2, its own figures in the line below."""
    lines: list[Row] = []
    shown: list[Run] = []
    suite, plan = figures.plan.suite, figures.plan
    for family, arm in itertools.product(suite.families, suite.arms):
        cells = (plan.cells[task, family, arm] for task in suite.tasks)
        found: Runs = next(filter(None, map(figures.finished, cells)), [])
        if not found:
            continue
        shown += [Run(record, Path(), None) for _, record in found]
        first = found[0][1]
        trainable = {run.config.lora.rank: record.trainable_parameters for run, record in found}
        lines.append(
            (
                *(FAMILY_TITLES.get(family, family), arm_title(arm), model_title(first.model)),
                _by_rank(trainable) if arm in LORA_ARMS else count(first.trainable_parameters),
                *(cost.write(_typical(found, cost)) for cost in (HEAD, MEMORY, TIME, TIME_OF_32)),
                Cell(f"n\u00a0{len(found)}", _run_links([run for run, _ in found[:6]])),
            )
        )
        if one := COSTS.get(figures.of_paper[family], {}).get(arm):
            by_rank = dict(zip(RANKS, one.trainable, strict=False))
            counts = _by_rank(by_rank) if arm in LORA_ARMS else count(one.trainable[0])
            measured = ("–", f"{one.memory_mb:.1f}\u00a0MB", "–", f"{one.seconds:.2f}\u00a0s in all", "")
            lines.append((Cell("paper", quiet=True), arm_title(arm), one.model, counts, *measured))
    columns = ("family", "method", "model", "trainable", "head alone", "training memory", "latency, batch 1")
    note = _COSTS_NOTE + ("" if TIME.is_alike(shown) else UNLIKE)
    return Table("Table 2. Costs", (*columns, "batch 32", "runs"), tuple(lines), text_columns=3, note=note)


def _by_rank(counts: Mapping[int, float | None]) -> str:
    return ", ".join(f"r\u00a0{rank}: {count(value)}" for rank, value in sorted(counts.items()))


def _typical(runs: Runs, cost: Cost) -> float | None:
    values = [value for _, record in runs if (value := cost.read(record)) is not None]
    return statistics.median(values) if values else None


def settings_text(run: PlannedRun) -> str:
    """Write what the grid set for a run on one line, such as `rank 8, epochs 3`."""
    last = [key.rsplit(".", 1)[-1] for key, _ in run.settings]
    parts = [
        f"{one.replace('_', ' ') if last.count(one) == 1 else key} {value}"
        for one, (key, value) in zip(last, run.settings, strict=True)
    ]
    return ", ".join(parts) or "as in the config"


def _score_lines(figures: SuiteFigures) -> Iterable[Sequence[Any]]:
    named = ("row", "task", "family", "arm", "split")
    yield (*named, "median", "sd", "n", "configurations", "failed", "missing", "paper", "runs")
    for (row, family, arm), one in figures.scores.items():
        numbers = (one.median, one.sd, len(one.taken), one.configurations, one.failed, one.missing)
        paper, runs = figures.published(row, family, arm), " ".join(f"{run.key}/run.json" for run, _ in one.taken)
        yield (row.title, row.task, family, arm, row.split, *numbers, paper, runs)


def _run_lines(figures: SuiteFigures) -> Iterable[Sequence[Any]]:
    counts = ("trainable_parameters", "head_parameters", "total_parameters")
    costs = ("score", "test_score", "train_seconds", "examples_per_second", "peak_memory_bytes", *counts)
    latency = ("latency_ms_batch_1", "latency_ms_batch_32")
    named = ("task", "family", "arm", "seed", "rank", "configuration")
    yield (*named, "status", "model", *costs, *latency, "teacher", "error", "record")
    for run in figures.plan.runs_of_families():
        one, rank = figures.records.get(run.key), run.config.lora.rank if run.arm in LORA_ARMS else None
        found: list[Any] = ["to come", *[None] * 13]
        if one is not None:
            measured = [getattr(one, cost) for cost in ("status", "model", *costs)]
            found = [*measured, TIME.read(one), TIME_OF_32.read(one), one.fingerprints.get("taught_by"), one.error]
        yield (run.task, run.family, run.arm, run.seed, rank, settings_text(run), *found, f"{run.key}/run.json")
