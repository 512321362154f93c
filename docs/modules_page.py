"""Adds the page of modules to the site: every file of the package with the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

SOURCE = Path(__file__).parents[1] / "src" / "kdlora"


def on_files(files: Any, config: Any) -> Any:
    """Put the page among the files of the site (called by MkDocs); nothing is written into the repository.

    Args:
        files: of the site.
        config: of the site.
    """
    files.append(File.generated(config, "modules.md", content=modules_page()))
    return files


def modules_page() -> str:
    """List every package and what each of its files is for, in the files' own words."""
    parts = [
        "# Modules",
        "",
        "Every file of the package with the first line of its docstring, read from the code when the site is built. "
        "[Architecture](architecture.md) says how they go together.",
    ]
    folders = [SOURCE, *sorted(path for path in SOURCE.iterdir() if (path / "__init__.py").exists())]
    for folder in folders:
        name = f"kdlora.{folder.name}" if folder != SOURCE else "kdlora"
        parts += [
            "",
            f"## {name}",
            "",
            _first_line(folder / "__init__.py"),
            "",
            "| file | what it is for |",
            "|---|---|",
        ]
        files = [file for file in sorted(folder.glob("*.py")) if not file.name.startswith("__")]
        parts += [f"| `{file.name}` | {_first_line(file)} |" for file in files]
    return "\n".join(parts) + "\n"


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n", 1)[0].replace("|", "\\|")
