"""The report of one or several experiments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdlora.evidence.records import ExperimentLayout
from kdlora.report.blocks import Cell, Page, Row, Section, Strong, Table, Text
from kdlora.report.collect import Experiment, load_experiments
from kdlora.report.findings import retention
from kdlora.report.paper import ARMS, published_scores
from kdlora.report.render import Report, write_page
from kdlora.report.sections import experiment_section
from kdlora.report.tables import SEEDS_NOTE, Links
from kdlora.report.wording import arm_title, plus_minus


def make_report(folders: Sequence[Path | str], *, out: Path | str | None = None, draws: int = 2_000) -> Report:
    """Write `report.md` and `report.html` of experiments.

    Args:
        folders: experiment folders; different tasks get sections of their own.
        out: folder to write to; by default that of the one experiment, or the folder that holds all of them.
        draws: bootstrap draws.

    Returns:
        Both texts and where they lie.

    Raises:
        ArtifactError: a folder that is not an experiment, or a record that cannot be read.
        OSError: the folder cannot be written, or the disk is full; nothing half-written is left.
    """
    experiments = load_experiments(folders)
    places = list(dict.fromkeys(map(Path, folders)))
    common = places[0] if len(places) == 1 else os.path.commonpath([place.resolve().parent for place in places])
    base = Path(common if out is None else out)
    sections = [experiment_section(one, number=n, base=base, draws=draws) for n, one in enumerate(experiments, start=1)]
    if len(sections) == 1:  # its answer is the page's first sentence
        whole = sections[0]
        lead = whole.blocks[0].parts  # type: ignore[union-attr]
        short = Section("In short", whole.anchor, whole.blocks[1:])
        page = Page(whole.title, "report", lead, (short, *whole.sections))
    else:
        overview = Section("All experiments", "all", (_joint_table(experiments, base),))
        page = Page(f"{len(experiments)} experiments", "report", _joint_answer(experiments), (overview, *sections))
    layout = ExperimentLayout(base)
    return write_page(page, layout.report_md, layout.report_html)


def _joint_answer(experiments: Sequence[Experiment]) -> Text:
    kept = [
        value.mean
        for one in experiments
        if one.student_arm is not None and (value := retention(one, one.student_arm, "fft")) is not None
    ]
    if not kept:
        return ("There is ", Strong("no answer yet"), ": no experiment has both a student and a teacher that finished.")
    span = f"from {min(kept):.1f}% to {max(kept):.1f}%, {len(kept)} of {len(experiments)} experiments"
    return (
        "On average over the experiments, the student keeps ",
        Strong(f"{np.mean(kept):.1f}%"),
        f" of its teacher’s score ({span}).",
    )


def _joint_table(experiments: Sequence[Experiment], base: Path) -> Table:
    """Show all experiments in the form of the paper's Table 1, with the mean where every cell is filled."""
    arms = [*ARMS, *sorted({arm for one in experiments for arm in one.arms} - set(ARMS))]
    rows: list[Row] = []
    for number, one in enumerate(experiments, start=1):
        links = Links(base, f"e{number}-runs")
        cells = [Cell(plus_minus(one.score(arm)), links.to_all(one.finished(arm))) for arm in arms]
        kept = retention(one, one.student_arm, "fft") if one.student_arm else None
        rows.append((one.name, *cells, links.derived(plus_minus(kept, unit="%"))))
    if len({one.task.name or one.name for one in experiments}) == len(experiments):
        means = [
            _mean([None if (score := one.score(arm)) is None else score.mean for one in experiments]) for arm in arms
        ]
        rows.append((Cell("mean", strong=True), *(Cell(mean, strong=True) for mean in means), ""))
        if all(one.task.name for one in experiments):
            published = [published_scores(one.task.name).get("bert", {}) for one in experiments]
            means = [_mean([scores.get(arm) for scores in published]) for arm in arms]
            rows.append((Cell("paper, BERT, same tasks", quiet=True), *means, "–"))
    columns = ("experiment", *map(arm_title, arms), "kept of FFT")
    return Table("Scores, 0 to 100", columns, tuple(rows), note=SEEDS_NOTE)


def _mean(values: Sequence[float | None]) -> str:
    """Write the mean of a column; only where every row has a value, or the means could not be compared."""
    kept = [value for value in values if value is not None]
    return f"{np.mean(kept):.1f}" if len(kept) == len(values) else "–"
