"""The report of a search: what was best, how it went, what each key does; Markdown, HTML and CSV."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlora.experiment.study import best_first, settings_of
from kdlora.report.page import (
    Block,
    Cell,
    Figure,
    Link,
    Page,
    Paragraph,
    Prose,
    Row,
    Section,
    Table,
    to_csv,
    write_page,
)
from kdlora.report.plots import Curve, Style, draw, learning_curves, log_ticks, padded, scatter, shorten
from kdlora.report.tables import Links
from kdlora.report.wording import arm_title
from kdlora.searchconfig import Range, SearchConfig
from kdlora.system.storage import write_text_atomic

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_SHOWN = 20


def write_search_report(folder: Path, title: str, arm: str, search: SearchConfig, study: Study) -> tuple[Path, ...]:
    """Write `search.md`, `search.html` and `trials.csv`."""
    trials = study.get_trials(deepcopy=False)
    ranked = best_first(trials)
    sections = (
        Section("Trials", "trials", (_trial_table(ranked, search, Links(folder, "trials")), *_failed(trials))),
        Section("What each key does", "keys", tuple(_keys(study, ranked, search))),
        Section("Course of the search", "course", tuple(_course(trials, ranked))),
    )
    page = Page(f"Search: {title}", "search", _lead(trials, ranked, search, arm), sections)
    report = write_page(page, folder / "search.md", folder / "search.html")
    write_text_atomic(folder / "trials.csv", to_csv(_lines(trials, search)))
    return (*report.paths, folder / "trials.csv")


def _value(trial: FrozenTrial) -> float:
    return float(trial.value or 0.0)


def _settings(trial: FrozenTrial, search: SearchConfig) -> list[str]:
    values = settings_of(search, trial.params)
    return [_short(values[key]) if key in values else "–" for key in search.space]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lead(trials: Sequence[FrozenTrial], ranked: Sequence[FrozenTrial], search: SearchConfig, arm: str) -> Prose:
    pruned = sum(one.state.name == "PRUNED" for one in trials)
    counted = f"{len(ranked)} trials finished, {pruned} were pruned"
    if not ranked:
        return Prose("There is <strong>no best config yet</strong>: {}.").format(counted)
    settings = zip(search.space, _settings(ranked[0], search), strict=True)
    return Prose(
        "{}: the best of {} scores <strong>{:.2f}</strong> on the held-out rows, the median {:.2f}: "
        "<strong>{}</strong>. Trials were judged on {:.0%} of the training rows, held out; the validation and "
        "test rows of the config were not scored. The best of many is too high: report what best.yaml scores on them. "
        "A trial is one seed: no verdict on the difference of two."
    ).format(
        arm_title(arm),
        counted,
        _value(ranked[0]),
        statistics.median(_value(one) for one in ranked),
        ", ".join(f"{key} {value}" for key, value in settings),
        search.validation_fraction,
    )


def _trial_table(ranked: Sequence[FrozenTrial], search: SearchConfig, links: Links) -> Table:
    lines: list[Row] = []
    for one in ranked[:_SHOWN]:
        link: tuple[Link, ...] = ()
        if "folder" in one.user_attrs:
            address = links.file(links.base / one.user_attrs["folder"] / "trial.json")
            link = (Link(str(one.number), address, f"trial {one.number}"),)
        lines.append((Cell(str(one.number), link), f"{_value(one):.2f}", *_settings(one, search)))
    columns = ("trial", "score", *search.space)
    told = f"The best {_SHOWN} of {len(ranked)}; trials.csv has all." if len(ranked) > _SHOWN else ""
    return Table("Trials that finished, the best first", columns, tuple(lines), note=told)


def _failed(trials: Sequence[FrozenTrial]) -> list[Block]:
    found = [one for one in trials if one.state.name == "FAIL" and "error" in one.user_attrs]
    return [Paragraph(f"Trial {one.number} failed: {one.user_attrs['error']}", "warning") for one in found[:_SHOWN]]


def _keys(study: Study, ranked: Sequence[FrozenTrial], search: SearchConfig) -> list[Block]:
    if not ranked:
        return [Paragraph("No trial has finished.", "note")]
    blocks: list[Block] = []
    if importances := _importances(study):
        lines = tuple((key, f"{100 * value:.0f}%") for key, value in importances.items())
        told = "Share of the differences in score that each key explains by itself (PED-ANOVA, Optuna’s default)."
        blocks.append(Table("Importance", ("key", "share"), lines, note=told, side=True))
    return [*blocks, *(_slice(ranked, search, key, number) for number, key in enumerate(search.space))]


def _importances(study: Study) -> dict[str, float]:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return dict(optuna.importance.get_param_importances(study))
        except (RuntimeError, ValueError, UserWarning):  # too few trials to tell, or all with one value
            return {}


def _slice(complete: Sequence[FrozenTrial], search: SearchConfig, key: str, number: int) -> Figure:
    """Plot the score against one key; the values of a list stand side by side."""
    space = search.space[key]
    values = [settings_of(search, trial.params)[key] for trial in complete]
    listed = [] if isinstance(space, Range) else list(space.values)
    places = [float(listed.index(value)) if listed else float(value) for value in values]

    def paint(axes: Any) -> None:
        scatter(axes, list(zip(places, map(_value, complete), strict=True)), Style(2))
        if listed:
            axes.set_xticks(range(len(listed)), [shorten(str(value), 14) for value in listed])
            axes.set_xlim(-0.5, len(listed) - 0.5)
        elif isinstance(space, Range) and space.log and space.high > space.low:
            margin = (space.high / space.low) ** 0.05
            log_ticks(axes, space.low / margin, space.high * margin)
        axes.set_ylim(*padded([_value(trial) for trial in complete], least=1.0))
        axes.set(xlabel=shorten(key, 48), ylabel="score on the held-out rows")

    best = max(complete, key=_value)
    chosen = _short(settings_of(search, best.params)[key])
    description = f"Score against {key} of {len(complete)} trials; the best has {chosen}."
    return draw(paint, key, description, f"slice-{number}", caption="Each mark is a trial.")


def _course(trials: Sequence[FrozenTrial], ranked: Sequence[FrozenTrial]) -> list[Block]:
    blocks: list[Block] = []
    if ranked:
        blocks.append(_history(sorted(ranked, key=lambda one: one.number)))
    groups = {
        "the best trial": ranked[:1],
        "other finished trials": ranked[1:],
        "pruned trials": [one for one in trials if one.state.name == "PRUNED"],
    }
    curves = [
        Curve(name, Style(number), tuple(tuple(sorted(one.intermediate_values.items())) for one in members))
        for number, (name, members) in enumerate(groups.items())
        if members
    ]
    plot = learning_curves(curves, title="Score by epoch", value="score on the held-out rows", identity="epochs")
    return [*blocks, plot] if plot is not None else blocks


def _history(complete: Sequence[FrozenTrial]) -> Figure:
    numbers, scores = [one.number for one in complete], [_value(one) for one in complete]
    best = list(itertools.accumulate(scores, max))

    def paint(axes: Any) -> None:
        scatter(axes, list(zip(numbers, scores, strict=True)), Style(2), label="trials", zorder=3)
        axes.plot(numbers, best, color=Style(0).colour, linewidth=2.2, label="best")
        axes.set_ylim(*padded(scores, least=1.0))
        axes.set(xlabel="trial", ylabel="score on the held-out rows")

    description = f"Score of {len(complete)} finished trials in their order; the best so far ends at {best[-1]:.2f}."
    return draw(paint, "Score by trial", description, "history")


def _lines(trials: Sequence[FrozenTrial], search: SearchConfig) -> list[Sequence[Any]]:
    lines: list[Sequence[Any]] = [("trial", "state", "score", "epochs", *search.space, "error")]
    for one in trials:
        settings = settings_of(search, one.params)
        values = [settings.get(key) for key in search.space]
        lines.append(
            (
                *(one.number, one.state.name.lower(), one.value, len(one.intermediate_values)),
                *(value if isinstance(value, int | float | None) else str(value) for value in values),
                one.user_attrs.get("error"),
            )
        )
    return lines
