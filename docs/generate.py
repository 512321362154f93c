"""Write the pages that are generated from the code: `python docs/generate.py [--check]`."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cli_page import cli_page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdlora.config import Config
from kdlora.defaults import RECIPES

FOLDER = Path(__file__).parent
RECIPES_TEXT = (
    "`recipe` fills in these values where your config sets none. [Recipes](recipes.md) has figures. `default` sets no "
    "`data.augment` if a table is the teacher. `null`: chosen by the model or the data."
)


def config_page() -> str:
    """Describe every config field: type, limits, default and meaning, from the models themselves."""
    parts = [
        "# Configuration",
        "",
        "This page is generated from `kdlora.config` by `make docs`. Values are YAML. Any key can be set on the "
        "command line with `--set section.key=value`. `kdlora validate FILE` prints a config with all its defaults.",
        "",
        "A default in the tables is what a config gets that names no recipe. Where `recipe: paper` has another one, it "
        "stands behind it. The Python classes alone, such as `DistilConfig()`, have the defaults of `recipe: paper`.",
    ]
    _describe(Config, "", parts)
    parts += ["", "## Recipes", "", RECIPES_TEXT, "", "| recipe | sets |", "|---|---|"]
    parts += [f"| `{name}` | {_settings(values)} |" for name, values in RECIPES.items()]
    return "\n".join(parts) + "\n"


def _settings(values: Mapping[str, Any], prefix: str = "") -> str:
    """List nested settings as `key: value`."""
    parts = [
        _settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else f"`{prefix}{key}: {_shown(value)[1:]}"
        for key, value in values.items()
    ]
    return ", ".join(parts) or "nothing: the keys' own defaults are the paper's"


def _describe(model: type[BaseModel], prefix: str, parts: list[str]) -> None:
    title = f"`{prefix}`" if prefix else "Top level"
    parts += ["", f"## {title}", "", str(model.__doc__), "", "| key | type | default | meaning |", "|---|---|---|---|"]
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            nested.append((f"{prefix}.{name}".lstrip("."), annotation))
            continue
        path = f"{prefix}.{name}".lstrip(".")
        meaning = " ".join(str(field.description).split())
        parts.append(f"| `{name}` | {_type(annotation)}{_limits(field)} | {_default_of(path, field)} | {meaning} |")
    for path, inner in nested:
        _describe(inner, path, parts)


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " \\| ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    names = {str: "text", int: "whole number", float: "number", bool: "true / false"}
    return names.get(annotation, str(annotation))


def _limit(value: float) -> str:
    """Write a limit; the large ones are powers of two, which counters and seeds have."""
    for less, text in ((0, "2^{}"), (1, "2^{} - 1")):
        whole = int(value) + less
        if value > 10**6 and whole.bit_count() == 1:
            return text.format(whole.bit_length() - 1)
    return f"{value:g}"


def _limits(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {_limit(getattr(part, key))}"
        for part in field.metadata
        for key, sign in signs.items()
        if hasattr(part, key)
    ]
    return f", {' and '.join(found)}" if found else ""


def _default_of(path: str, field: FieldInfo) -> str:
    """Say what a config gets that names no recipe, and what the paper's recipe has where that differs."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    value: Any = RECIPES["default"]
    for key in path.split("."):
        value = value.get(key, default) if isinstance(value, Mapping) else default
    if value == default:
        return "–" if value is None or value == {} else _shown(value)
    return f"{_shown(value)}; paper: {_shown(default)}"


def _shown(value: Any) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    pages = {FOLDER / "config.md": config_page(), FOLDER / "cli.md": cli_page()}
    if "--check" in sys.argv[1:]:
        stale = [path.name for path, page in pages.items() if not path.exists() or path.read_text("utf-8") != page]
        sys.exit(f"stale: {', '.join(stale)}; write them with make docs" if stale else 0)
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
