"""Several experiments or single runs side by side, for a user's own decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlora.config import STUDENT_ARMS
from kdlora.evidence.stats import mean_sd
from kdlora.report.answer import time_of_one, total_parameters, training_memory
from kdlora.report.blocks import Block, Cell, Figure, Inline, Page, Paragraph, Section, Strong, Table, to_markdown
from kdlora.report.collect import Experiment, Run, load_runs
from kdlora.report.experiment_tables import Links
from kdlora.report.findings import Comparison, mean_cost, pair_runs
from kdlora.report.plots import Series, Style, differences, score_against_cost
from kdlora.report.report import Report, footer, to_html, write_page
from kdlora.report.wording import (
    INTERVALS,
    arm_title,
    count,
    interval_cell,
    milliseconds,
    model_title,
    over_seeds,
    p_value,
    plus_minus,
    score_title,
    signed,
    size,
    span,
)


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison: an arm of an experiment with its seeds, or a single run."""

    name: str
    experiment: Experiment
    arm: str
    runs: tuple[Run, ...]


def compare(folders: Sequence[Path | str], *, out: Path | str | None = None, draws: int = 2_000) -> Report:
    """Put experiments and single runs into one table and one plot.

    The first student (or, without one, the first run) is the reference; every other row of the same task is
    paired with it, example by example, where the validation (or test) examples are the same.

    Args:
        folders: experiment folders, or folders of single runs with a `run.json`.
        out: folder for `compare.md` and `compare.html`; None writes nothing.
        draws: bootstrap draws.

    Returns:
        Both texts, and the paths where files were written.

    Raises:
        ArtifactError: a folder that is neither, a record that cannot be read, or nothing that finished.
        OSError: the folder cannot be written.
    """
    base = Path(out) if out is not None else Path.cwd()
    page = _page(load_runs(folders), base, draws)
    if out is None:
        return Report(to_markdown(page), to_html(page), ())
    return write_page(page, base / "compare.md", base / "compare.html")


def _page(experiments: Sequence[Experiment], base: Path, draws: int) -> Page:
    """Build the page."""
    candidates = [candidate for one in experiments for candidate in _candidates(one)]
    origin, written = footer()
    if not candidates:
        lead: tuple[Inline, ...] = ("There is ", Strong("nothing to compare"), ": no run has finished.")
        return Page("Comparison", f"{origin} comparison", lead, (), written)
    reference = next((one for one in candidates if one.arm in STUDENT_ARMS), candidates[0])
    paired = {one.name: _against(one, reference, draws) for one in candidates if one is not reference}
    links = Links(base, "rows")
    warnings = tuple(
        Paragraph((f"{one.name}, {arm_title(run.record.arm)}, seed {run.record.seed}: {run.record.status}",), "warning")
        for one in experiments
        for run in one.unfinished()
    )
    blocks: list[Block] = [*warnings, _table(candidates, reference, paired, links), *_plots(candidates, paired)]
    section = Section("All rows", "rows", tuple(blocks))
    title = f"Comparison with {reference.name}"
    return Page(title, f"{origin} comparison", _lead(candidates, reference, paired), (section,), written)


def _candidates(experiment: Experiment) -> list[Candidate]:
    """List the arms of an experiment that have a finished run."""
    found = []
    for arm in experiment.arms:
        runs = experiment.finished(arm)
        if runs:
            is_single = len(experiment.runs) == 1
            name = experiment.name if is_single else f"{experiment.name}: {arm_title(arm)}"
            found.append(Candidate(name, experiment, arm, runs))
    return found


def _against(one: Candidate, reference: Candidate, draws: int) -> Comparison:
    """Pair a row with the reference; rows of another task, split or metric are left alone."""
    mine, theirs = one.experiment, reference.experiment
    if (mine.task.kind, mine.task.metrics, set(mine.task.label_names)) != (
        theirs.task.kind,
        theirs.task.metrics,
        set(theirs.task.label_names),
    ):
        return Comparison(one.name, reference.name, None, float("nan"), "another task")
    if mine.split != theirs.split:
        return Comparison(one.name, reference.name, None, float("nan"), f"scored on {mine.split}")
    found = pair_runs(theirs.task, theirs.split, (one.name, one.runs), (reference.name, reference.runs), draws=draws)
    return Comparison(one.name, reference.name, found.difference, found.plain, found.reason)


def _lead(candidates: Sequence[Candidate], reference: Candidate, paired: dict[str, Comparison]) -> tuple[Inline, ...]:
    """Name the best row that is comparable with the reference."""
    same = [
        reference,
        *(one for one in candidates if one.name in paired and paired[one.name].plain == paired[one.name].plain),
    ]
    best = max(same, key=_score)
    if len(same) == 1:
        return ("No row can be compared with ", Strong(reference.name), ".")
    if best is reference:
        return (Strong(best.name), f" scores highest of {len(same)} comparable rows ({_shown(best)}).")
    found = paired[best.name]
    told = span(found.difference) if found.difference else found.reason
    return (
        Strong(best.name),
        f" scores highest of {len(same)} comparable rows ({_shown(best)}), ",
        Strong(f"{signed(found.plain)} points"),
        f" against {reference.name} ({told}).",
    )


def _score(one: Candidate) -> float:
    """Average the score of a row."""
    values = [value for run in one.runs if (value := run.score(one.experiment.split)) is not None]
    return mean_sd(values).mean


def _shown(one: Candidate) -> str:
    """Write the score of a row with its spread."""
    values = [value for run in one.runs if (value := run.score(one.experiment.split)) is not None]
    return plus_minus(mean_sd(values))


def _table(candidates: Sequence[Candidate], reference: Candidate, paired: dict[str, Comparison], links: Links) -> Table:
    """Show every row with score, difference and costs."""
    rows = []
    for one in candidates:
        is_reference = one is reference
        difference = (Cell("reference"), Cell("–"), Cell("–")) if is_reference else _difference(paired[one.name])
        costs = (
            over_seeds(mean_cost(one.runs, total_parameters), count),
            over_seeds(mean_cost(one.runs, training_memory), size),
            over_seeds(mean_cost(one.runs, time_of_one), milliseconds),
            over_seeds(mean_cost(one.runs, lambda run: run.record.size_bytes), size),
        )
        score = Cell(_shown(one), links.to_all(one.runs), strong=is_reference)
        model = Cell(model_title(one.runs[0].record.model))
        rows.append((Cell(one.name, strong=is_reference), model, score, *difference, *map(Cell, costs)))
    columns = (
        "row",
        "model",
        "score",
        "difference",
        "95% interval",
        "p",
        "parameters",
        "training memory",
        "latency, batch 1",
        "on disk",
    )
    note = f"± is the sample standard deviation over seeds. Differences are in points. {INTERVALS}"
    titles = {score_title(one.experiment.task.metrics) for one in candidates}
    splits = {one.experiment.split for one in candidates}
    caption = f"Score: {' or '.join(sorted(titles))}, 0 to 100, on {' or '.join(sorted(splits))}"
    return Table(caption, columns, tuple(rows), frozenset(range(2, len(columns))), note=note)


def _difference(one: Comparison) -> tuple[Cell, Cell, Cell]:
    """Show a difference with its interval, or why there is none."""
    if one.difference is not None:
        texts = (signed(one.plain), interval_cell(one.difference), p_value(one.difference.p))
    elif one.plain == one.plain:
        texts = (signed(one.plain), one.reason, "–")
    else:
        texts = ("–", one.reason, "–")
    return Cell(texts[0]), Cell(texts[1]), Cell(texts[2])


def _plots(candidates: Sequence[Candidate], paired: dict[str, Comparison]) -> list[Figure]:
    """Draw score against parameters and latency for each task, and the differences."""
    tasks: dict[tuple[str, ...], list[Candidate]] = {}
    for one in candidates:
        tasks.setdefault((one.experiment.task.name, *one.experiment.task.metrics, one.experiment.split), []).append(one)
    drawn = []
    for number, group in enumerate(tasks.values()):
        title = f": {group[0].experiment.task.name or group[0].experiment.name}" if len(tasks) > 1 else ""
        drawn.append(_cost_plot(group, total_parameters, f"Score against parameters{title}", number))
        drawn.append(_cost_plot(group, time_of_one, f"Score against latency{title}", number))
    rows = [(one.first, one.difference) for one in paired.values() if one.difference is not None]
    drawn.append(differences(rows, title="Differences from the reference", identity="differences"))
    return [one for one in drawn if one is not None]


def _cost_plot(
    group: Sequence[Candidate], read: Callable[[Run], float | None], title: str, number: int
) -> Figure | None:
    """Draw the rows of one task."""
    is_size = read is total_parameters
    series = []
    for place, one in enumerate(group):
        points = [
            (cost, score)
            for run in one.runs
            if (cost := read(run)) is not None and (score := run.score(one.experiment.split)) is not None
        ]
        series.append(Series(one.name, Style(place), tuple(points)))
    label = "parameters in all (millions)" if is_size else "median time of one text (ms)"
    return score_against_cost(
        series,
        title=title,
        cost=label,
        score=f"score on {group[0].experiment.split} (0 to 100)",
        identity=f"{'size' if is_size else 'time'}-{number}",
        scale=1e6 if is_size else 1.0,
    )
