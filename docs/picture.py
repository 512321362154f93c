"""Draw the README's picture, the main plot of a report: `python docs/picture.py EXPERIMENT OUT.svg`."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

from kdlora.evidence.report import make_report

_FIGURE = re.compile(r'<svg viewBox="([^"]+)" role="[a-z]+" aria-labelledby="e1-parameters-t.*?</svg>', re.DOTALL)


def draw(experiment: Path, to: Path) -> None:
    """Make a picture that stands alone: colours for light and dark inside, no links.

    Args:
        experiment: a finished experiment's folder.
        to: the SVG file.
    """
    page = make_report([experiment]).html
    found = _FIGURE.search(page)
    if found is None:
        raise SystemExit(f"the report of {experiment} has no plot; let the experiment finish")
    drawing, box = found[0], found[1]
    drawing = re.sub(r"</?a\b[^>]*>", "", drawing)
    drawing = re.sub(r"<title>[^<]*</title>", "", drawing)
    _, _, width, height = box.split()
    background = f'<rect width="{width}" height="{height}" rx="6" style="fill:var(--card)"/>'
    head, rest = drawing.split("</desc>", 1)
    head = head.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(f"{head}</desc><style>{_style()}</style>{background}{rest}\n", encoding="utf-8")


def _style() -> str:
    """Give the report's colours and the rules of its drawings."""
    css = files("kdlora.evidence").joinpath("templates/report.css").read_text(encoding="utf-8")
    colours = css[: css.index("* { box-sizing")]
    rules = [line.replace("svg ", "") for line in css.splitlines() if line.startswith("svg ") and "{" in line]
    return " ".join((colours + "\n".join(rules)).split())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
