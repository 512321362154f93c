"""Read, and quote, what a stranger may have written: JSON of any depth, names that would be paths or markup, links.

Light: no torch, no transformers, no pydantic, since an ONNX folder is served without them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdlora.errors import ArtifactError, ModelError, first_line

_REMEDY = "Copy it again"
_MOST_BYTES = 64 << 20
_MOST_LEVELS = 64
_MOST_OF_A_CARD = 1 << 20
_FRONT_BEGINS, _FRONT_ENDS = re.compile(r"\s*---\n"), re.compile(r"\n---(\n|$)")
"""As huggingface_hub looks for them: a line that only begins with dashes ends nothing."""

Check = tuple[str, Callable[[Any], bool]]
"""What a setting must be, in words and as a test; null and a missing key always pass."""


def read_json(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read a JSON object, at most 64 MB and 64 levels deep."""
    return read_json_and_digest(path, remedy)[0]


def read_json_and_digest(path: Path, remedy: str = _REMEDY) -> tuple[dict[str, Any], str]:
    """Read a JSON object as `read_json` does, and give the SHA-256 of the very bytes that were read."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MB")
        value = json.loads(content.decode("utf-8"))
        _refuse_depth([value])
        json.dumps(value, ensure_ascii=False).encode()  # half a character could never be printed
    except (OSError, ValueError, RecursionError) as fault:
        reason = "it is nested too deep" if isinstance(fault, RecursionError) else str(fault)
        raise ArtifactError(f"{path} is damaged: expected a JSON file, but {reason}. {remedy}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is damaged: expected a JSON object, found {type(value).__name__}. {remedy}")
    return value, hashlib.sha256(content).hexdigest()


def _refuse_depth(value: Any, level: int = 1) -> None:
    """Raise RecursionError for what later steps, which copy and write it, could not walk through."""
    if level > _MOST_LEVELS:
        raise RecursionError
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _refuse_depth(inner, level + 1)


def check_types(values: Mapping[str, Any], checks: Mapping[str, Check], where: Path | str) -> None:
    """Refuse settings of a wrong type before anything is done with them."""
    for key, (words, fits) in checks.items():
        if values.get(key) is not None and not fits(values[key]):
            raise ModelError(f"{where}: {key} must be {words}, got {values[key]!r:.60}")


_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack")


def is_plain_name(name: object) -> bool:
    """Say whether a name from a file stays in its folder: no separator, no `..`, no drive, nothing that is no name."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\:\0")


def leads_out(path: Path) -> bool:
    """Say whether a file of a folder lies elsewhere; the Hub's cache links to `blobs` beside `snapshots`."""
    here, real = path.parent.resolve(), Path(os.path.realpath(path))  # `resolve` fails at a link to itself
    blobs = [parent.parent / "blobs" for parent in (here, *here.parents) if parent.name == "snapshots"]
    return not any(real.is_relative_to(place) for place in (here, *blobs))


def is_special(path: Path) -> bool:
    """Say whether something is a pipe, a socket or a device, which may never end or answer when it is read."""
    return path.exists() and not (path.is_file() or path.is_dir())


def refuse_links_out(folder: Path) -> None:
    """See that nothing in a model's folder lies elsewhere: a student, an export or a page would carry its content on.

    Weights may: nothing else can be read as such.
    """
    for path in sorted(folder.iterdir()):
        if is_special(path):
            raise ModelError(f"{path} is neither a file nor a folder; remove it, and copy what belongs there")
        if path.suffix not in _WEIGHTS and leads_out(path):
            raise ModelError(f"{path} is a link out of its folder; put what it names in its place if it is meant")


def as_code(text: str) -> str:
    """Quote a text as Markdown's code: on one line, between more backticks than it has."""
    flat = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    return f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`"


def read_front_matter(card: Path) -> Any:
    """Read the YAML at the head of a model's or a data set's card, or all of a YAML file; every value is a text."""
    import yaml  # here: what serves has no use for it

    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MOST_OF_A_CARD + 1)
    if card.suffix == ".md":
        begin = _FRONT_BEGINS.match(text)
        end = _FRONT_ENDS.search(text, begin.end() - 1) if begin else None
        if begin is None or (end is None and len(text) <= _MOST_OF_A_CARD):
            return None
        text = text[begin.end() : end.start()] if end else text
    if len(text) > _MOST_OF_A_CARD:
        raise ValueError(f"longer than {_MOST_OF_A_CARD:,} characters")
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)  # no dates, no objects
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(first_line(error)) from None


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of a library in Rust, which is no `Exception` and would end a service, into a ValueError."""
    try:
        yield
    except BaseException as fault:
        if type(fault).__name__ != "PanicException":
            raise
        raise ValueError(f"the library gave up: {first_line(fault)}") from fault
