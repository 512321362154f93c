"""Table 2 of a suite: what each family's arms cost, in the paper's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kdlora.config import LORA_ARMS, Arm
from kdlora.evidence.blocks import Cell, Table
from kdlora.evidence.paper import COSTS, RANKS
from kdlora.evidence.records import RunRecord
from kdlora.evidence.tables import Links
from kdlora.evidence.wording import arm_title, count, milliseconds, model_title, size
from kdlora.scale.figures import family_title, typical
from kdlora.scale.plan import Plan
from kdlora.scale.run_tables import run_link

Records = Mapping[str, RunRecord]


def cost_table(plan: Plan, records: Records, links: Links) -> Table:
    """Show the costs in the form of the paper's Table 2, its own figures in the line below.

    Args:
        plan: the suite's runs.
        records: of the runs that have ended.
        links: where figures lead.
    """
    lines: list[tuple[Cell, ...]] = []
    quiet: set[int] = set()
    for family in plan.suite.families:
        for arm in plan.suite.arms:
            found = finished_of(plan, records, family, arm)
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


def finished_of(plan: Plan, records: Records, family: str, arm: str) -> list[tuple[str, RunRecord, Any]]:
    """List the finished runs of an arm and family on the first task that has any: key, record, LoRA rank.

    Args:
        plan: the suite's runs.
        records: of the runs that have ended.
        family: the family.
        arm: the arm.
    """
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
        trainable_text(found, arm),
        count(typical(runs, lambda one: one.head_parameters)),
        size(typical(runs, lambda one: one.peak_memory_bytes)),
        *(milliseconds(typical(runs, partial(latency_ms, rows=rows))) for rows in (1, 32)),
    )
    shown = tuple(run_link(links, key, number) for number, (key, _, _) in enumerate(found[:6], start=1))
    head = (Cell(family_title(plan, family)), Cell(arm_title(arm)), Cell(model_title(runs[0].model)))
    return (*head, *map(Cell, texts), Cell(f"n\u00a0{len(found)}", shown))


def trainable_text(found: Sequence[tuple[str, RunRecord, Any]], arm: Arm) -> str:
    """Write the trainable parameters, for each rank where the arm has adapters.

    Args:
        found: key, record and rank of runs.
        arm: the arm.
    """
    if arm not in LORA_ARMS:
        return count(found[0][1].trainable_parameters)
    by_rank = {rank: record.trainable_parameters for _, record, rank in found}
    return ", ".join(f"r\u00a0{rank}: {count(value)}" for rank, value in sorted(by_rank.items()))


def latency_ms(record: RunRecord, rows: int) -> float | None:
    """Give the median time of a forward pass of so many rows.

    Args:
        record: of a run.
        rows: in one pass.
    """
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
