"""Type a page's commands from top to bottom: `python run_page.py PAGE`, in an empty folder."""

import subprocess
import sys
from pathlib import Path

from pages import read_blocks


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
