"""How results show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Give a table that a notebook shows; every text is escaped.

    Args:
        header: names of the columns; the first names the rows.
        rows: cells as text.
        caption: what the table shows.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_frame(page: str, *, height: int = 720) -> str:
    """Give a frame that shows a whole page inside a notebook, apart from the notebook's own styles.

    Args:
        page: HTML that needs nothing else.
        height: of the frame, in pixels.
    """
    style = f"width:100%;height:{height}px;border:1px solid #ccc"
    return f'<iframe sandbox="allow-scripts" title="kdlora report" style="{style}" srcdoc="{escape(page)}"></iframe>'
