"""The report's plots of score, cost and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdlora.evidence.blocks import Figure, LegendItem
from kdlora.evidence.stats import Difference
from kdlora.evidence.svg import MARKERS, Drawing, Scale, Style, padded, shorten, swatch
from kdlora.evidence.wording import interval, signed

_ARM_STYLES = {
    "fft": Style(0, "square"),
    "lora": Style(1, "diamond"),
    "kd-lora": Style(2, "circle"),
    "student-lora": Style(3, "triangle"),
    "student-fft": Style(4, "down"),
    "kd-fft": Style(5, "pentagon"),
}


def arm_style(arm: str) -> Style:
    """Give the look of an arm, the same in every plot of every report."""
    return _ARM_STYLES.get(arm, Style(6, "cross"))


def numbered_style(number: int) -> Style:
    """Give the look of the n-th series where series are not arms."""
    return Style(number % 7, MARKERS[number % 7])


@dataclass(frozen=True)
class Point:
    """One run in a plot of score against cost."""

    cost: float
    score: float
    title: str
    href: str


@dataclass(frozen=True)
class Series:
    """The runs of one arm."""

    name: str
    style: Style
    points: tuple[Point, ...]


def score_against_cost(
    series: Sequence[Series], *, title: str, cost: str, score: str, identity: str, scale: float = 1.0
) -> Figure | None:
    """Plot every run and each arm's mean ± standard deviation.

    Args:
        series: arms with their runs.
        title: the plot's heading.
        cost: label of the horizontal axis, with its unit.
        score: label of the vertical axis.
        identity: unique in the page.
        scale: what the costs are divided by, to get the label's unit.

    Returns:
        The figure, or None where no run has both figures.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    points = [point for one in drawn for point in one.points]
    drawing = Drawing()
    x = _cost_scale(drawing, [point.cost / scale for point in points])
    y = drawing.y_scale(*padded([point.score for point in points], margin=0.18, least=2.0))
    drawing.axes(x, y, cost, score)
    shift = _shifts([float(np.mean([x(point.cost / scale) for point in one.points])) for one in drawn])
    places = [_draw_series(drawing, one, x, y, scale, aside) for one, aside in zip(drawn, shift, strict=True)]
    labelled = drawing.labels([(*place, one.name) for place, one in zip(places, drawn, strict=True)])
    said = [
        f"{one.name} {np.mean([p.score for p in one.points]):.1f} at "
        f"{np.mean([p.cost for p in one.points]) / scale:.3g}"
        for one in drawn
    ]
    description = f"{score} against {cost}: {'; '.join(said)}."
    caption = "Large marks: mean over seeds, with its standard deviation. Small marks: single runs."
    legend = tuple(LegendItem(swatch(one.style), one.name) for one in drawn) if not labelled else ()
    return Figure(title, drawing.render(title, description, identity), description, caption, legend)


def _cost_scale(drawing: Drawing, costs: Sequence[float], *, far: float = 20) -> Scale:
    """Make the axis of costs: from zero, or logarithmic where they are far apart."""
    if min(costs) > 0 and max(costs) / min(costs) > far:
        return drawing.x_scale(min(costs) / 1.6, max(costs) * 1.6, log=True)
    return drawing.x_scale(0, max(costs) * 1.12 or 1)


@dataclass(frozen=True)
class ModelPoint:
    """One model as it is shipped; `cost` is in the unit of the axis."""

    name: str
    style: Style
    cost: float
    score: float
    title: str
    href: str


def models_against_cost(
    points: Sequence[ModelPoint], *, title: str, cost: str, score: str, identity: str
) -> Figure | None:
    """Plot single models, each with its name beside it.

    Args:
        points: the models.
        title: the plot's heading.
        cost: label of the horizontal axis, with its unit.
        score: label of the vertical axis.
        identity: unique in the page.

    Returns:
        The figure, or None without points.
    """
    if not points:
        return None
    drawing = Drawing()
    x = _cost_scale(drawing, [point.cost for point in points], far=4)  # each export is a multiple of the next
    y = drawing.y_scale(*padded([point.score for point in points], margin=0.3, least=2.0))
    drawing.axes(x, y, cost, score)
    aside = _shifts([x(point.cost) for point in points])
    wanted = [(x(point.cost) + shift, y(point.score), point.name) for point, shift in zip(points, aside, strict=True)]
    for point, (across, up, _) in zip(points, wanted, strict=True):
        drawing.mark(across, up, point.style, title=point.title, href=point.href)
    labelled = drawing.labels_around(wanted)
    said = [f"{point.name} {point.score:.2f} at {point.cost:.3g}" for point in points]
    description = f"{score} against {cost}: {'; '.join(said)}."
    legend = tuple(LegendItem(swatch(point.style), point.name) for point in points) if not labelled else ()
    caption = "Further left is cheaper, further up is better."
    caption += " The horizontal axis is logarithmic." if x.log else ""
    return Figure(title, drawing.render(title, description, identity), description, caption, legend)


def _draw_series(drawing: Drawing, one: Series, x: Scale, y: Scale, scale: float, aside: float) -> tuple[float, float]:
    """Draw an arm's runs and its mean ± standard deviation; give the place of the mean."""
    for point in one.points:
        place = x(point.cost / scale) + aside, y(point.score)
        drawing.mark(*place, one.style, radius=3.5, css="mark run", title=point.title, href=point.href)
    scores = [point.score for point in one.points]
    mean, sd = float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    middle = float(np.mean([x(point.cost / scale) for point in one.points])) + aside
    drawing.line(middle, y(mean - sd), middle, y(mean + sd), "error-bar")
    drawing.mark(middle, y(mean), one.style, radius=6.5)
    return middle, y(mean)


def _shifts(centres: Sequence[float]) -> list[float]:
    """Move arms of the same cost aside by a few pixels, so that they do not cover each other."""
    shifts = []
    for number, centre in enumerate(centres):
        same = [other for other, value in enumerate(centres) if abs(value - centre) < 10]
        shifts.append(11.0 * (same.index(number) - (len(same) - 1) / 2))
    return shifts


@dataclass(frozen=True)
class Curve:
    """A quantity over training for one arm: one list of (epoch, value) for each seed."""

    name: str
    style: Style
    seeds: tuple[tuple[tuple[float, float], ...], ...]


def learning_curves(curves: Sequence[Curve], *, title: str, value: str, identity: str) -> Figure | None:
    """Plot means over seeds with bands from the lowest to the highest seed.

    Args:
        curves: arms (or loss terms of arms) with their seeds.
        title: the plot's heading.
        value: label of the vertical axis.
        identity: unique in the page.

    Returns:
        The figure, or None where nothing was recorded for at least one epoch.
    """
    drawn = [curve for curve in curves if any(curve.seeds)]
    points = [point for curve in drawn for seed in curve.seeds for point in seed]
    if not points:
        return None
    drawing = Drawing()
    epochs = [epoch for epoch, _ in points]
    low, high = min(epochs), max(epochs)
    x = (
        drawing.x_scale(low - 0.02 * (high - low), high + 0.02 * (high - low))
        if high > low
        else drawing.x_scale(low - 1, low + 1)
    )
    values = [value for _, value in points]
    y = drawing.y_scale(*padded(values, margin=0.06, least=0.02 * max(abs(one) for one in values) or 1.0))
    whole = sorted({epoch for epoch in epochs if epoch == int(epoch)})
    drawing.axes(x, y, "epoch", value, x_ticks=whole if 1 < len(whole) <= 10 else None)
    for curve in drawn:
        _draw_curve(drawing, curve, x, y)
    said = [f"{curve.name} ends at {_last(curve):.3g}" for curve in drawn]
    description = f"{value} over epochs: {'; '.join(said)}."
    many = any(len(curve.seeds) > 1 for curve in drawn)
    caption = "Lines: mean over seeds. Bands: from the lowest to the highest seed." if many else "One seed."
    legend = tuple(LegendItem(swatch(curve.style, line=True), curve.name) for curve in drawn)
    return Figure(title, drawing.render(title, description, identity), description, caption, legend)


def _draw_curve(drawing: Drawing, curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> None:
    """Draw band, line and marks of one arm."""
    by_epoch = _by_epoch(curve)
    lower = [(x(epoch), y(min(values))) for epoch, values in by_epoch.items()]
    upper = [(x(epoch), y(max(values))) for epoch, values in by_epoch.items()]
    mean = [(x(epoch), y(float(np.mean(values)))) for epoch, values in by_epoch.items()]
    if len(curve.seeds) > 1:
        drawing.band(lower, upper, curve.style)
    drawing.path(mean, curve.style)
    if len(mean) <= 15 and not curve.style.dashed:
        for place in mean:
            drawing.mark(*place, curve.style, radius=4)


def _by_epoch(curve: Curve) -> dict[float, list[float]]:
    """Collect the seeds' values at each epoch."""
    found: dict[float, list[float]] = {}
    for seed in curve.seeds:
        for epoch, value in seed:
            found.setdefault(epoch, []).append(value)
    return dict(sorted(found.items()))


def _last(curve: Curve) -> float:
    """Give the mean at the last epoch."""
    return float(np.mean(list(_by_epoch(curve).values())[-1]))


def differences(
    rows: Sequence[tuple[str, Difference]], *, title: str, identity: str, unit: str = "points"
) -> Figure | None:
    """Plot differences with their intervals, one below the other, around a line at zero.

    Args:
        rows: name and difference, from above.
        title: the plot's heading.
        identity: unique in the page.
        unit: of the horizontal axis.

    Returns:
        The figure, or None without rows.
    """
    if not rows:
        return None
    drawing = Drawing(height=96 + 52 * len(rows), left=18)
    ends = [end for _, one in rows for end in (one.low, one.high, 0.0)]
    x = drawing.x_scale(*padded(ends, margin=0.08, least=1.0))
    drawing.line(drawing.left, drawing.bottom, drawing.right, drawing.bottom, "axis")
    ticks = x.ticks(8)
    for value in ticks:
        text = signed(value, 1 if min(abs(tick) for tick in ticks if tick) < 1 else 0)
        drawing.text(x(value), drawing.bottom + 19, text, "tick middle")
    middle = (drawing.left + drawing.right) / 2
    drawing.text(middle, drawing.height - 8, f"difference in score ({unit})", "axis-label middle")
    for number, (name, one) in enumerate(rows):
        height = drawing.top + 40 + 52 * number
        for value in ticks:
            drawing.line(x(value), height - 11, x(value), height + 11, "grid")
        drawing.line(x(0), height - 11, x(0), height + 11, "zero")
        drawing.text(drawing.left, height - 18, shorten(name, 28), "point-label", title=name)
        drawing.text(drawing.right, height - 18, f"{signed(one.difference)} [{interval(one)}]", "tick end")
        drawing.line(x(one.low), height, x(one.high), height, "interval")
        drawing.mark(x(one.difference), height, Style(2, "circle"), radius=6)
    said = [f"{name}: {signed(one.difference)} ({interval(one)})" for name, one in rows]
    description = f"Differences in score with their 95% intervals. {'; '.join(said)}."
    caption = "Right of zero: the first is better. Bars: 95% intervals of the paired bootstrap over examples."
    return Figure(title, drawing.render(title, description, identity), description, caption)
