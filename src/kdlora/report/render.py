"""Pages as HTML that needs nothing else and as Markdown, by one template each."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdlora.errors import ArtifactError
from kdlora.report.blocks import Page, Table
from kdlora.system.ownership import is_ours
from kdlora.system.storage import write_text_atomic

_SIGN = "every figure leads to the record of its run"
"""Stands in every page that kdlora writes."""
_BLANKS = re.compile(r"[ \x00-\x1f\x7f\u0085\u2028\u2029]+")  # not the no-break space of our own figures
_SIGNS = re.compile(r"([\\`*_{}\[\]|#~$!]|(?<=\w)://|@(?=\w)|^[-+=](?=\s|$))")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")


@dataclass(frozen=True)
class Report:
    """A rendered report.

    Attributes:
        markdown: the content of `report.md`.
        html: the content of `report.html`: one page with its styles and plots inside, without network.
        paths: the files that were written.
    """

    markdown: str = field(repr=False)
    html: str = field(repr=False)
    paths: tuple[Path, ...]

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame that keeps it apart from the notebook's own styles."""
        look = 'sandbox="allow-scripts" title="kdlora report" style="width:100%;height:720px;border:1px solid #ccc"'
        return f'<iframe {look} srcdoc="{html.escape(self.html)}"></iframe>'


def write_page(page: Page, markdown_path: Path, html_path: Path) -> Report:
    """Render a page both ways and write both files atomically."""
    for path in (markdown_path, html_path):
        if path.exists() and not is_ours(path) and _SIGN not in path.read_text(encoding="utf-8", errors="replace"):
            raise ArtifactError(f"{path} was not written by kdlora and stays; name another folder with --out")
    report = render(page, (markdown_path, html_path))
    write_text_atomic(markdown_path, report.markdown)
    write_text_atomic(html_path, report.html)
    return report


def render(page: Page, paths: tuple[Path, ...] = ()) -> Report:
    """Render a page both ways; every text is escaped by the template engine."""
    script = files("kdlora.report").joinpath("templates/report.js").read_text(encoding="utf-8")
    facts = {
        "page": page,
        "origin": f"{_version()} {page.kind}",
        "written": f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {_SIGN}.",
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    markdown, page_html = (engine(name).get_template(f"report.{name}").render(facts) for name in ("md", "html"))
    return Report(f"{markdown}\n", f"{page_html}\n", paths)


def _version() -> str:
    try:
        return f"kdlora {version('kdlora')}"
    except PackageNotFoundError:
        return "kdlora"


def engine(name: str) -> Environment:
    """Set up the engine for HTML, which it escapes itself, or for Markdown, which `escape` makes harmless."""
    escaping = (
        (lambda value: value if isinstance(value, Markup) else Markup(escape(str(value)))) if name == "md" else None
    )
    environment = Environment(
        loader=PackageLoader("kdlora.report"),
        autoescape=True,
        finalize=escaping,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"kind": lambda part: type(part).__name__, "running": _running, "fence": _fence}
    return environment


def escape(text: str) -> str:
    """Make text harmless in a line or table cell of Markdown."""
    flat = _BLANKS.sub(" ", text).strip(" ")
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _NUMBERED.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", flat))


def _running(text: str) -> Markup:
    """Escape a piece of running text, the blanks around it kept."""
    before = " " if text[:1].isspace() else ""
    after = " " if text[-1:].isspace() and text.strip() else ""
    return Markup(f"{before}{escape(text)}{after}")


def _fence(text: str) -> Markup:
    """Give a fence that the text does not hold."""
    return Markup("`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0)))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Give a table that a notebook shows; every text is escaped."""
    table = Table(caption, tuple(header), tuple(tuple(row) for row in rows))
    return str(engine("html").get_template("macros.html").module.table(table))  # type: ignore[attr-defined]
