"""Checksums of what is kept, so that damage is noticed before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Give the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def compare(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name the ingredients of a result that differ."""
    return [name for name in current if stored.get(name) != current[name]]


def hash_files(root: Path, places: Iterable[Path]) -> dict[str, str]:
    """Give the SHA-256 of files, and of all files below folders."""
    found: dict[str, str] = {}
    for place in places:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found |= {file.relative_to(root).as_posix(): hash_file(file) for file in files if file.is_file()}
    return found


def damaged_files(root: Path, digests: Mapping[str, str]) -> list[str]:
    """Name the files that are not what was written; a folder that is gone as a whole was removed, not damaged."""
    return [
        name
        for name, digest in digests.items()
        if (hash_file(root / name) != digest if (root / name).is_file() else (root / name).parent.is_dir())
    ]


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a JSON object a checksum over all else in it."""
    return {**document, CHECKSUM: _digest(document)}


def is_sealed_or_old(document: Mapping[str, Any]) -> bool:
    """Say whether a JSON object is what was written; one without a checksum comes from an earlier version."""
    return CHECKSUM not in document or document[CHECKSUM] == _digest(document)


def _digest(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
