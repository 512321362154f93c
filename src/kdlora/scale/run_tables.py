"""The runs of a suite: links to their records, curves, configurations behind the figures, failures."""

from __future__ import annotations

from collections.abc import Mapping

from kdlora.evidence.blocks import Block, Cell, Link, Paragraph, Table
from kdlora.evidence.plots import Curve, arm_style, learning_curves
from kdlora.evidence.records import RunRecord
from kdlora.evidence.tables import Links
from kdlora.evidence.wording import arm_title
from kdlora.scale.figures import family_title, figure, settings_text
from kdlora.scale.plan import Plan

Records = Mapping[str, RunRecord]


def run_link(links: Links, key: str, number: int) -> Link:
    """Link to the record of a run.

    Args:
        links: makes addresses relative to the suite's folder.
        key: of the run.
        number: what is shown.
    """
    return Link(str(number), links.file(links.base / key / "run.json"), key)


def convergence_curves(plan: Plan, records: Records) -> tuple[Block, ...]:
    """Draw the validation score over the epochs, of the best configurations of each arm.

    Args:
        plan: the suite's runs.
        records: of the runs that have ended.
    """
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


def configuration_tables(plan: Plan, records: Records, links: Links) -> tuple[Block, ...]:
    """List which configurations each figure of Table 1 is the median of.

    Args:
        plan: the suite's runs.
        records: of the runs that have ended.
        links: where figures lead.
    """
    blocks: list[Block] = []
    for family in plan.suite.families:
        lines = []
        for task in plan.suite.tasks:
            for arm, cell in plan.cells_of(task, family).items():
                for number, one in enumerate(figure(plan, records, cell).taken, start=1):
                    link = (run_link(links, one.run.key, number),)
                    texts = (settings_text(one.run.settings), str(one.run.seed), f"{one.value:.2f}")
                    lines.append((Cell(f"{task}, {arm_title(arm)}"), *map(Cell, texts), Cell("", link)))
        columns = ("task and arm", "configuration", "seed", "score", "run")
        caption = f"{family_title(plan, family)}: the runs behind Table 1, the best first"
        blocks.append(Table(caption, columns, tuple(lines), frozenset({2, 3})))
    return tuple(blocks)


def failed_runs(plan: Plan, records: Records, links: Links) -> tuple[Block, ...]:
    """List the runs that failed, with their reasons; nothing where none did.

    Args:
        plan: the suite's runs.
        records: of the runs that have ended.
        links: where figures lead.
    """
    lines = []
    for run in plan.runs():
        record = records.get(run.key)
        if record is not None and record.status == "failed":
            name = f"{run.task}, {arm_title(run.arm)}, seed {run.seed}"
            texts = (name, settings_text(run.settings), record.error or "no reason was recorded")
            lines.append((*map(Cell, texts), Cell("", (run_link(links, run.key, 1),))))
    if not lines:
        return ()
    columns = ("run", "configuration", "why", "record")
    return (Table("Failed; the same command tries them again", columns, tuple(lines)),)
