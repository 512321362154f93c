"""The report's colours as readers with a colour vision deficiency see them."""

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

from kdlora.report.plots import PALETTE, arm_style

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009,
# severity 1.0, on linear RGB.
SIGHT = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
ARMS = ("fft", "lora", "kd-lora", "student-lora", "student-fft", "kd-fft")


def palette(scheme):
    """Read the series' colours of a scheme as sRGB in 0..1."""
    css = files("kdlora.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    found = dict(re.findall(r"--series-(\d): #([0-9a-f]{6})", light if scheme == "light" else dark.split("* {")[0]))
    return {int(n): np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]) for n, code in found.items()}


def lab(colour, sight):
    """Give CIELAB of a colour as somebody sees it."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(SIGHT[sight]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ratio = np.asarray(to_xyz) @ seen / [0.9505, 1.0, 1.089]
    curve = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * curve[1] - 16, 500 * (curve[0] - curve[1]), 200 * (curve[1] - curve[2])])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_arms_can_be_told_apart_by_colour(scheme, sight):
    """Red and green lines that one reader in twenty sees as one."""
    colours = palette(scheme)
    for one, other in combinations(ARMS, 2):
        a, b = (lab(colours[arm_style(arm).number], sight) for arm in (one, other))
        assert np.linalg.norm(a - b) > 10, (one, other, np.linalg.norm(a - b))


def test_the_plots_colours_are_the_pages_and_never_the_only_sign():
    """A picture of the benchmark in other colours than the report's; in a printout in grey, shapes must differ too."""
    css = files("kdlora.report").joinpath("templates/report.css").read_text(encoding="utf-8").split("@media")[0]
    assert dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css)).items() >= PALETTE.items()
    assert len({arm_style(arm).marker for arm in ARMS}) == len(ARMS)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sides_of_marked_spans_can_be_told_apart(scheme, sight):
    """A teacher's mark that looks like the label's; in grey, their lines differ."""
    css = files("kdlora.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    marks = re.findall(r"\.marked\.(\w+) \{ --own: var\(--series-(\d)\); --line: (\w+); \}", css)
    assert [side for side, _, _ in marks] == ["label", "teacher", "student"]
    assert len({line for _, _, line in marks}) == 3
    colours = palette(scheme)
    for (_, one, _), (_, other, _) in combinations(marks, 2):
        assert np.linalg.norm(lab(colours[int(one)], sight) - lab(colours[int(other)], sight)) > 15
