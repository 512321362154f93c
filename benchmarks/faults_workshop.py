"""What the parts of `faults.py` share: tiny models and data, and lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from experiments import Workshop


def build_workshop(folder: Path) -> Workshop:
    """Build tiny models and data, unless they are there.

    Args:
        folder: where they lie.
    """
    if not (folder / "validation.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tiny.build_model_folder("bert", folder / "teacher")
        tiny.build_model_folder("distilbert", folder / "student", layers=1)
        tiny.write_csv(folder / "train.csv", tiny.sentiment_rows(64))
        tiny.write_csv(folder / "validation.csv", tiny.sentiment_rows(40, seed=1))
    return Workshop(folder / "teacher", folder / "student", folder / "train.csv", folder / "validation.csv")


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read lines of JSON; none where the file is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
