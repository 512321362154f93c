"""The report of a search: what was best, and how it went; Markdown, HTML and CSV."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kdlora.experiment.study import best_first, settings_of
from kdlora.report.page import Cell, Link, Page, Paragraph, Prose, Section, Table, to_csv, write_page
from kdlora.report.plots import Series, Style, learning_curves
from kdlora.report.wording import arm_title
from kdlora.searchconfig import SearchConfig
from kdlora.system.storage import write_text_atomic

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_SHOWN = 20


def write_search_report(
    folder: Path, title: str, arm: str, search: SearchConfig, trials: Sequence[FrozenTrial]
) -> tuple[Path, ...]:
    """Write `search.md`, `search.html` and `trials.csv`."""
    ranked = best_first(trials)
    failed = [one for one in trials if one.state.name == "FAIL" and "error" in one.user_attrs]
    told = [f"Trial {one.number} failed: {one.user_attrs['error']}" for one in failed[:_SHOWN]]
    groups = {
        "the best trial": ranked[:1],
        "other finished trials": ranked[1:],
        "pruned trials": [one for one in trials if one.state.name == "PRUNED"],
    }
    curves = [
        Series(name, Style(number), tuple(point for one in members for point in one.intermediate_values.items()))
        for number, (name, members) in enumerate(groups.items())
        if members
    ]
    plot = learning_curves(curves, title="Score by epoch", value="score on the held-out rows", identity="epochs")
    blocks = [_trial_table(ranked, search), *(Paragraph(text, "warning") for text in told), plot]
    page = Page(
        f"Search: {title}", "search", _lead(trials, ranked, search, arm), (Section("Trials", "trials", blocks),)
    )
    report = write_page(page, folder / "search.md", folder / "search.html")
    write_text_atomic(folder / "trials.csv", to_csv(_lines(trials, search)))
    return (*report.paths, folder / "trials.csv")


def _value(trial: FrozenTrial) -> float:
    return float(trial.value or 0.0)


def _setting(trial: FrozenTrial, search: SearchConfig, key: str) -> str:
    value = settings_of(search, trial.params).get(key, "–")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lead(trials: Sequence[FrozenTrial], ranked: Sequence[FrozenTrial], search: SearchConfig, arm: str) -> Prose:
    pruned = sum(one.state.name == "PRUNED" for one in trials)
    counted = f"{len(ranked)} trials finished, {pruned} were pruned"
    if not ranked:
        return Prose("There is <strong>no best config yet</strong>: {}.").format(counted)
    return Prose(
        "{}: the best of {} scores <strong>{:.2f}</strong> on the held-out rows, the median {:.2f}: "
        "<strong>{}</strong>. Trials were judged on {:.0%} of the training rows, held out; the validation and "
        "test rows of the config were not scored. The best of many is too high: report what best.yaml scores on them. "
        "A trial is one seed: no verdict on the difference of two."
    ).format(
        *(arm_title(arm), counted, _value(ranked[0]), statistics.median(map(_value, ranked))),
        ", ".join(f"{key} {_setting(ranked[0], search, key)}" for key in search.space),
        search.validation_fraction,
    )


def _trial_table(ranked: Sequence[FrozenTrial], search: SearchConfig) -> Table:
    def number(one: FrozenTrial) -> Cell:
        name, folder = str(one.number), one.user_attrs.get("folder")
        link = Link(name, quote(f"{folder}/trial.json"), f"trial {name}")
        return Cell(name, (link,) if folder else ())

    columns: dict[str, Callable[[FrozenTrial], Cell | str]] = {
        "trial": number,
        "score": lambda one: f"{_value(one):.2f}",
        **{key: lambda one, key=key: _setting(one, search, key) for key in search.space},  # type: ignore[misc]
    }
    told = f"The best {_SHOWN} of {len(ranked)}; trials.csv has all." if len(ranked) > _SHOWN else ""
    return Table.of("Trials that finished, the best first", ranked[:_SHOWN], columns, note=told)


def _lines(trials: Sequence[FrozenTrial], search: SearchConfig) -> list[Sequence[Any]]:
    lines: list[Sequence[Any]] = [("trial", "state", "score", "epochs", *search.space, "error")]
    for one in trials:
        settings = settings_of(search, one.params)
        values = [settings.get(key) for key in search.space]
        plain = (value if isinstance(value, int | float | None) else str(value) for value in values)
        head = (one.number, one.state.name.lower(), one.value, len(one.intermediate_values))
        lines.append((*head, *plain, one.user_attrs.get("error")))
    return lines
