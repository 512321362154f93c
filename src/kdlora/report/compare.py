"""Several experiments or single runs side by side, for a user's own decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdlora.config import DISTILLED_ARMS, STUDENT_ARMS
from kdlora.configfile import expand_home
from kdlora.errors import ArtifactError
from kdlora.evidence.records import RunLayout
from kdlora.evidence.stats import MeanSd
from kdlora.report.collect import Experiment, Run, load_experiment, load_single_run
from kdlora.report.findings import OTHER_ROWS, Comparison, pair_runs
from kdlora.report.page import (
    Block,
    Cell,
    Figure,
    Page,
    Paragraph,
    Prose,
    Report,
    Row,
    Section,
    Table,
    render,
    strong,
    write_page,
)
from kdlora.report.plots import Series, Style, arm_style, differences, learning_curves
from kdlora.report.tables import DISK, MEMORY, PARAMETERS, TIME, UNLIKE, compared, cost_plots
from kdlora.report.wording import INTERVALS, arm_title, model_title, plus_minus, score_title, signed, span

_OTHER_TEXTS = "not paired: other texts of the same ids"
_COSTS = {"parameters": PARAMETERS, "training memory": MEMORY, "latency, batch 1": TIME, "on disk": DISK}


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison: an arm of an experiment with its seeds, or a single run."""

    name: str
    experiment: Experiment
    arm: str
    runs: tuple[Run, ...]
    score: MeanSd


def compare(folders: Sequence[Path | str], *, out: Path | str | None = None, draws: int = 2_000) -> Report:
    """Put experiments and single runs into one table and one plot.

    The reference is what the first experiment shipped, or would ship (without any student, the first run). Every other
    row of the same task is paired with it, example by example, where the validation (or test) examples are the same.

    Args:
        folders: experiment folders, or folders of single runs with a `run.json`.
        out: folder for `compare.md` and `compare.html`; None writes nothing.
        draws: bootstrap draws.

    Returns:
        Both texts, and the paths where files were written.

    Raises:
        ArtifactError: none, a folder that is neither, or a record that cannot be read.
        OSError: the folder cannot be written.

    Examples:
        >>> report = compare(["runs/reviews"], out="runs/compared")
    """
    base = expand_home(out) if out is not None else Path.cwd()
    page = _page(_load(folders, base), draws)
    return render(page) if out is None else write_page(page, base / "compare.md", base / "compare.html")


def _load(folders: Sequence[Path | str], base: Path) -> list[Experiment]:
    places = [RunLayout(folder) for folder in dict.fromkeys(map(expand_home, folders))]
    if not places:
        raise ArtifactError("expected at least one experiment or run folder, got none")
    found = [load_single_run(one, base) if one.record.is_file() else load_experiment(one.root, base) for one in places]
    names = [experiment.name for experiment in found]
    return [
        replace(one, name=f"{one.name} ({one.layout.root.name}, {number})") if names.count(one.name) > 1 else one
        for number, one in enumerate(found, start=1)
    ]


def _page(experiments: Sequence[Experiment], draws: int) -> Page:
    candidates = [
        Candidate(
            one.name if len(one.runs) == 1 else f"{one.name}: {arm_title(arm)}", one, arm, one.finished(arm), score
        )
        for one in experiments
        for arm in one.arms
        if (score := one.score(arm)) is not None
    ]
    if not candidates:
        nothing = Prose("There is <strong>nothing to compare</strong>: no run has finished.")
        return Page("Comparison", "comparison", nothing, ())
    reference = next((one for one in candidates if one.arm == one.experiment.student_arm), candidates[0])
    paired = {one.name: _against(one, reference, draws) for one in candidates if one is not reference}
    states = [
        Paragraph(f"{one.name}, {arm_title(run.record.arm)}, seed {run.record.seed}: {run.record.status}", "warning")
        for one in experiments
        for run in one.unfinished
    ]
    blocks = [*states, _table(candidates, reference, paired), *_plots(candidates, paired)]
    lead = _lead(candidates, reference, paired)
    return Page(f"Comparison with {reference.name}", "comparison", lead, (Section("All rows", "rows", blocks),))


def _against(one: Candidate, reference: Candidate, draws: int) -> Comparison:
    """Pair a row with the reference; rows of another task, split or metric are left alone."""
    mine, theirs = one.experiment, reference.experiment
    reasons: dict[str, list[Any]] = {
        "another task or order of labels": [(it.task.kind, it.task.label_names) for it in (mine, theirs)],
        f"scored by {score_title(mine.task)}": [it.task.metrics for it in (mine, theirs)],
        f"scored on {mine.split}": [it.split for it in (mine, theirs)],
    }
    if reason := next((told for told, both in reasons.items() if both[0] != both[1]), ""):
        return Comparison(one.name, reference.name, None, float("nan"), reason)
    if _differ(mine, theirs):
        return Comparison(one.name, reference.name, None, one.score.mean - reference.score.mean, _OTHER_TEXTS)
    return pair_runs(theirs.task, theirs.split, (one.name, one.runs), (reference.name, reference.runs), draws=draws)


def _differ(one: Experiment, other: Experiment) -> bool:
    """Say whether two experiments have other texts under an id: row numbers are ids of any file."""
    shared = (key for key in one.examples.keys() & other.examples.keys() if key[0] == one.split)
    texts = ([(found.text, found.text_pair) for found in (one.examples[key], other.examples[key])] for key in shared)
    return any(mine != theirs for mine, theirs in texts)


def _lead(candidates: Sequence[Candidate], reference: Candidate, paired: dict[str, Comparison]) -> Prose:
    known = [one for one in candidates if one.name in paired and paired[one.name].plain == paired[one.name].plain]
    if not known:
        return Prose("No row can be compared with <strong>{}</strong>.").format(reference.name)
    rows, what = [reference, *known], "rows"
    if len(students := [one for one in rows if one.arm in STUDENT_ARMS]) > 1:
        rows, what = students, "students"  # a teacher is nearly always above them, and never ships
    best = max(rows, key=lambda one: one.score.mean)
    apart = sum(paired[one.name].reason in (OTHER_ROWS, _OTHER_TEXTS) for one in rows if one is not reference)
    among = f"{what}, {apart} of them scored on other rows" if apart else f"comparable {what}"
    equal = sum(one.score.mean == best.score.mean for one in rows) - 1
    told = strong(best.name) + f" scores highest of {len(rows)} {among} ({plus_minus(best.score)}"
    told += f", as {equal} more)" if equal else ")"
    if best is reference:
        return told + "."
    found = paired[best.name]
    why = span(found.difference) if found.difference else found.reason
    is_of_all = math.isclose(found.plain, best.score.mean - reference.score.mean, abs_tol=1e-6)
    both = "" if is_of_all else " on the seeds that both have"
    return told + Prose(", <strong>{} points</strong> against {}{} ({}).").format(
        signed(found.plain), reference.name, both, why
    )


def _table(candidates: Sequence[Candidate], reference: Candidate, paired: dict[str, Comparison]) -> Table:
    rows: list[Row] = []
    for one in candidates:
        name, score, difference = one.name, plus_minus(one.score), ("reference", "–", "–")
        if one is reference:
            name, score = strong(name), strong(score)
        else:
            difference = compared(paired[one.name])
        costs = (cost.text(one.runs) for cost in _COSTS.values())
        model = model_title(one.runs[0].record.model)
        rows.append((name, model, Cell(score, one.experiment.links(one.runs)), *difference, *costs))
    columns = ("row", "model", "score", "difference", "95% interval", "p", *_COSTS)
    unlike = "" if TIME.is_alike(*(one.runs for one in candidates)) else UNLIKE
    note = "± is the sample standard deviation over seeds. Differences are in points, over shared seeds. "
    titles = {score_title(one.experiment.task) for one in candidates}
    splits = {one.experiment.split for one in candidates}
    caption = f"Score: {' or '.join(sorted(titles))}, 0 to 100, on {' or '.join(sorted(splits))}"
    return Table(caption, columns, tuple(rows), text_columns=2, note=f"{note}{INTERVALS}{unlike}")


def _text_curve(group: Sequence[Candidate], identity: str, suffix: str) -> Figure | None:
    """Draw the students' scores over the texts that they learnt from, where these differ."""
    split = group[0].experiment.split
    curves: dict[tuple[str, bool, str, str], list[tuple[float, float]]] = {}
    for one in group:
        distilled = one.arm in DISTILLED_ARMS
        for record, score in ((run.record, run.score(split)) for run in one.runs if one.arm in STUDENT_ARMS):
            teacher, rows = record.config.get("teacher") or {}, record.rows
            alone = distilled and (record.config.get("distil") or {}).get("alpha") == 0
            source = Path(str(teacher.get("probabilities") or record.teacher_model))
            key = one.arm, alone, "/".join(source.parts[-2:]) if distilled else "", model_title(record.model)
            texts = rows.get("train", 0) + (rows.get("unlabelled", 0) if distilled else 0)  # copies are no texts
            if score is not None:
                curves.setdefault(key, []).append((texts, score))
    if len({texts for points in curves.values() for texts, _ in points}) < 2:
        return None
    taught_by, models = ({key[place] for key in curves} - {""} for place in (2, 3))
    drawn, arms = [], [key[0] for key in curves]
    for place, ((arm, alone, source_of, model), points) in enumerate(curves.items()):
        style = arm_style(arm) if arms.count(arm) == 1 else Style(place)
        style = replace(style, dashed=alone)
        parts = [arm_title(arm), "no labels" if alone else ""]
        parts += [source_of if len(taught_by) > 1 else "", model if len(models) > 1 else ""]
        drawn.append(Series(", ".join(filter(None, parts)), style, tuple(points)))
    title, across = f"Score against texts{suffix}", "texts that were labelled, by people or the teacher"
    return learning_curves(drawn, title=title, value=f"score on {split}", identity=identity, across=across, of="run")


def _plots(candidates: Sequence[Candidate], paired: dict[str, Comparison]) -> list[Block | None]:
    tasks: dict[tuple[object, ...], list[Candidate]] = {}
    for one in candidates:
        task = one.experiment.task
        tasks.setdefault((task.name, task.kind, task.metrics, task.label_names, one.experiment.split), []).append(one)
    drawn: list[Block | None] = []
    for number, group in enumerate(tasks.values()):
        shown = group[0].experiment
        suffix = f": {shown.task.name or shown.name}" if len(tasks) > 1 else ""
        rows = [(row.name, Style(place), row.runs) for place, row in enumerate(group)]
        drawn += cost_plots(rows, shown.split, f"task-{number}", suffix)
        drawn.append(_text_curve(group, f"task-{number}-texts", suffix))
    known = [(found.first, found.difference) for found in paired.values() if found.difference is not None]
    return [*drawn, differences(known, "Differences from the reference", right="better than the reference")]
