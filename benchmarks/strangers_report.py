"""The figures of the benchmark `strangers`, from stored records and predictions, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import markdown, pair_up
from sklearn.metrics import f1_score
from strangers_plan import Job, Plan, plan_jobs

from kdlora.data.tasks import Task
from kdlora.errors import counted
from kdlora.evidence.metrics import predict_labels
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.records import ExperimentLayout, RunRecord, read_results
from kdlora.evidence.stats import PairedArms, contrast, mean_sd
from kdlora.report.shipped import Shipped, read_shipped
from kdlora.report.wording import signed

Figures = dict[str, Any]
Runs = list[tuple[RunRecord, Predictions]]
HALVES = ("tuning", "reported")
_LEGEND = """\
Test scores, 0 to 100, mean ± standard deviation over seeds; F1 is macro F1; seconds of one training. int8: score and
texts a second of the shipped student, quantised, and how many times those of the teacher in PyTorch. Differences in
points; of several sides the best on test counts. Intervals over rows and seeds: 95% each for sets and for tuning means;
{1:.2f}% for reported means: 95% for all {0} claims of the plan together (Bonferroni). One seed proves nothing."""


def collect(plan: Plan, out: Path, states: Mapping[Job, Figures], draws: int) -> Figures:
    """Gather what is kept of a measurement: scores, seconds and contrasts, but no predictions."""
    cells: dict[tuple[str, str], Figures] = {}
    pairs: dict[tuple[str, str, str], list[PairedArms]] = {}
    jobs = list(plan_jobs(plan))
    for pair, dataset in dict.fromkeys((job.pair, job.dataset) for job in jobs):
        cell, runs = _collect_cell([job for job in jobs if (job.pair, job.dataset) == (pair, dataset)], out, states)
        if not runs:
            continue
        cells[pair, dataset] = {"pair": pair, "set": dataset, "half": plan.sets[dataset].half, **cell, "contrasts": {}}
        for name, own in plan.contrasts.items():
            sides = [_best_side(cell, plan.pairs[pair].sides(names)) for names in (own.first, own.second)]
            if None not in sides:
                first, second = ({record.seed: found for record, found in runs[str(side)]} for side in sides)
                if own.share and len(second) == 1:
                    second = dict.fromkeys(first, *second.values())
                paired = pair_up(Task.from_dict(runs[str(sides[0])][0][0].task), first, second)
                if paired is None:
                    continue
                kept = {"first": sides[0], "second": sides[1], "seeds": len(paired.first)}
                cells[pair, dataset]["contrasts"][name] = _estimate([paired], draws, 0.95, own.share) | kept
                for group in ((pair, plan.sets[dataset].half), *[("", "all")] * own.share):
                    pairs.setdefault((*group, name), []).append(paired)
    levels = {"reported": 1 - 0.05 / count_claims(plan)}
    means = [
        {"pair": pair, "half": half, "contrast": name, **_estimate(parts, draws, level, plan.contrasts[name].share)}
        for (pair, half, name), parts in pairs.items()
        if (level := levels.get(half, 0.95))
    ]
    return {
        "unfinished": [job.name for job in jobs if not states[job]["finished"]],
        "cells": list(cells.values()),
        "means": means,
    }


def _collect_cell(jobs: Sequence[Job], out: Path, states: Mapping[Job, Figures]) -> tuple[Figures, dict[str, Runs]]:
    """Read a pair's experiments on a set; of settings with a grid the best point, once all are finished."""
    cell: Figures = {"experiments": {}, "sides": {}, "int8": None}
    found: dict[str, Runs] = {}
    for settings in dict.fromkeys(job.settings for job in jobs):
        own = [job for job in jobs if job.settings == settings]
        if not all(states[job]["finished"] for job in own):
            continue
        runs = {job: _read_runs(ExperimentLayout(out / "runs" / job.name)) for job in own}
        best = max(own, key=lambda job: np.mean([record.score or 0.0 for record, _ in runs[job]]))
        seconds = sum(states[job]["seconds"] for job in own)
        cell["experiments"][settings] = states[best] | {"point": dict(best.point), "seconds": seconds}
        shipped = read_shipped(ExperimentLayout(out / "runs" / best.name))
        cell["int8"] = _int8_figures(shipped) or cell["int8"]
        for record, predictions in runs[best]:
            found.setdefault(f"{settings}/{record.arm}", []).append((record, predictions))
            task = Task.from_dict(record.task)
            cell |= {"kind": task.kind, "labels": task.num_labels, "rows": record.rows, "made": _made(record)}
    cell["sides"] = {side: [_run_figures(*run) for run in runs] for side, runs in found.items()}
    return cell, found


def _int8_figures(shipped: Shipped) -> Figures | None:
    """Keep what the product measured: the quantised student beside the teacher in PyTorch, in the same rounds."""
    student = next((model for model in shipped.benchmark.models if model.precision == "int8"), None)
    teacher = next((model for model in shipped.benchmark.models if model.name == "teacher"), None)
    if student is None or teacher is None:
        return None
    rates = {"texts_per_second": student.texts_per_second, "teacher": teacher.texts_per_second}
    return {"score": student.score, "precision": teacher.precision, **rates}


def _read_runs(layout: ExperimentLayout) -> Runs:
    records = read_results(layout.results)
    return [(one, read_predictions(layout.run(one.arm, one.seed).predictions).only("test")) for one in records]


def _made(record: RunRecord) -> Figures:
    libraries = {name: record.versions.get(name) for name in ("kdlora", "torch", "transformers", "peft")}
    return {**record.git, **libraries, "cpu": record.machine.get("cpu"), "cores": record.machine.get("cores")}


def _run_figures(record: RunRecord, found: Predictions) -> Figures:
    """Keep a run's scores; macro F1 for two classes too, where a majority may hide a class that nobody learnt."""
    task, macro = Task.from_dict(record.task), None
    if task.kind == "single-label":
        decided = predict_labels(task, found.logits)
        macro = 100 * float(f1_score(found.labels, decided, average="macro", zero_division=0))
    scores = {"validation": record.score, "test": record.test_score, "macro_f1": macro}
    return {"seed": record.seed, **scores, "train_seconds": record.train_seconds}


def _best_side(cell: Figures, names: Sequence[str]) -> str | None:
    """Choose the side with the best mean on test, once all are there; `settings/shipped` is what the product chose."""
    known = {f"{name}/shipped": own["shipped"] for name, own in cell["experiments"].items() if own["shipped"]}
    sides = [f"{name.partition('/')[0]}/{known[name][0]}" if name in known else name for name in names]
    if not sides or any(side not in cell["sides"] for side in sides):
        return None
    return max(sides, key=lambda side: float(np.mean([run["test"] for run in cell["sides"][side]])))


def _estimate(pairs: Sequence[PairedArms], draws: int, level: float, share: bool) -> Figures:
    found = contrast(pairs, draws=draws, level=level, share=share)
    figures = {"difference": found.difference, "low": found.low, "high": found.high, "level": level}
    return figures | {"sets": len(pairs), "share": share}


def count_claims(plan: Plan) -> int:
    """Count contrasts x pairs that have a reported set and settings of both sides: what Bonferroni corrects for."""
    pairs = [own for own in plan.pairs.values() if any(plan.sets[name].half == "reported" for name in own.sets)]
    both = (pair.sides(own.first) and pair.sides(own.second) for pair in pairs for own in plan.contrasts.values())
    return max(1, sum(map(bool, both)))


def render(plan: Plan, figures: Figures) -> str:
    """Write the tables as Markdown."""
    cells = figures["cells"]
    lines = [f"{len(figures['unfinished'])} experiments are not finished."]
    for made in dict.fromkeys(", ".join(f"{key} {value}" for key, value in cell["made"].items()) for cell in cells):
        lines.append(f"Made by {made}.")
    for name in dict.fromkeys(cell["pair"] for cell in cells):
        pair, own = plan.pairs[name], [cell for cell in cells if cell["pair"] == name]
        student = pair.student or f"a student of its layers {', '.join(map(str, pair.layers or ()))}"
        means = [mean for mean in figures["means"] if mean["pair"] == name]
        lines += ["", f"### {name}: {pair.teacher} teaches {student}", "", _score_table(own), ""]
        lines.append(_contrast_table(plan, own, means))
    of_all = [mean for mean in figures["means"] if not mean["pair"]]
    lines += [f"{mean['contrast']}, mean of all pairs: {_difference(mean)}." for mean in of_all]
    lines.append(_LEGEND.format(count_claims(plan), 100 - 5 / count_claims(plan)))
    return "\n".join(lines)


def _score_table(cells: Sequence[Figures]) -> str:
    sides = list(dict.fromkeys(side for cell in cells for side in cell["sides"]))
    lines = []
    for cell in cells:
        several = f"{cell['labels'] // 2} types" if cell["kind"] == "tokens" else f"{cell['labels']} classes"
        kind = "regression" if cell["kind"] == "regression" else several
        rows = f"{cell['rows']['train']:,} / {cell['rows']['test']:,}"
        lines.append((cell["set"], cell["half"], kind, rows, *(_scores(cell, side) for side in sides)))
    return markdown(("set", "half", "kind", "train / test", *map(_short, sides)), lines, 4 + len(sides))


def _short(side: str) -> str:
    settings, arm = side.split("/")
    return f"`{arm}`" if settings in ("default", arm) else f"{settings}: `{arm}`"


def _scores(cell: Figures, side: str) -> str:
    """Write mean and spread on test, macro F1, what the grid chose, and the seconds of a training."""
    runs = cell["sides"].get(side)
    if not runs:
        return "–"
    found = mean_sd([run["test"] for run in runs])
    macro, seconds = ([run[key] for run in runs if run[key] is not None] for key in ("macro_f1", "train_seconds"))
    extra = [f"F1 {np.mean(macro):.1f}"] if macro else []
    extra += [f"at {value:g}" for value in cell["experiments"][side.split("/")[0]]["point"].values()]
    extra += [f"{np.mean(seconds):.0f} s"] if seconds else []
    spread = "" if found.sd is None else f" ± {found.sd:.1f}"
    return f"{found.mean:.1f}{spread}" + (f" ({', '.join(extra)})" if extra else "")


def _contrast_table(plan: Plan, cells: Sequence[Figures], means: Sequence[Figures]) -> str:
    lines: list[Sequence[str]] = []
    for cell in cells:
        experiments = cell["experiments"].values()
        shipped = next((f"`{own['shipped'][0]}`" for own in experiments if own["shipped"]), "–")
        seconds = sum(own["seconds"] for own in experiments)
        found = [_difference(cell["contrasts"].get(name)) for name in plan.contrasts]
        lines.append((cell["set"], shipped, *found, _int8(cell["int8"]), f"{seconds:,.0f}"))
    for half in HALVES:
        own = {mean["contrast"]: mean for mean in means if mean["half"] == half}
        if own:
            lines.append((f"**mean of {half}**", "", *(_difference(own.get(name)) for name in plan.contrasts), "", ""))
    header = ("set", "shipped", *plan.contrasts, "int8", "all, s")
    return markdown(header, lines, len(header))


def _int8(one: Figures | None) -> str:
    """Write the quantised student's score, and its texts a second against the teacher's."""
    if one is None:
        return "–"
    times = one["texts_per_second"] / one["teacher"]
    score = "" if one["score"] is None else f"{one['score']:.1f}; "
    return f"{score}{one['texts_per_second']:,.0f}/s, {times:.1f} x {one['precision']}"


def _difference(one: Figures | None) -> str:
    """Write a difference with its interval, what it was taken from, and that one seed proves nothing."""
    if one is None:
        return "–"
    value, low, high = (signed(one[name], plus=not one["share"]) for name in ("difference", "low", "high"))
    text = f"{value}{'%' * one['share']} ({low} to {high})"
    if "second" in one:
        text += f" {'of' if one['share'] else 'over'} {_short(one['second'])}"
    else:
        text += f", {counted(one['sets'], 'set')}"
    return text + (", n = 1" if one.get("seeds") == 1 else "")
