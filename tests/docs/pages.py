"""Read the code blocks of a page: what is written to a file, run, or not run for which reason.

`python pages.py PAGE` types the page's commands from top to bottom, in an empty folder.
"""

import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"^(?P<comment><!-- (?P<directive>[^\n]*?) -->\n)?^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)
_TITLE = re.compile(r'title="([^"]+)"')
_INCLUDE = re.compile(r"^--8<--\n(\S+)\n--8<--$", re.M)
"""The block form: the one-line form is valid Python, and the formatter spreads it until it is no longer found."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    title: str | None
    code: str
    excuse: str | None
    line: int

    @property
    def is_run(self) -> bool:
        """Whether a reader would type it."""
        return self.language in ("bash", "python") and self.title is None and self.excuse is None


def read_blocks(page: Path) -> list[Block]:
    """Give the blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in _FENCE.finditer(text):
        directive, info = found["directive"] or "", found["info"]
        title = _TITLE.search(info)
        blocks.append(
            Block(
                language=info.split()[0] if info.strip() else "",
                title=title[1] if title else None,
                code=_INCLUDE.sub(lambda m: (ROOT / m[1]).read_text("utf-8"), textwrap.dedent(found["code"])),
                excuse=directive.removeprefix("not run: ") if directive.startswith("not run: ") else None,
                line=text[: found.start()].count("\n") + 1,
            )
        )
    return blocks


def follow(command: Sequence[str], folder: Path, environment: dict[str, str]) -> str:
    """Do as a reader does, in a folder; give what was printed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def pages() -> list[Path]:
    """List the pages that people read; generated ones print commands that others explain."""
    written = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in ("cli.md", "config.md")]
    return [ROOT / "README.md", *written]


def main() -> None:
    """Run the page that the command line names; its Python blocks share one session, as a reader's would."""
    page = Path(sys.argv[1])
    session: dict[str, object] = {"__name__": "__session__"}
    for block in read_blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.title is not None and block.excuse is None:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.is_run:
            print(f"=== {where}", flush=True)
            if block.language == "python":
                exec(compile(block.code, where, "exec"), session)
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)


if __name__ == "__main__":
    main()
