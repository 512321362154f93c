"""Plots, words and colours, as every reader sees them."""

import re
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from kdlora.errors import counted, told_apart
from kdlora.evidence.stats import Difference
from kdlora.report import plots
from kdlora.report.page import escape
from kdlora.report.plots import (
    Series,
    Style,
    arm_style,
    differences,
    learning_curves,
    padded,
    score_against_cost,
    shorten,
)
from kdlora.report.wording import (
    change,
    count,
    duration,
    figure,
    milliseconds,
    model_title,
    p_value,
    share,
    signed,
    size,
    times,
)

pytestmark = pytest.mark.drawn
ARMS = ("fft", "lora", "kd-lora", "student-lora", "student-fft", "kd-fft")
NASTY = "<script>&\"'|`*"
PARAMETERS = {"title": "t", "cost": "millions", "score": "score", "identity": "i"}


def _marks(figure, style: Style) -> list[tuple[float, float]]:
    """Find the marks in the colour of a style: x and y in pixels, y downwards."""
    uses = [one for one in ElementTree.fromstring(figure.svg).iter() if one.tag.endswith("use")]
    paint = f"fill: var(--series-{style.number})"
    return [(float(one.get("x")), float(one.get("y"))) for one in uses if paint in one.get("style", "")]


def _texts(figure) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(figure.svg).iter() if one.tag.endswith("text")]


@pytest.mark.parametrize("name", [NASTY, "costs $5 or $6_x$", "_hidden", "评论 \U0001f600"])
def test_drawings_show_names_as_they_are(name):
    """Names come from data and configs: none is a formula, markup, or a reason to leave a series out."""
    series = [Series(name, Style(0), ((1.0, 80.0),)), Series("other", Style(1), ((2.0, 90.0),))]
    figure = score_against_cost(series, title=name, cost=name, score="score", identity="i")
    assert [text.removeprefix("\u200a") for text in _texts(figure)].count(name) == 2
    assert not [one for one in ElementTree.fromstring(figure.svg).iter() if one.tag.endswith("script")]


def test_a_drawing_takes_its_colours_from_the_page_and_is_always_the_same():
    """Black on black in dark mode; equal data that give another report; colour as the only sign, printed in grey."""
    series = [Series("a", Style(0), ((1.0, 80.0), (1.1, 82.0))), Series("b", Style(1), ((2.0, 90.0),))]
    one, again = (score_against_cost(series, **PARAMETERS) for _ in range(2))
    assert one == again
    assert not re.search(r"#[0-9a-f]{6}\b", one.svg)
    assert len({arm_style(arm).marker for arm in ARMS}) == len(ARMS)
    assert len({(style.colour, style.marker) for style in map(Style, range(14))}) == 14  # rows of several experiments


def test_points_lie_where_their_values_are():
    """An axis that runs the wrong way still looks like a plot."""
    series = [Series("low", Style(0), ((1.0, 80.0),)), Series("high", Style(1), ((9.0, 90.0), (9.0, 92.0)))]
    figure = score_against_cost(series, **PARAMETERS)
    in_legend = [min(_marks(figure, Style(number)))[1] for number in (0, 1)]
    assert max(in_legend) < 60
    low, high = ([place for place in _marks(figure, Style(number)) if place[1] > 60] for number in (0, 1))
    assert max(low)[0] < min(high)[0]
    assert min(y for _, y in low) > max(y for _, y in high)
    assert "side by side" not in figure.caption
    apart = score_against_cost([Series(name, Style(0), ((9.0, 80.0),)) for name in "ab"], **PARAMETERS)
    assert "Marks of the same cost stand side by side." in apart.caption
    assert "low 80.00 at 1; high 91.00 at 9" in figure.description
    assert score_against_cost([], **PARAMETERS) is None

    # 4 million and 400 million parameters on a linear axis put all small models on one spot; log of 0 fails.
    wide, zero = (
        score_against_cost([Series("a", Style(0), ((cost, 80.0), (4e8, 90.0)))], **PARAMETERS) for cost in (4e6, 0.0)
    )
    assert "logarithmic" in wide.caption
    assert "logarithmic" not in zero.caption
    # Costs of 1 and 5 beside one of 280 stood side by side, the dearer one to the left.
    far = score_against_cost([Series(str(x), Style(0), ((x, 80.0),)) for x in (5.0, 1.0, 280.0)], **PARAMETERS)
    assert "side by side" not in far.caption


def test_bars_are_not_cut_off(monkeypatch):
    """The bar of two seeds reaches beyond both, and further than the margin around the points."""
    seen: list[float] = []
    monkeypatch.setattr(plots, "padded", lambda values, **options: seen.extend(values) or padded(values, **options))
    score_against_cost([one := Series("a", Style(0), ((1.0, 20.0), (1.0, 30.0)))], **PARAMETERS)
    assert one.ends == pytest.approx((17.93, 32.07), abs=0.01)
    assert set(one.ends) < set(seen)


def test_curves_average_the_seeds_that_reached_an_epoch():
    """A seed that stopped early must not pull the last epochs down to zero."""
    curve = Series("KD-LoRA", arm_style("kd-lora"), ((1.0, 0.5), (2.0, 0.4), (1.0, 0.7)))
    figure = learning_curves([curve], title="t", value="loss", identity="i")
    assert "KD-LoRA ends at 0.4" in figure.description
    assert "Bands" in figure.caption
    assert learning_curves([Series("x", arm_style("lora"), ())], title="t", value="loss", identity="i") is None

    # One epoch with loss 0 has no range on either axis.
    style = arm_style("new-arm")
    figure = learning_curves([Series("x", style, ((1.0, 0.0),))], title="t", value="loss", identity="i")
    assert len(_marks(figure, style)) == 2, "one in the plot, one in the legend"


def test_intervals_are_drawn_from_low_to_high():
    """A bar of the wrong length beside the right numbers."""
    one = Difference(1.0, -1.0, 4.0, 0.2, 100, 3, 1000, 0.95)
    figure = differences([("A − B", one)], "t")
    lines = [
        [float(number) for number in re.findall(r"-?[\d.]+", path)]
        for path, style in re.findall(r'<path d="([^"]*)"[^>]*?style="([^"]*)"', figure.svg)
        if "stroke-dasharray" in style or "var(--series-2)" in style
    ]
    (zero,) = (line[0] for line in lines if line[0] == line[2])
    ((left, _, right, _),) = (line for line in lines if line[0] != line[2])
    assert left < zero < right
    assert (right - zero) == pytest.approx(4 * (zero - left), rel=0.01)
    assert "+1.0 [−1.0 to +4.0]" in _texts(figure)
    assert differences([], "t") is None


def test_figures_are_written_as_people_read_them():
    """−0.0, 1e+06 and 66362880 in a headline."""
    written = [*map(count, (66_362_880, 110_000_000, 147_456, 1_234_000_000)), *map(size, (2.5e9, 1.5e6))]
    written += [*map(milliseconds, (3.14159, 31.4, 314.2)), *map(duration, (3, 600, 7200))]
    assert [text.replace("\u00a0", " ") for text in written] == [
        *("66.4 M", "110 M", "147 k", "1.23 B", "2.50 GB", "1.5 MB"),
        *("3.14 ms", "31.4 ms", "314 ms", "3.0 s", "10.0 min", "2.0 h"),
    ]
    assert [count(7), count(None), size(None), signed(None)] == ["7", "–", "–", "–"]
    assert [signed(-0.04), signed(0.04), signed(-1.25, 2), signed(3)] == ["0.0", "0.0", "−1.25", "+3.0"]
    assert [p_value(0.0002), p_value(0.0123), p_value(0.5)] == ["< 0.001", "0.012", "0.50"]
    assert [share(99.97), share(100), share(98.6), share(-12.2), share(None)] == ["99.9%", "100%", "99%", "−12%", "–"]
    assert [change(saved, "fewer") for saved in (39, 0.3, -0.4, -2)] == [
        *("39% fewer than", "about as many as", "about as many as", "2% more than"),
    ]
    assert [times(*pair) for pair in ((200, 1), (30, 2), (1, 500), (1, 0))] == ["200×", "15.0×", "0.002×", "–"]
    assert shorten("a  long\nname", 7) == "a …name"
    rows = {f"reviews (reviews-{place}): {arm}" for place in ("minilm, 1", "mpnet, 2") for arm in ARMS}
    assert len({shorten(row, 28) for row in rows}) == len(rows)  # two experiments of one name

    # "probability 1 is below 1", a threshold of 1.0000, a mean squared error of 0.0000.
    assert [told_apart(0.99998, 0.99999519), told_apart(0.99999519, 0.99998)] == ["0.99998", "0.999995"]
    assert [told_apart(*pair) for pair in ((0.5,), (1e-9,), (12.34561, 12.34562), (1.0,))] == [
        *("0.5", "1e-09", "12.34561", "1"),
    ]
    assert [figure(value) for value in (0.87654, 3.1e-6, 0.0, -1234.5)] == ["0.8765", "3.1e-06", "0.0000", "-1234.5000"]
    assert [counted(1, "row"), counted(4500, "row")] == ["1 row", "4,500 rows"]

    # The report travels; the user's home folder need not.
    assert model_title("/home/me/models/minilm-l6/") == "minilm-l6"
    assert model_title("C:\\models\\minilm") == "minilm"
    assert (
        model_title("sentence-transformers/all-MiniLM-L6-v2, layers [0, 2, 4]") == "all-MiniLM-L6-v2, layers [0, 2, 4]"
    )
    assert model_title(None) == "the teacher"


HARMFUL = [NASTY, "# heading", "1. item", "- item", "+ item", "a|b", "line\nbreak\r\n\x00", "[x](y)", "![x](y)"]


@pytest.mark.parametrize("text", [*HARMFUL, "$x$", "~~x~~", "\\", "a_b_c", "=====", "&lt;"])
def test_markdown_shows_text_as_it_is(text):
    """Rendered again, escaped text has to give back the text and nothing else."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(escape(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    shown = "".join(child.content for child in children)
    assert shown.split() == text.replace("\x00", " ").split()
