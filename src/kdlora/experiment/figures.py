"""The figures of a suite's tables: medians of the best configurations, retention, and what the teacher adds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdlora.data.tasks import GLUE, Task
from kdlora.errors import ArtifactError
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import RunLayout, RunRecord
from kdlora.evidence.stats import Difference, PairedArms, contrast
from kdlora.experiment.plan import Cell, Plan, PlannedRun
from kdlora.report.findings import CONTROLS, align
from kdlora.report.paper import FAMILY_TITLES, published_scores

_GROUPS = {"matched": "m", "mismatched": "mm"}
_DRAWS = 1_000
"""For each row of a table; a suite of the paper's size compares 1,300 runs."""
Runs = list[tuple[PlannedRun, RunRecord]]


@dataclass(frozen=True)
class SuiteRow:
    """One row of Table 1: a task, or one of the groups of its validation rows, and our name of the paper's row."""

    task: str
    group: str
    title: str
    published: str


@dataclass(frozen=True)
class Taken:
    """A run that a figure is made of."""

    run: PlannedRun
    record: RunRecord
    value: float


@dataclass(frozen=True)
class Figure:
    """One cell of Table 1, in points, and how many of its runs and configurations there are."""

    median: float | None  # over the best configurations, each the mean of its seeds
    sd: float | None  # sample standard deviation of the runs in them
    taken: tuple[Taken, ...]  # these runs
    configurations: int
    failed: int
    missing: int


@dataclass(frozen=True)
class Gain:
    """What the teacher adds to a distilled arm, in points."""

    paired: float  # mean difference of the runs with the same configuration and seed
    pairs: int
    difference: Difference | None  # the same with its interval; None where predictions are missing


@dataclass(frozen=True)
class SuiteFigures:
    """A suite's figures, from the records that there are."""

    plan: Plan
    records: Mapping[str, RunRecord]
    root: Path

    @cached_property
    def rows(self) -> list[SuiteRow]:
        """The rows of Table 1: ten for the nine trainings of GLUE."""
        rows: list[SuiteRow] = []
        for task in self.plan.suite.tasks:
            found = [record for cell in self.plan.cells if cell.task == task for _, record in self.ended(cell)]
            name = next((str(record.task.get("name") or "") for record in found if record.task), "")
            title = next((entry.folder for key, entry in GLUE.items() if key == name), task)
            groups = next((_groups_of(record) for record in found if record.status == "finished"), [])
            rows += [
                SuiteRow(task, group, f"{title}-{_GROUPS.get(group, group)}", f"{name}-{group}") for group in groups
            ] or [SuiteRow(task, "", title, name)]
        return rows

    @cached_property
    def scores(self) -> dict[tuple[SuiteRow, str, str], Figure]:
        """Every cell of Table 1, by row, family and arm."""
        return {
            (row, family, arm): self.figure(cell, row.group)
            for row in self.rows
            for family in self.plan.suite.families
            for arm, cell in self.plan.cells_of(row.task, family).items()
        }

    def family_title(self, family: str) -> str:
        return FAMILY_TITLES.get(self.plan.family_of_paper(family), family)

    def published(self, row: SuiteRow, family: str, arm: str) -> float | None:
        """Give the paper's figure for a cell; None where it has none for this task, family or arm."""
        return published_scores(row.published).get(self.plan.family_of_paper(family), {}).get(arm)

    def ended(self, cell: Cell) -> Runs:
        return [(run, self.records[run.key]) for run in cell.runs if run.key in self.records]

    def finished(self, cell: Cell) -> Runs:
        return [(run, record) for run, record in self.ended(cell) if record.status == "finished"]

    def figure(self, cell: Cell, group: str = "") -> Figure:
        """Compute one cell of Table 1: the median of those that are best on validation, on test if it can be."""
        ended, finished = self.ended(cell), self.finished(cell)
        on_test = bool(finished) and not group and all(record.test_score is not None for _, record in finished)
        by_configuration: dict[str, list[tuple[Taken, float]]] = {}
        for run, record in finished:
            rank = row_score(record, group)
            value = record.test_score if on_test else rank
            if rank is not None and value is not None:
                by_configuration.setdefault(run.folder, []).append((Taken(run, record, value), rank))
        ranked = sorted(by_configuration.values(), key=lambda runs: -statistics.mean(rank for _, rank in runs))
        best = ranked[: self.plan.suite.best]
        taken = tuple(one for runs in best for one, _ in runs)
        return Figure(
            median=statistics.median(statistics.mean(one.value for one, _ in runs) for runs in best) if best else None,
            sd=statistics.stdev(one.value for one in taken) if len(taken) > 1 else None,
            taken=taken,
            configurations=len(by_configuration),
            failed=len(ended) - len(finished),
            missing=len(cell.runs) - len(ended),
        )

    def median(self, row: SuiteRow, family: str, arm: str) -> float | None:
        """Give the figure of a cell; None where the suite has no such cell, or nothing of it finished."""
        found = self.scores.get((row, family, arm))
        return None if found is None else found.median

    def gain(self, row: SuiteRow, family: str, arm: str) -> Gain | None:
        cells = self.plan.cells_of(row.task, family)
        if CONTROLS[arm] not in cells or arm not in cells:
            return None
        of_control = {_pairing(run): (run, record) for run, record in self.ended(cells[CONTROLS[arm]])}
        pairs: list[tuple[PlannedRun, PlannedRun]] = []
        differences = []
        for run, record in self.ended(cells[arm]):
            if (twin := of_control.get(_pairing(run))) is not None:
                one, other = (row_score(each, row.group) for each in (record, twin[1]))
                if one is not None and other is not None:
                    pairs.append((run, twin[0]))
                    differences.append(one - other)
        if not pairs:
            return None
        return Gain(statistics.mean(differences), len(pairs), self._contrast(pairs, row.group))

    def _contrast(self, pairs: Sequence[tuple[PlannedRun, PlannedRun]], group: str) -> Difference | None:
        """Compare runs on validation, pair by pair; None where their predictions are not all here, or not alike."""
        try:
            found = [read_predictions(RunLayout(self.root / run.key).predictions) for pair in pairs for run in pair]
        except ArtifactError:
            return None
        aligned = align([one.only("validation", group) for one in found])
        if aligned is None or aligned[0].labels is None:
            return None
        logits = [one.logits for one in aligned]
        task = Task.from_dict(self.records[pairs[0][0].key].task)
        groups = None if group else aligned[0].groups
        seeds = [run.seed for run, _ in pairs]
        arms = PairedArms(task, aligned[0].labels, logits[::2], logits[1::2], groups, seeds, aligned[0].offsets)
        return contrast([arms], draws=_DRAWS)


def _groups_of(record: RunRecord) -> list[str]:
    metric = next(iter(record.task.get("metrics", ())), None)
    return [name.removeprefix(f"{metric}_") for name in record.metrics if name.startswith(f"{metric}_")]


def row_score(record: RunRecord, group: str) -> float | None:
    """Give a run's validation score in points, on all rows or on one group of them."""
    if not group:
        return record.score
    values = [record.metrics.get(f"{name}_{group}") for name in record.task.get("metrics", ())]
    kept = [value for value in values if value is not None]
    return 100 * statistics.mean(kept) if values and len(kept) == len(values) else None


def _pairing(run: PlannedRun) -> tuple[Any, ...]:
    """Say what a distilled run and its control have in common: everything but the distillation and its copies."""
    own = ("distil.", "data.augment")
    return (run.seed, *((key, str(value)) for key, value in run.settings if not key.startswith(own)))
