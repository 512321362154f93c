"""What a page is made of; `render.py` writes it as HTML and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strong:
    """Emphasised text."""

    text: str


@dataclass(frozen=True)
class Link:
    """Text that leads somewhere; `href` is already encoded."""

    text: str
    href: str
    title: str = ""


Inline = str | Strong | Link
Text = tuple[Inline, ...]


@dataclass(frozen=True)
class Paragraph:
    """Running text; tone is "plain", "lead" (the answer), "note" or "warning"."""

    parts: Text
    tone: str = "plain"


def warning(*parts: Inline) -> Paragraph:
    """Make a paragraph that no reader may miss."""
    return Paragraph(parts, "warning")


def note(*parts: Inline) -> Paragraph:
    """Make a paragraph in small print."""
    return Paragraph(parts, "note")


@dataclass(frozen=True)
class Bullets:
    """A list of short paragraphs."""

    items: tuple[Text, ...]


@dataclass(frozen=True)
class Cell:
    """A table's cell; one link makes the text the link, several follow it as small marks.

    A row whose first cell is `quiet` is printed paler.
    """

    text: str
    links: tuple[Link, ...] = ()
    strong: bool = False
    quiet: bool = False


Row = tuple[Cell | str, ...]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; columns behind the `text_columns` are figures, aligned to the right.

    `side` leaves room for the figure that follows; `compact` is for many columns.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    text_columns: int = 1
    note: str = ""
    side: bool = False
    compact: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot; `description` says in words what it shows."""

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

    items: tuple[Quotation, ...]


@dataclass(frozen=True)
class Code:
    """Text to copy, folded away under a summary."""

    summary: str
    text: str


Block = Code | Paragraph | Bullets | Table | Figure | Tiles | Quotations


@dataclass(frozen=True)
class Section:
    """A heading with its blocks and the sections below it."""

    title: str
    anchor: str
    blocks: tuple[Block, ...] = ()
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole report; `kind` names it beside the version that wrote it."""

    title: str
    kind: str
    lead: Text
    sections: tuple[Section, ...]
