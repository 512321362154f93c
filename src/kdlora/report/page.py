"""What a page is made of, and how it is written: HTML that needs nothing else and Markdown, by one template each."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdlora.errors import ArtifactError
from kdlora.system.environment import collect_versions
from kdlora.system.ownership import is_ours, refuse_file
from kdlora.system.storage import write_text_atomic

_SIGN = "every figure leads to the record of its run"
"""Stands in every page that kdlora writes."""
_BLANKS = re.compile(r"[ \x00-\x1f\x7f\u0085\u2028\u2029]+")  # not the no-break space of our own figures
_SIGNS = re.compile(r"([\\`*_{}\[\]|#~$!]|(?<=\w)://|@(?=\w)|^[-+=](?=\s|$))")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Prose(Markup):
    """Text with emphasis, `<strong>` being its only tag; what is put into it by `format` or `+` is escaped."""


def strong(text: str) -> Prose:
    return Prose("<strong>{}</strong>").format(text.strip())


@dataclass(frozen=True)
class Link:
    """Text that leads somewhere; `href` is already encoded."""

    text: str
    href: str
    title: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Running text; tone is "plain", "note" or "warning"."""

    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Cell:
    """A table's cell; one link makes the text the link, several follow it as small marks.

    A row whose first cell is `quiet` is printed paler.
    """

    text: str
    links: tuple[Link, ...] = ()
    quiet: bool = False


Row = tuple[Cell | str, ...]
Item = TypeVar("Item")


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

    @classmethod
    def of(
        cls, caption: str, items: Iterable[Item], columns: Mapping[str, Callable[[Item], Cell | str]], **looks: Any
    ) -> Table:
        """Make a table of items, each column by its title and what it says of an item."""
        rows = tuple(tuple(say(item) for say in columns.values()) for item in items)
        return cls(caption, tuple(columns), rows, **looks)

    def texts(self) -> list[tuple[str, ...]]:
        cells = ((cell if isinstance(cell, str) else cell.text for cell in row) for row in self.rows)
        return [tuple(text.striptags() if isinstance(text, Markup) else text for text in row) for row in cells]


@dataclass(frozen=True)
class Figure:
    """A plot; `description` says in words what it shows."""

    title: str
    svg: str
    description: str
    caption: str = ""


@dataclass(frozen=True)
class Tile:
    """A key figure with what it is and what it is compared with; it leads to the table of runs, or elsewhere."""

    label: str
    value: str
    detail: str
    href: str = "#runs"


Pieces = tuple[tuple[str, str], ...]
"""A text in pieces, each with the type that somebody gives it, or none."""


@dataclass(frozen=True)
class Quotation:
    """One example on which teacher and student disagree; a page shows how each side has `marked` it instead."""

    text: str
    text_pair: str | None
    facts: Mapping[str, str]
    marked: Mapping[str, Pieces] = field(default_factory=dict)


@dataclass(frozen=True)
class Code:
    """Text to copy, folded away under a summary."""

    summary: str
    text: str


Block = Code | Paragraph | Table | Figure | tuple[str, ...] | tuple[Tile, ...] | tuple[Quotation, ...]
"""A part of a section; several texts are a list, several tiles a row."""


@dataclass(frozen=True)
class Section:
    """A heading with its blocks, of which those that are None or empty are left out."""

    title: str
    anchor: str
    blocks: Sequence[Block | None] = ()


@dataclass(frozen=True)
class Page:
    """A whole report; `kind` names it beside the version that wrote it."""

    title: str
    kind: str
    lead: str
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Report:
    """A rendered report."""

    markdown: str = field(repr=False)  # the content of `report.md`
    html: str = field(repr=False)  # of `report.html`: one page with its styles and plots inside, without network
    paths: tuple[Path, ...]  # the files that were written

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame that keeps it apart from the notebook's own styles."""
        look = 'sandbox="allow-scripts" title="kdlora report" style="width:100%;height:720px;border:1px solid #ccc"'
        return f'<iframe {look} srcdoc="{html.escape(self.html)}"></iframe>'


def write_page(page: Page, markdown_path: Path, html_path: Path) -> Report:
    for path in (markdown_path, html_path):
        refuse_file(path.parent)
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder, in the place of what would be written; name another with --out")
        if path.exists() and not is_ours(path) and _SIGN not in path.read_text(encoding="utf-8", errors="replace"):
            raise ArtifactError(f"{path} was not written by kdlora and stays; name another folder with --out")
    report = render(page, (markdown_path, html_path))
    write_text_atomic(markdown_path, report.markdown)
    write_text_atomic(html_path, report.html)
    return report


def render(page: Page, paths: tuple[Path, ...] = ()) -> Report:
    script = files("kdlora.report").joinpath("templates/report.js").read_text(encoding="utf-8")
    facts = {
        "page": page,
        "origin": f"kdlora {collect_versions().get('kdlora', '')} {page.kind}",
        "written": f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {_SIGN}.",
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    markdown, page_html = (engine(name).get_template(f"report.{name}").render(facts) for name in ("md", "html"))
    return Report(f"{markdown}\n", f"{page_html}\n", paths)


def html_table(table: Table) -> str:
    return str(engine("html").get_template("macros.html").module.table(table))  # type: ignore[attr-defined]


def engine(name: str) -> Environment:
    """Set up the engine for HTML, which it escapes itself, Markdown, which `_to_markdown` makes harmless, or Prose."""
    environment = Environment(
        loader=PackageLoader("kdlora.report"),
        autoescape=True,
        finalize={"md": _to_markdown, "prose": _flatten}.get(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"kind": _kind, "fence": _fence}
    return environment


def _kind(block: Block) -> str:
    one = block[0] if isinstance(block, tuple) else block
    return "Bullets" if isinstance(one, str) else type(one).__name__


def _flatten(value: object) -> object:
    """Keep a text on one line: a line is a paragraph."""
    return _BLANKS.sub(" ", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _to_markdown(value: object) -> Markup:
    if isinstance(value, Markup) and not isinstance(value, Prose):
        return value  # what a macro has written
    if not isinstance(value, Prose):
        return Markup(escape(str(value)))
    texts = [Markup(part).unescape() for part in re.split("</?strong>", value)]
    return Markup("**".join(" " * part[:1].isspace() + escape(part) + " " * part[-1:].isspace() for part in texts))


def escape(text: str) -> str:
    flat = _BLANKS.sub(" ", text).strip(" ")
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _NUMBERED.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", flat))


def _fence(text: str) -> Markup:
    return Markup("`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0)))


def to_csv(lines: Iterable[Sequence[Any]]) -> str:
    """Write lines, the header first, as CSV; a text that a spreadsheet would take for a formula is made harmless."""
    import pandas as pd

    def harmless(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

    header, *rows = ([harmless(value) for value in line] for line in lines)
    return str(pd.DataFrame(rows, columns=header, dtype=object).to_csv(index=False, lineterminator="\n"))


def to_latex(table: Table) -> str:
    import pandas as pd

    lines = [[_plain(text) for text in row] for row in table.texts()]
    align = "l" * table.text_columns + "r" * (len(table.columns) - table.text_columns)
    frame = pd.DataFrame(lines, columns=[_plain(name) for name in table.columns], dtype=object)
    return str(frame.to_latex(index=False, escape=True, column_format=align, caption=_plain(table.caption)))


def _plain(text: str) -> str:
    """Write minus signs and blanks as every LaTeX can read them, on one line."""
    return " ".join(text.replace("−", "-").split())
