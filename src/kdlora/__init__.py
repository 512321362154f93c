"""kdlora: distil a fine-tuned encoder into a small, fast classifier with LoRA, with the evidence.

The public names are imported on first use, so that `import kdlora` costs nothing.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOMES = {
    name: module
    for module, names in re.findall(r"^from (\S+) import (\([^)]*\)|.*)", _STUB, re.MULTILINE)
    for name in re.findall(r"\w+ as (\w+)", names)
}
"""The module of each public name, as type checkers read it."""

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("kdlora")
    if name not in _HOMES:
        raise AttributeError(f"module 'kdlora' has no attribute {name!r}")
    from kdlora.extras import extras_named

    with extras_named(f"kdlora.{name}"):
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
