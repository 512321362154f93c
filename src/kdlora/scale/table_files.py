"""A suite's tables as CSV, for programs, and as LaTeX, for papers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kdlora.evidence.paper import COSTS
from kdlora.evidence.records import RunRecord, write_text_atomic
from kdlora.evidence.wording import arm_title, model_title
from kdlora.scale.cost_table import finished_of, latency_ms, trainable_text
from kdlora.scale.figures import (
    Figure,
    family_title,
    figure,
    mean_of,
    published,
    settings_text,
    table_rows,
    typical,
)
from kdlora.scale.plan import Plan

Records = Mapping[str, RunRecord]


def write_files(plan: Plan, root: Path, records: Records) -> tuple[Path, ...]:
    """Write Tables 1 and 2 as CSV and LaTeX, and every run as one line of `runs.csv`.

    Args:
        plan: the suite's runs.
        root: the suite's folder.
        records: of the runs that have ended, by the run's key.
    """
    contents = {
        "table1.csv": to_csv(_score_lines(plan, records)),
        "table1.tex": _score_latex(plan, records),
        "table2.csv": to_csv(_cost_lines(plan, records)),
        "table2.tex": _cost_latex(plan, records),
        "runs.csv": to_csv(_run_lines(plan, records)),
    }
    for name, text in contents.items():
        write_text_atomic(root / name, text)
    return tuple(root / name for name in contents)


def to_csv(lines: Iterable[Sequence[Any]]) -> str:
    """Write lines as CSV; a text that a spreadsheet would take for a formula is made harmless.

    Args:
        lines: the header first; None is an empty field.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for line in lines:
        writer.writerow(["" if value is None else _harmless(value) for value in line])
    return stream.getvalue()


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


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
            found = finished_of(plan, records, family, arm)
            for rank in sorted({rank for _, _, rank in found}):
                of_rank = [(key, record) for key, record, one in found if one == rank]
                runs = [record for _, record in of_rank]
                head = (family, arm, runs[0].model, rank if runs[0].adapter_parameters else None)
                counts = (runs[0].trainable_parameters, runs[0].head_parameters, runs[0].total_parameters)
                memory = typical(runs, lambda one: one.peak_memory_bytes)
                times = [typical(runs, partial(latency_ms, rows=rows)) for rows in (1, 32)]
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


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def to_latex(text: str) -> str:
    """Make text harmless in LaTeX.

    Args:
        text: names from a suite, or figures.
    """
    flat = re.sub(r"\s+", " ", "".join(_LATEX.get(sign, sign) for sign in text))
    return flat.replace("−", "$-$").replace("±", r"$\pm$").replace("–", "--")


def _latex_table(caption: str, columns: Sequence[str], lines: Sequence[Sequence[str]], alignment: str) -> str:
    """Write a table of cells that are LaTeX already."""
    body = [" & ".join(line) + r" \\" for line in (columns, *lines)]
    return "\n".join(
        [
            "% \\usepackage{booktabs,hyperref}; the small numbers lead to the records of the runs.",
            r"\begin{table}",
            rf"\caption{{{to_latex(caption)}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _score_latex(plan: Plan, records: Records) -> str:
    columns = [(family, arm) for family in plan.suite.families for arm in plan.suite.arms]
    rows, lines = table_rows(plan, records), []
    for row in rows:
        figures = [figure(plan, records, plan.cells_of(row.task, family)[arm], row.group) for family, arm in columns]
        lines.append([to_latex(row.title), *map(_latex_figure, figures)])
        theirs = [published(plan, row, *column) for column in columns]
        if any(value is not None for value in theirs):
            lines.append([r"\quad paper", *map(_latex_number, theirs)])
    means = [
        mean_of([figure(plan, records, plan.cells_of(row.task, family)[arm], row.group).median for row in rows])
        for family, arm in columns
    ]
    lines.append([to_latex(f"Score, mean of {len(rows)} rows"), *map(_latex_number, means)])
    theirs = [mean_of([published(plan, row, *column) for row in rows]) for column in columns]
    if any(value is not None for value in theirs):
        lines.append([r"\quad paper, the same rows", *map(_latex_number, theirs)])
    titles = ["", *(to_latex(f"{family_title(plan, family)}: {arm_title(arm)}") for family, arm in columns)]
    caption = f"Median of the best {plan.suite.best} configurations, ± their standard deviation, number of runs"
    return _latex_table(caption, titles, lines, "l" + "r" * len(columns))


def _latex_figure(one: Figure) -> str:
    if one.median is None:
        return "failed" if one.failed else "--"
    spread = "" if one.sd is None else rf" $\pm$ {one.sd:.1f}"
    links = ", ".join(
        rf"\href{{{_latex_address(taken.run.key)}}}{{{number}}}" for number, taken in enumerate(one.taken, start=1)
    )
    return rf"{one.median:z.1f}{spread} ($n$ {len(one.taken)}) {{\tiny {links}}}"


def _latex_address(key: str) -> str:
    return f"{key}/run.json".replace("%", r"\%").replace("#", r"\#").replace("_", r"\_")


def _latex_number(value: float | None) -> str:
    return "--" if value is None else f"{value:z.1f}"


def _cost_latex(plan: Plan, records: Records) -> str:
    lines = []
    for family in plan.suite.families:
        for arm in plan.suite.arms:
            found = finished_of(plan, records, family, arm)
            if not found:
                continue
            runs = [record for _, record, _ in found]
            memory = typical(runs, lambda one: one.peak_memory_bytes)
            time = typical(runs, lambda one: latency_ms(one, 1))
            texts = [model_title(runs[0].model), arm_title(arm), trainable_text(found, arm)]
            texts += ["–" if memory is None else f"{memory / 1e6:.1f} MB", "–" if time is None else f"{time:.2f} ms"]
            link = rf"\href{{{_latex_address(found[0][0])}}}{{$n$ {len(runs)}}}"
            lines.append([*map(to_latex, texts), link])
            if line := _published_cost(plan, family, arm):
                lines.append([*map(to_latex, line), "--"])
    columns = ["model", "method", "trainable", "training memory", "latency", "runs"]
    return _latex_table("Costs", columns, lines, "llrrrr")


def _published_cost(plan: Plan, family: str, arm: str) -> list[str] | None:
    costs, place = COSTS.get(plan.family_of_paper(family)), {"fft": 0, "lora": 1, "kd-lora": 2}.get(arm)
    if costs is None or place is None:
        return None
    by_rank = {1: costs.lora_by_rank, 2: costs.kd_lora_by_rank}.get(place, (costs.trainable[0],))
    trainable = " / ".join(f"{value / 1e6:.1f}" for value in by_rank) + " M"
    return [
        "paper",
        arm_title(arm),
        trainable,
        f"{costs.memory_mb[place]:.1f} MB",
        f"{costs.seconds[place]:.2f} s in all",
    ]
