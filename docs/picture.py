"""Draw the README's picture, the main plot of a report: `python docs/picture.py EXPERIMENT OUT.svg`."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

from kdlora.report.report import make_report

_FIGURE = re.compile(r'<svg viewBox="([^"]+)" role="img" aria-labelledby="cost-parameters-t.*?</svg>', re.DOTALL)


def draw(experiment: Path, to: Path) -> None:
    """Make a picture that stands alone: colours for light and dark inside.

    Args:
        experiment: a finished experiment's folder.
        to: the SVG file.
    """
    page = make_report(experiment).html
    found = _FIGURE.search(page)
    if found is None:
        raise SystemExit(f"the report of {experiment} has no plot; let the experiment finish")
    _, _, width, height = found[1].split()
    head, rest = found[0].split("</desc>", 1)
    head = head.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    background = f'<rect width="{width}" height="{height}" rx="6" style="fill:var(--card)"/>'
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(f"{head}</desc><style>{_style()}</style>{background}{rest}\n", encoding="utf-8")


def _style() -> str:
    """Give the report's colours, and a font."""
    css = files("kdlora.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    font = 'text { font-family: system-ui, "DejaVu Sans", sans-serif !important; }'
    return " ".join((css[: css.index("* { box-sizing")] + font).split())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
