"""What a report is made of, whatever it is rendered to; its rendering as Markdown, and tables for notebooks."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

_BLANKS = re.compile(r"[ \x00-\x1f\x7f\u0085\u2028\u2029]+")  # not the no-break space of our own figures
_SIGNS = re.compile(r"([\\`*_{}\[\]|#~$!]|(?<=\w)://|@(?=\w)|^[-+=](?=\s|$))")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")


@dataclass(frozen=True)
class Strong:
    """Emphasised text."""

    kind: ClassVar[str] = "strong"
    text: str


@dataclass(frozen=True)
class Link:
    """Text that leads somewhere; `href` is already encoded."""

    kind: ClassVar[str] = "link"
    text: str
    href: str
    title: str = ""


Inline = str | Strong | Link


@dataclass(frozen=True)
class Paragraph:
    """Running text; tone is "plain", "lead" (the answer), "note" or "warning"."""

    kind: ClassVar[str] = "paragraph"
    parts: tuple[Inline, ...]
    tone: str = "plain"


@dataclass(frozen=True)
class Bullets:
    """A list of short paragraphs."""

    kind: ClassVar[str] = "bullets"
    items: tuple[tuple[Inline, ...], ...]


@dataclass(frozen=True)
class Cell:
    """A table's cell; one link makes the text the link, several follow it as small marks."""

    text: str
    links: tuple[Link, ...] = ()
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; `numeric` columns are aligned to the right.

    `quiet` rows are printed paler; `side` leaves room for the figure that follows; `compact` is for many columns.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    quiet: frozenset[int] = frozenset()
    note: str = ""
    side: bool = False
    compact: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot; `description` says in words what it shows."""

    kind: ClassVar[str] = "figure"
    title: str
    svg: str
    description: str
    caption: str = ""


@dataclass(frozen=True)
class Tile:
    """A key figure with what it is and what it is compared with."""

    label: str
    value: str
    detail: str
    href: str = ""


@dataclass(frozen=True)
class Tiles:
    """A row of key figures."""

    kind: ClassVar[str] = "tiles"
    items: tuple[Tile, ...]


@dataclass(frozen=True)
class Quotation:
    """One example on which teacher and student disagree."""

    text: str
    text_pair: str | None
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Quotations:
    """Examples, one after the other."""

    kind: ClassVar[str] = "quotations"
    items: tuple[Quotation, ...]


@dataclass(frozen=True)
class Code:
    """Text to copy, folded away under a summary."""

    kind: ClassVar[str] = "code"
    summary: str
    text: str


Block = Code | Paragraph | Bullets | Table | Figure | Tiles | Quotations


@dataclass(frozen=True)
class Section:
    """A heading with its blocks and the sections below it."""

    title: str
    anchor: str
    blocks: tuple[Block, ...] = ()
    sections: tuple[Section, ...] = field(default=())


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    eyebrow: str
    lead: tuple[Inline, ...]
    sections: tuple[Section, ...]
    footer: str


def to_markdown(page: Page) -> str:
    """Render a page as GitHub's Markdown; plots are described in words and left to the HTML page."""
    lines = [f"# {escape(page.title)}", "", _inline(page.lead), ""]
    for section in page.sections:
        lines += _section(section, level=2)
    return "\n".join([*lines, "---", "", f"{escape(page.eyebrow)}. {escape(page.footer)}", ""])


def escape(text: str) -> str:
    """Make text harmless in a line or table cell of Markdown."""
    flat = _BLANKS.sub(" ", text).strip(" ")
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _NUMBERED.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", flat))


def _section(section: Section, level: int) -> list[str]:
    """Render a heading and what is below it."""
    lines = [f'<a id="{section.anchor}"></a>', "", f"{'#' * min(level, 6)} {escape(section.title)}", ""]
    for block in section.blocks:
        lines += [*_block(block), ""]
    for part in section.sections:
        lines += _section(part, level + 1)
    return lines


def _block(block: Block) -> list[str]:
    """Render one block."""
    if isinstance(block, Paragraph):
        text = _inline(block.parts)
        return [f"> {text}"] if block.tone in ("note", "warning") else [text]
    if isinstance(block, Bullets):
        return [f"- {_inline(parts)}" for parts in block.items]
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        return [f"{escape(block.summary)}:", "", fence, *block.text.splitlines(), fence]
    if isinstance(block, Figure):
        return [f"*{escape(block.title)}.* {escape(block.description)} (Drawn in the HTML page beside this one.)"]
    if isinstance(block, Tiles):
        return [f"- {escape(tile.label)}: **{escape(tile.value)}** ({escape(tile.detail)})" for tile in block.items]
    return [line for quotation in block.items for line in _quotation(quotation)]


def _inline(parts: Sequence[Inline]) -> str:
    """Render running text."""
    return "".join(_part(part) for part in parts)


def _part(part: Inline) -> str:
    """Render one piece of running text, the blanks around it kept."""
    if isinstance(part, Strong):
        return f"**{escape(part.text)}**"
    if isinstance(part, Link):
        return f"[{escape(part.text)}]({part.href})"
    before = " " if part[:1].isspace() else ""
    after = " " if part[-1:].isspace() and part.strip() else ""
    return f"{before}{escape(part)}{after}"


def _table(table: Table) -> list[str]:
    """Render a table with its caption above and its note below."""
    rule = ["---:" if column in table.numeric else "---" for column in range(len(table.columns))]
    lines = [f"**{escape(table.caption)}**", "", _row([escape(name) for name in table.columns]), _row(rule)]
    lines += [_row([_cell(cell) for cell in row]) for row in table.rows]
    return [*lines, "", escape(table.note)] if table.note else lines


def _row(cells: Sequence[str]) -> str:
    """Put cells between bars."""
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    """Render a cell with its links."""
    text = f"**{escape(cell.text)}**" if cell.strong and cell.text else escape(cell.text)
    if len(cell.links) == 1:
        return f"[{text or escape(cell.links[0].text)}]({cell.links[0].href})"
    marks = " ".join(f"[{escape(link.text)}]({link.href})" for link in cell.links)
    return f"{text} {marks}".strip()


def _quotation(quotation: Quotation) -> list[str]:
    """Render an example as an item with its facts below."""
    lines = [f"- “{escape(quotation.text)}”"]
    if quotation.text_pair is not None:
        lines.append(f"  / “{escape(quotation.text_pair)}”")
    return lines + [f"  - {escape(name)}: {escape(value)}" for name, value in quotation.facts]


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Give a table that a notebook shows; every text is escaped."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def html_frame(page: str, *, height: int = 720) -> str:
    """Give a frame that shows a whole page inside a notebook, apart from the notebook's own styles."""
    style = f"width:100%;height:{height}px;border:1px solid #ccc"
    return (
        f'<iframe sandbox="allow-scripts" title="kdlora report" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
    )
