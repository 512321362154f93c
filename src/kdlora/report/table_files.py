"""Tables as CSV, for programs, and as LaTeX, for papers: pandas writes both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from kdlora.report.blocks import Table

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(lines: Iterable[Sequence[Any]]) -> str:
    """Write lines, the header first, as CSV; a text that a spreadsheet would take for a formula is made harmless."""
    header, *rows = ([_harmless(value) for value in line] for line in lines)
    return str(pd.DataFrame(rows, columns=header, dtype=object).to_csv(index=False, lineterminator="\n"))


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def to_latex(table: Table) -> str:
    """Write a table of the report as LaTeX for the package booktabs; links are left to the pages."""
    lines = [[_plain(cell if isinstance(cell, str) else cell.text) for cell in row] for row in table.rows]
    align = "l" * table.text_columns + "r" * (len(table.columns) - table.text_columns)
    frame = pd.DataFrame(lines, columns=[_plain(name) for name in table.columns], dtype=object)
    return str(frame.to_latex(index=False, escape=True, column_format=align, caption=_plain(table.caption)))


def _plain(text: str) -> str:
    """Write minus signs and blanks as every LaTeX can read them, on one line."""
    return " ".join(text.replace("−", "-").split())
