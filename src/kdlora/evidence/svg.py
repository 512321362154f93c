"""Small SVG drawings: a frame with axes, marks and lines. Colours are CSS variables, so dark mode is free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 320

MARKERS = ("circle", "square", "diamond", "triangle", "down", "cross", "pentagon")


@dataclass(frozen=True)
class Style:
    """How a series looks: a colour of the palette and a shape, so that colour is never the only sign."""

    colour: int
    marker: str
    dashed: bool = False

    @property
    def paint(self) -> str:
        """The colour as a CSS expression."""
        return f"var(--series-{self.colour})"


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Give the pixel of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Choose round values inside the scale."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            return [value for value in values if self.low <= value <= self.high]
        step = round_step((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def round_step(rough: float) -> float:
    """Give the round number at or above a rough step: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(base * power for base in (1, 2, 2.5, 5, 10) if base * power >= rough * (1 - 1e-9))


def padded(values: Sequence[float], *, margin: float = 0.12, least: float = 1.0) -> tuple[float, float]:
    """Give limits around values with some air, and at least so much range."""
    low, high = min(values), max(values)
    spread = max(high - low, least)
    middle = (low + high) / 2
    return middle - spread * (0.5 + margin), middle + spread * (0.5 + margin)


class Drawing:
    """Pieces of SVG in one frame with a plotting area."""

    def __init__(
        self,
        *,
        width: int = WIDTH,
        height: int = HEIGHT,
        left: int = 58,
        right: int = 18,
        top: int = 16,
        bottom: int = 50,
    ) -> None:
        self.width, self.height = width, height
        self.left, self.right = left, width - right
        self.top, self.bottom = top, height - bottom
        self.pieces: list[str] = []

    def x_scale(self, low: float, high: float, *, log: bool = False) -> Scale:
        """Make a scale over the width of the plotting area."""
        return Scale(low, high, self.left, self.right, log)

    def y_scale(self, low: float, high: float) -> Scale:
        """Make a scale over the height of the plotting area, upwards."""
        return Scale(low, high, self.bottom, self.top)

    def axes(
        self,
        x: Scale,
        y: Scale,
        x_label: str,
        y_label: str,
        *,
        x_ticks: Sequence[float] | None = None,
        y_wanted: int = 7,
    ) -> None:
        """Draw grid, tick labels and axis labels."""
        y_ticks = y.ticks(y_wanted)
        for value in y_ticks:
            self.line(self.left, y(value), self.right, y(value), "grid")
            self.text(self.left - 8, y(value) + 4, tick(value, y_ticks), "tick end")
        self.line(self.left, self.bottom, self.right, self.bottom, "axis")
        ticks = x.ticks() if x_ticks is None else x_ticks
        for value in ticks:
            self.line(x(value), self.bottom, x(value), self.bottom + 5, "axis")
            self.text(x(value), self.bottom + 19, tick(value, ticks), "tick middle")
        self.text((self.left + self.right) / 2, self.height - 8, x_label, "axis-label middle")
        middle = (self.top + self.bottom) / 2
        turned = f'transform="translate(14 {middle:.1f}) rotate(-90)"'
        self.pieces.append(f'<text class="axis-label middle" {turned}>{escape(y_label)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """Draw a straight line."""
        self.pieces.append(f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, x: float, y: float, text: str, css: str, *, title: str = "") -> None:
        """Write text, with a longer one on hovering."""
        hover = f"<title>{escape(title)}</title>" if title else ""
        self.pieces.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}{hover}</text>')

    def path(self, points: Sequence[tuple[float, float]], style: Style) -> None:
        """Draw a line through points."""
        dash = ' stroke-dasharray="6 4"' if style.dashed else ""
        self.pieces.append(f'<polyline class="curve" style="stroke:{style.paint}"{dash} points="{_points(points)}"/>')

    def band(self, lower: Sequence[tuple[float, float]], upper: Sequence[tuple[float, float]], style: Style) -> None:
        """Fill the area between two lines."""
        outline = [*upper, *reversed(lower)]
        self.pieces.append(f'<polygon class="band" style="fill:{style.paint}" points="{_points(outline)}"/>')

    def mark(
        self,
        x: float,
        y: float,
        style: Style,
        *,
        radius: float = 6.0,
        css: str = "mark",
        title: str = "",
        href: str = "",
    ) -> None:
        """Draw a marker, with a hover text and a link where there are any."""
        hover = f"<title>{escape(title)}</title>" if title else ""
        shape = (
            f'<path class="{css}" style="fill:{style.paint}" d="{_marker(style.marker, radius)}" '
            f'transform="translate({x:.1f} {y:.1f})">{hover}</path>'
        )
        if href:
            label = f' aria-label="{escape(title)}"' if title else ""
            shape = f'<a href="{escape(href)}"{label}>{shape}</a>'
        self.pieces.append(shape)

    def rectangle(
        self, x: float, y: float, width: float, height: float, css: str, *, opacity: float, title: str
    ) -> None:
        """Draw a filled cell."""
        self.pieces.append(
            f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill-opacity="{opacity:.3f}"><title>{escape(title)}</title></rect>'
        )

    def labels(self, wanted: Sequence[tuple[float, float, str]]) -> bool:
        """Write labels beside points, moved apart where they would overlap, on the side with more room.

        Args:
            wanted: x, y and text of each point.

        Returns:
            False, with nothing written, where a label would end far from its point or on another one: the
            drawing then needs a legend.
        """
        placed = spread([y for _, y, _ in wanted], gap=15, low=self.top + 6, high=self.bottom - 4)
        labels = []
        for (x, y, text), height in zip(wanted, placed, strict=True):
            length = 7.6 * len(text)
            room = self.right - x > 8 + length
            start, end = (x + 13, x + 13 + length) if room else (x - 13 - length, x - 13)
            covers = [
                other
                for other in wanted
                if start - 6 < other[0] < end + 6 and abs(other[1] - height) < 12 and other != (x, y, text)
            ]
            if abs(height - y) > 16 or covers or start < self.left:
                return False
            labels.append((x + (13 if room else -13), height + 4, text, "point-label" if room else "point-label end"))
        for x, y, text, css in labels:
            self.text(x, y, text, css)
        return True

    def labels_around(self, wanted: Sequence[tuple[float, float, str]]) -> bool:
        """Write labels on whichever side of their points is free: right, left, above or below.

        Args:
            wanted: x, y and text of each point.

        Returns:
            False, with nothing written, where a label has no free place: the drawing then needs a legend.
        """
        taken = [(x - 8, y - 8, x + 8, y + 8) for x, y, _ in wanted]
        labels = []
        for x, y, text in wanted:
            wide = 8.8 * len(text)  # of the larger letters on a telephone
            sides = [(x + 13, 0.0, "point-label", 0.0), (x - 13, 0.0, "point-label end", wide)]
            for lift in (-19.0, 19.0, -37.0, 37.0, -55.0, 55.0):
                sides += [(x, lift, "point-label middle", wide / 2), (x - 8, lift, "point-label", 0.0)]
                sides += [(x + 8, lift, "point-label end", wide)]
            for start, lift, css, before in sides:
                box = (start - before, y + lift - 9, start - before + wide, y + lift + 9)
                inside = self.left <= box[0] and box[2] <= self.right and self.top <= box[1] and box[3] <= self.bottom
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    labels.append((start, y + lift + 4, text, css))
                    break
            else:
                return False
        for x, y, text, css in labels:
            self.text(x, y, text, css)
        return True

    def render(self, title: str, description: str, identity: str) -> str:
        """Close the drawing.

        Args:
            title: its name for a screen reader.
            description: what it shows.
            identity: unique in the page.

        Returns:
            An `<svg>` element without outside references.
        """
        role = "group" if any(piece.startswith("<a ") for piece in self.pieces) else "img"  # an image hides its links
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="{role}" '
            f'aria-labelledby="{identity}-t {identity}-d" xmlns="http://www.w3.org/2000/svg">'
            f'<title id="{identity}-t">{escape(title)}</title><desc id="{identity}-d">{escape(description)}</desc>'
            f"{''.join(self.pieces)}</svg>"
        )


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Say whether two boxes (left, top, right, bottom) share a spot."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move positions apart to a least distance, as little as that takes, inside limits."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [min(max(wanted[index], low), high) for index in order]
    for _ in range(60):
        for one in range(len(placed) - 1):
            short = gap - (placed[one + 1] - placed[one])
            if short > 0:
                placed[one] -= short / 2
                placed[one + 1] += short / 2
        if placed:
            placed = [value + max(0.0, low - placed[0]) - max(0.0, placed[-1] - high) for value in placed]
    result = [0.0] * len(wanted)
    for place, index in zip(placed, order, strict=True):
        result[index] = place
    return result


def swatch(style: Style, *, line: bool = False) -> str:
    """Draw a legend's mark."""
    dash = ' stroke-dasharray="5 3"' if style.dashed else ""
    stroke = f'<line x1="0" y1="7" x2="22" y2="7" class="curve" style="stroke:{style.paint}"{dash}/>' if line else ""
    marker = "" if line and style.dashed else _marker(style.marker, 5)
    return (
        '<svg class="swatch" viewBox="0 0 22 14" aria-hidden="true">'
        f'{stroke}<path class="mark" style="fill:{style.paint}" d="{marker}" transform="translate(11 7)"/></svg>'
    )


def tick(value: float, among: Sequence[float]) -> str:
    """Write a tick with as many decimals as all of them need."""
    decimals = next((places for places in range(6) if all(abs(round(one, places) - one) < 1e-9 for one in among)), 6)
    return f"{value:.{decimals}f}".replace("-", "−")


def shorten(text: str, length: int) -> str:
    """Cut a name that would run into its neighbours; the whole of it belongs into the hover text."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"


def _points(points: Sequence[tuple[float, float]]) -> str:
    """Write coordinates."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _marker(shape: str, radius: float) -> str:
    """Give the path of a marker around the origin."""
    if shape == "circle":
        half = f"a{radius:.1f} {radius:.1f} 0 1 0"
        return f"M{-radius:.1f} 0{half} {2 * radius:.1f} 0{half} {-2 * radius:.1f} 0z"
    if shape == "cross":
        third = radius / 3
        corners = [(-radius, -third), (-third, -third), (-third, -radius), (third, -radius), (third, -third)]
        corners += [(radius, -third), (radius, third), (third, third), (third, radius), (-third, radius)]
        corners += [(-third, third), (-radius, third)]
    else:
        count, turn, grow = {
            "square": (4, math.pi / 4, 1.25),
            "diamond": (4, 0.0, 1.3),
            "triangle": (3, -math.pi / 2, 1.3),
            "down": (3, math.pi / 2, 1.3),
            "pentagon": (5, -math.pi / 2, 1.15),
        }[shape]
        angles = [turn + 2 * math.pi * corner / count for corner in range(count)]
        corners = [(radius * grow * math.cos(angle), radius * grow * math.sin(angle)) for angle in angles]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + "z"
