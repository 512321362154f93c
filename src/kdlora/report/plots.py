"""Plots by matplotlib, as SVG whose text is text and whose colours are the page's, so that dark mode is free."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.errors import ConfigError
from kdlora.evidence.records import RunRecord
from kdlora.evidence.stats import Difference
from kdlora.report.page import Figure
from kdlora.report.wording import interval, signed
from kdlora.system.storage import atomic_file

_STYLES = files("kdlora.report").joinpath("templates/report.css").read_text(encoding="utf-8")
PALETTE = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", _STYLES.partition("@media")[0]))
"""The colours of a page in light mode, by the names of their CSS variables, which replace them there."""
_PICTURES = ("png", "svg", "pdf", "jpg", "webp")
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "text.color": PALETTE["ink"],
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.formatter.useoffset": False},
    **{"axes.facecolor": "none", "axes.edgecolor": PALETTE["faint"], "axes.labelcolor": PALETTE["soft"]},
    **{"xtick.color": PALETTE["faint"], "xtick.labelcolor": PALETTE["soft"], "xtick.major.pad": 6},
    **{"ytick.left": False, "ytick.labelcolor": PALETTE["soft"], "ytick.major.pad": 7, "grid.color": PALETTE["rule"]},
    **{"legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.2},
}
_WIDTH, _BOTTOM = 440, 50
_FAR = 20
"""Costs that are further apart stand on a logarithmic axis."""
_MARKERS = ("s", "D", "o", "^", "v", "p", "P")


@dataclass(frozen=True)
class Style:
    """How a series looks: a colour of the palette and a shape, so that colour is never the only sign."""

    number: int
    dashed: bool = False

    @property
    def colour(self) -> str:
        return PALETTE[f"series-{self.number % len(_MARKERS)}"]

    @property
    def marker(self) -> str:
        return _MARKERS[(self.number + self.number // len(_MARKERS)) % len(_MARKERS)]  # in each round by one further


def arm_style(arm: str) -> Style:
    arms = ("fft", "lora", "kd-lora", "student-lora", "student-fft", "kd-fft")
    return Style(arms.index(arm) if arm in arms else len(arms))


@dataclass(frozen=True)
class Series:
    """What is drawn in one look: (cost, score) of the runs of an arm, or (epoch, value) of all its seeds."""

    name: str
    style: Style
    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, name: str, style: Style, records: Iterable[RunRecord]) -> Series:
        """Read the scores from the histories of runs; what is no finite number there is left out."""
        entries = (entry for record in records for entry in record.history)
        points: Iterator[Any] = ((entry.get("epoch"), entry.get("score")) for entry in entries)
        known = (one for one in points if all(isinstance(value, int | float) and isfinite(value) for value in one))
        return cls(name, style, tuple(known))

    @property
    def middle(self) -> tuple[float, float]:
        across, up = np.mean(self.points, axis=0)
        return float(across), float(up)

    @property
    def ends(self) -> tuple[float, float]:
        """One standard deviation of the scores below their mean, and one above it."""
        scores = [score for _, score in self.points]
        aside = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
        return self.middle[1] - aside, self.middle[1] + aside

    def by_epoch(self) -> dict[float, list[float]]:
        found: dict[float, list[float]] = {}
        for epoch, value in self.points:
            found.setdefault(epoch, []).append(value)
        return dict(sorted(found.items()))


def draw(
    paint: Callable[[Any], None],
    title: str,
    description: str,
    identity: str,
    *,
    caption: str = "",
    height: int = 320,
    left: int = 62,
) -> Figure:
    """Draw a figure of a report, with room for what stands along its axes; equal data give equal bytes."""
    with _matplotlib({"svg.hashsalt": identity}) as new_figure:
        figure = new_figure(facecolor="none")
        axes = figure.add_axes((0, 0, 1, 1))
        paint(axes)
        whole = height + _add_legend(figure, axes)
        figure.set_size_inches(_WIDTH / 72, whole / 72)
        right, top = _WIDTH - left - 16, height - _BOTTOM - 14
        axes.set_position((left / _WIDTH, _BOTTOM / whole, right / _WIDTH, top / whole))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Figure(title, _for_page(stream.getvalue(), title, description, identity), description, caption)


@contextmanager
def _matplotlib(settings: dict[str, Any]) -> Iterator[Any]:
    """Lend the class of figures, with our settings; signs that its font lacks are left to the browser's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(_SETTINGS | settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield Canvas


def _add_legend(figure: Any, axes: Any) -> int:
    """Name the series above the axes, in as many columns as their names leave room for; give its height."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return 0
    columns = max(1, min(len(labels), int(_WIDTH // (8 * max(map(len, labels)) + 44))))
    figure.legend(handles, labels, loc="upper left", ncols=columns)
    return 10 + 20 * -(-len(labels) // columns)


def named(name: str) -> str:
    """Write a name for a legend; matplotlib hides those that begin with an underscore."""
    return f"\u200a{shorten(name, 50)}"


def shorten(text: str, length: int) -> str:
    """Cut the middle out of a name that would run into its neighbours; its end tells it from others."""
    flat, kept = " ".join(text.split()), length // 3
    return flat if len(flat) <= length else f"{flat[:kept]}…{flat[kept + 1 - length :]}"


def _for_page(svg: str, title: str, description: str, identity: str) -> str:
    """Make matplotlib's file a part of a page: words for a screen reader, the page's colours, no ids but used ones."""
    found = re.search(r'viewBox="([\d. ]+)".*?</style>\s*</defs>(.*)</svg>', svg, re.DOTALL)
    assert found is not None  # as matplotlib writes it
    body = re.sub(r'<g id="[^"]*"', "<g", found[2])
    for name, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{name})")
    return (
        f'<svg viewBox="{found[1]}" role="img" aria-labelledby="{identity}-t {identity}-d" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{identity}-t">{escape(title)}</title><desc id="{identity}-d">{escape(description)}</desc>'
        f"{body}</svg>"
    )


def scatter(axes: Any, points: Sequence[tuple[float, float]], style: Style, *, radius: float, **looks: Any) -> None:
    looks = {"c": style.colour, "marker": style.marker, "edgecolors": PALETTE["card"]} | looks
    axes.scatter(*zip(*points, strict=True), (2 * radius) ** 2, **looks)


def padded(values: Sequence[float], *, margin: float, least: float = 1.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    spread = max(high - low, least)
    middle = (low + high) / 2
    return middle - spread * (0.5 + margin), middle + spread * (0.5 + margin)


def score_against_cost(series: Sequence[Series], *, title: str, cost: str, score: str, identity: str) -> Figure | None:
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    costs, scores = zip(*(point for one in drawn for point in one.points), strict=True)
    is_log = min(costs) > 0 and max(costs) / min(costs) > _FAR
    aside = _aside(drawn, is_log=is_log)
    said = "; ".join(f"{one.name} {one.middle[1]:.2f} at {one.middle[0]:.3g}" for one in drawn)
    caption = "Further left is cheaper, further up is better."
    if any(len(one.points) > 1 for one in drawn):
        caption = "Large marks: mean over seeds, with its standard deviation. Small marks: single runs."
    caption += " Marks of the same cost stand side by side." if any(aside) else ""
    caption += " The horizontal axis is logarithmic." if is_log else ""

    def paint(axes: Any) -> None:
        for one, points in zip(drawn, aside, strict=True):
            _paint_arm(axes, one, points)
        axes.set_ylim(*padded((*scores, *(end for one in drawn for end in one.ends)), margin=0.18, least=2.0))
        if is_log:
            log_ticks(axes, min(costs) / 1.6, max(costs) * 1.6)
        else:
            axes.set_xlim(0, max(costs) * 1.12 or 1)
        axes.set(xlabel=cost, ylabel=score)

    return draw(paint, title, f"{score} against {cost}: {said}.", identity, caption=caption)


def _aside(series: Sequence[Series], *, is_log: bool) -> list[float]:
    """Say by how many points each mark is moved, so that those of the same cost do not hide each other."""
    middles = np.array([one.middle[0] for one in series])
    middles, near = (np.log(middles), 0.02) if is_log else (middles, 0.02 * middles.max())
    same = np.abs(middles[:, None] - middles) <= near
    return [11 * (row[:number].sum() - (row.sum() - 1) / 2) for number, row in enumerate(same)]


def _paint_arm(axes: Any, one: Series, aside: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    moved = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    across = one.middle[0]
    if len(one.points) > 1:
        scatter(axes, one.points, one.style, radius=3, alpha=0.6, transform=moved)
        axes.plot([across] * 2, one.ends, color=PALETTE["ink"], linewidth=1.6, transform=moved)
    scatter(axes, [one.middle], one.style, radius=5.5, label=named(one.name), transform=moved, zorder=3)


def log_ticks(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def learning_curves(
    curves: Sequence[Series], *, title: str, value: str, identity: str, across: str = "epoch", of: str = "seed"
) -> Figure | None:
    """Plot means over seeds, or other trainings, with bands from the lowest to the highest, over epochs or the like."""
    drawn = [(curve, curve.by_epoch()) for curve in curves if curve.points]
    if not drawn:
        return None

    def paint(axes: Any) -> None:
        for curve, epochs in drawn:
            _paint_curve(axes, curve, epochs)
        values = [value for curve, _ in drawn for _, value in curve.points]
        axes.set_ylim(*padded(values, margin=0.06, least=0.02 * max(map(abs, values)) or 1.0))
        axes.set(xlabel=across, ylabel=value)
        whole = sorted({epoch for _, epochs in drawn for epoch in epochs if epoch == int(epoch)})
        if across != "epoch":
            log_ticks(axes, whole[0] / 1.3, whole[-1] * 1.3)
        elif len(whole) <= 10:
            axes.set_xticks(whole)

    said = "; ".join(f"{curve.name} ends at {np.mean(list(epochs.values())[-1]):.3g}" for curve, epochs in drawn)
    many = any(len(values) > 1 for _, epochs in drawn for values in epochs.values())
    caption = f"Lines: mean over {of}s. Bands: from the lowest to the highest {of}." if many else f"One {of}."
    return draw(paint, title, f"{value} by {across}: {said}.", identity, caption=caption)


def _paint_curve(axes: Any, curve: Series, epochs: dict[float, list[float]]) -> None:
    colour, marked = curve.style.colour, len(epochs) <= 15 and not curve.style.dashed
    if any(len(values) > 1 for values in epochs.values()):
        lowest, highest = ([choose(values) for values in epochs.values()] for choose in (min, max))
        axes.fill_between(list(epochs), lowest, highest, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        list(epochs),
        [np.mean(values) for values in epochs.values()],
        "--" if curve.style.dashed else "-",
        color=colour,
        linewidth=2.2,
        marker=curve.style.marker if marked else None,
        markersize=7,
        markeredgecolor=PALETTE["card"],
        label=named(curve.name),
    )


def differences(
    rows: Sequence[tuple[str, Difference]], title: str, *, right: str = "the first is better"
) -> Figure | None:
    if not rows:
        return None

    def paint(axes: Any) -> None:
        axes.axvline(0, color=PALETTE["soft"], linestyle="--", linewidth=1.2)
        axes.grid(axis="x")
        for number, (name, one) in enumerate(rows):
            axes.plot([one.low, one.high], [number] * 2, color=Style(2).colour, linewidth=4, alpha=0.5)
            scatter(axes, [(one.difference, number)], Style(2), radius=5.5)
            place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            place["bbox"] = {"facecolor": PALETTE["card"], "edgecolor": "none", "pad": 1}
            axes.annotate(shorten(name, 28), (0, number), (0, 14), fontweight="bold", **place)
            text = f"{signed(one.difference)} [{interval(one)}]"
            axes.annotate(text, (1, number), (0, 14), ha="right", color=PALETTE["soft"], **place)
        axes.set_xlim(*padded([end for _, one in rows for end in (one.low, one.high, 0.0)], margin=0.08))
        axes.set_ylim(len(rows) - 0.6, -0.8)
        axes.set_yticks([])
        axes.set_xlabel("difference in score (points)")

    said = "; ".join(f"{name}: {signed(one.difference)} ({interval(one)})" for name, one in rows)
    description = f"Differences in score with their 95% intervals. {said}."
    caption = f"Right of zero: {right}. Bars: 95% intervals over rows and seeds; one seed: over rows."
    return draw(paint, title, description, "differences", caption=caption, height=76 + 52 * len(rows), left=18)


def picture_format(path: Path) -> str:
    if (found := path.suffix.lower().lstrip(".") or "png") not in _PICTURES:
        raise ConfigError(f"{path}: a plot is drawn as one of {', '.join(_PICTURES)}, by the file's extension")
    return found


def plot_cascade(points: Sequence[tuple[float, float]], to: str | Path) -> None:
    """Draw a cascade's scores over its time as a share of the teacher's, from nothing handed on to everything."""
    path, shares = Path(to), [(100 * cost, score) for cost, score in points]
    ends = {"student alone": shares[0], "teacher alone": (100.0, shares[-1][1])}
    with _matplotlib({"svg.hashsalt": "cascade"}) as new_figure, atomic_file(path) as temporary:
        figure = new_figure(figsize=(5.5, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*shares, strict=True), color=Style(2).colour, linewidth=2.2, label="cascade")
        for number, (name, end) in enumerate(ends.items()):
            scatter(axes, [end], Style(number), radius=5.5, label=name, zorder=3)
        axes.set(xlabel="time, of the teacher's (%)", ylabel="score")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        figure.savefig(temporary, format=picture_format(path), dpi=150)
