from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from kdlora.evidence.blocks import (
    Bullets,
    Cell,
    Code,
    Link,
    Page,
    Paragraph,
    Section,
    Strong,
    Table,
    escape,
    to_markdown,
)
from kdlora.evidence.plots import Curve, Point, Series, arm_style, differences, learning_curves, score_against_cost
from kdlora.evidence.stats import Difference
from kdlora.evidence.svg import MARKERS, Drawing, Scale, Style, padded, shorten, spread, tick
from kdlora.evidence.wording import (
    count,
    duration,
    metric_title,
    milliseconds,
    model_title,
    p_value,
    share,
    signed,
    size,
)

NASTY = "<script>&\"'|`*"


def _numbers(svg: str) -> list[float]:
    root = ElementTree.fromstring(svg)
    names = ("x", "y", "x1", "x2", "y1", "y2", "width", "height")
    return [float(element.get(name, "0")) for element in root.iter() for name in names]


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (88.13, 96.4, False), (-3.2, 7.9, False), (0, 1e9, False), (1e6, 3e8, True), (0.001, 900, True)],
)
def test_ticks_are_round_few_and_inside(low, high, log):
    """Ticks outside the frame run into the labels; twenty of them into each other."""
    scale = Scale(low, high, 0, 100, log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 10
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in ticks)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in ticks)
    written = [tick(value, ticks) for value in ticks]
    assert len(set(written)) == len(written)


def test_ticks_show_what_they_are():
    """2.5 written as 2 or 3 moves every point."""
    assert [tick(value, [0, 2.5, 5]) for value in (0, 2.5, 5)] == ["0.0", "2.5", "5.0"]
    assert [tick(value, [-10, 0, 10]) for value in (-10, 0)] == ["−10", "0"]


def test_limits_of_equal_values_are_not_a_point():
    """Three seeds with the same score would divide by zero."""
    low, high = padded([90.0, 90.0])
    assert low < 90.0 < high


def test_labels_are_moved_apart_inside_the_frame():
    """Labels of arms with the same score would cover each other."""
    placed = spread([50.0, 50.0, 51.0, 100.0, 99.0], gap=15, low=0, high=100)
    ordered = sorted(placed)
    assert all(b - a >= 14.5 for a, b in pairwise(ordered))
    assert ordered[0] >= -0.5
    assert ordered[-1] <= 100.5
    assert spread([], gap=15, low=0, high=100) == []
    assert spread([10.0, 80.0], gap=15, low=0, high=100) == [10.0, 80.0]


def test_drawings_escape_what_they_hold():
    """Names come from data and configs."""
    drawing = Drawing()
    drawing.axes(drawing.x_scale(0, 1), drawing.y_scale(0, 1), NASTY, NASTY)
    assert drawing.labels([(100, 100, NASTY), (430, 200, NASTY)])
    drawing.mark(1, 1, Style(0, "circle"), title=NASTY, href='x"y')
    drawing.rectangle(0, 0, 1, 1, "heat", opacity=0.5, title=NASTY)
    root = ElementTree.fromstring(drawing.render(NASTY, NASTY, "id"))
    texts = [element.text for element in root.iter() if element.text]
    assert texts.count(NASTY) >= 7
    assert not [element for element in root.iter() if element.tag.endswith("script")]


def test_every_marker_has_a_shape():
    """A marker that draws nothing makes its arm invisible."""
    for marker in MARKERS:
        drawing = Drawing()
        drawing.mark(5, 5, Style(0, marker))
        assert re.search(r' d="M[-\d. aLz]+z"', drawing.pieces[0])


def test_points_lie_where_their_values_are():
    """An axis that runs the wrong way still looks like a plot."""
    series = [
        Series("low", Style(0, "circle"), (Point(1e6, 80.0, "a", "x"),)),
        Series("high", Style(1, "square"), (Point(9e6, 90.0, "b", "y"), Point(9e6, 92.0, "c", "z"))),
    ]
    figure = score_against_cost(series, title="t", cost="millions", score="score", identity="i", scale=1e6)
    assert figure is not None
    places = [
        tuple(map(float, pair)) for pair in re.findall(r'z" transform="translate\(([\d.]+) ([\d.]+)\)', figure.svg)
    ]
    low, high = places[0], places[2]
    assert low[0] < high[0]
    assert low[1] > high[1]
    assert "low 80.0 at 1; high 91.0 at 9" in figure.description
    assert all(np.isfinite(_numbers(figure.svg)))
    assert score_against_cost([], title="t", cost="c", score="s", identity="i") is None


def test_wide_ranges_of_cost_get_a_logarithmic_axis_and_zero_does_not():
    """4 million and 400 million parameters on a linear axis put all small models on one spot; log of 0 fails."""
    points = [Point(4e6, 80.0, "", ""), Point(4e8, 90.0, "", "")]
    figure = score_against_cost(
        [Series("a", Style(0, "circle"), tuple(points))], title="t", cost="c", score="s", identity="i"
    )
    zero = [Point(0.0, 80.0, "", ""), Point(4e8, 90.0, "", "")]
    other = score_against_cost(
        [Series("a", Style(0, "circle"), tuple(zero))], title="t", cost="c", score="s", identity="i"
    )
    for one in (figure, other):
        assert one is not None
        assert all(np.isfinite(_numbers(one.svg)))


def test_long_or_many_names_go_to_the_legend():
    """Names of experiments as point labels run over the axis."""
    name = "an experiment with a name that is much too long to stand beside a point: KD-LoRA"
    series = [Series(name, Style(0, "circle"), (Point(1.0, 80.0, "", ""),))]
    figure = score_against_cost(series, title="t", cost="c", score="s", identity="i")
    assert figure is not None
    assert [item.text for item in figure.legend] == [name]
    assert "point-label" not in figure.svg


def test_crowded_points_get_a_legend():
    """A label that was moved far from its mark, or onto another one, names the wrong arm."""
    drawing = Drawing()
    assert drawing.labels([(100.0, 100.0, "one"), (300.0, 150.0, "two")])
    assert len(drawing.pieces) == 2
    for crowd in ([(100.0 + 11 * place, 100.0, f"arm {place}") for place in range(5)], [(100.0, 90.0, "x" * 80)]):
        drawing = Drawing()
        assert not drawing.labels(crowd)
        assert drawing.pieces == []


def test_curves_average_the_seeds_that_reached_an_epoch():
    """A seed that stopped early must not pull the last epochs down to zero."""
    curve = Curve("KD-LoRA", arm_style("kd-lora"), (((1.0, 0.5), (2.0, 0.4)), ((1.0, 0.7),)))
    figure = learning_curves([curve], title="t", value="loss", identity="i")
    assert figure is not None
    assert "KD-LoRA ends at 0.4" in figure.description
    assert "Bands" in figure.caption
    assert learning_curves([Curve("x", arm_style("lora"), ())], title="t", value="loss", identity="i") is None
    assert learning_curves([Curve("x", arm_style("lora"), ((),))], title="t", value="loss", identity="i") is None


def test_a_single_constant_point_is_drawn():
    """One epoch with loss 0 has no range on either axis."""
    figure = learning_curves(
        [Curve("x", arm_style("new-arm"), (((1.0, 0.0),),))], title="t", value="loss", identity="i"
    )
    assert figure is not None
    assert all(np.isfinite(_numbers(figure.svg)))


def test_intervals_are_drawn_from_low_to_high():
    """A bar of the wrong length beside the right numbers."""
    one = Difference(1.0, -1.0, 4.0, 0.2, 100, (3, 3), 1000, 0.95)
    figure = differences([("A − B", one)], title="t", identity="i")
    assert figure is not None
    bar = re.search(r'class="interval" x1="([\d.]+)".*? x2="([\d.]+)"', figure.svg)
    zero = re.search(r'class="zero" x1="([\d.]+)"', figure.svg)
    assert bar is not None
    assert zero is not None
    left, right, middle = float(bar[1]), float(bar[2]), float(zero[1])
    assert left < middle < right
    assert (right - middle) == pytest.approx(4 * (middle - left), rel=0.01)
    assert differences([], title="t", identity="i") is None


def test_figures_are_written_as_people_read_them():
    """−0.0, 1e+06 and 66362880 in a headline."""
    plain = {"\u00a0": " "}
    written = [count(66_362_880), count(110_000_000), count(147_456), count(1_234_000_000), count(7), count(None)]
    assert [text.translate(str.maketrans(plain)) for text in written] == [
        "66.4 M",
        "110 M",
        "147 k",
        "1.23 B",
        "7",
        "–",
    ]
    assert [signed(-0.04), signed(0.04), signed(-1.25, 2), signed(3)] == ["0.0", "0.0", "−1.25", "+3.0"]
    assert [size(2.5e9), size(1.5e6), size(None)] == ["2.50\u00a0GB", "1.5\u00a0MB", "–"]
    assert [milliseconds(3.14159), milliseconds(31.4), milliseconds(314.2)] == [
        "3.14\u00a0ms",
        "31.4\u00a0ms",
        "314\u00a0ms",
    ]
    assert [duration(3), duration(600), duration(7200)] == ["3.0\u00a0s", "10.0\u00a0min", "2.0\u00a0h"]
    assert [p_value(0.0002), p_value(0.0123), p_value(0.5)] == ["< 0.001", "0.012", "0.50"]
    assert [share(99.9), share(100), share(98.6), share(-12.2), share(None)] == ["99.9%", "100%", "99%", "−12%", "–"]
    assert metric_title("accuracy_matched") == "accuracy, matched"
    assert metric_title("macro_f1_x") == "macro F1, x"
    assert shorten("a  long\nname", 7) == "a long…"


def test_a_models_folder_is_not_shown_in_the_headline():
    """The report travels; the user's home folder need not."""
    assert model_title("/home/me/models/minilm-l6/") == "minilm-l6"
    assert model_title("C:\\models\\minilm") == "minilm"
    assert (
        model_title("sentence-transformers/all-MiniLM-L6-v2, layers [0, 2, 4]") == "all-MiniLM-L6-v2, layers [0, 2, 4]"
    )
    assert model_title(None) == "the teacher"


@pytest.mark.parametrize(
    "text",
    [
        NASTY,
        "# heading",
        "1. item",
        "- item",
        "+ item",
        "a|b",
        "line\nbreak\r\n\x00",
        "[x](y)",
        "![x](y)",
        "$x$",
        "~~x~~",
        "\\",
        "a_b_c",
        "=====",
        "&lt;",
    ],
)
def test_markdown_shows_text_as_it_is(text):
    """Rendered again, escaped text has to give back the text and nothing else."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(escape(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    shown = "".join(child.content for child in children)
    assert shown.split() == text.replace("\x00", " ").split()


def test_every_block_has_its_markdown():
    """A block that renders to nothing is lost evidence."""
    table = Table(
        "caption", ("", "a"), ((Cell("x|y"), Cell("1", (Link("0", "p"), Link("1", "q")))),), frozenset({1}), note="note"
    )
    blocks = (Paragraph(("a ", Strong("b"), " c"), "warning"), Bullets((("one",),)), table, Code("Config", "```\nx"))
    page = Page("T", "origin", ("lead",), (Section("S", "s", blocks),), "foot")
    text = to_markdown(page)
    for piece in ("# T", "\nlead\n", '<a id="s"></a>', "## S", "> a **b** c", "- one", "**caption**", "| --- | ---: |"):
        assert piece in text
    assert "| x\\|y | 1 [0](p) [1](q) |" in text
    assert "\n````\n```\nx\n````" in text
    assert text.endswith("origin. foot\n")
