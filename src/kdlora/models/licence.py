"""The licence of a pretrained model, which passes on to what is made from it."""

from __future__ import annotations

import re
from pathlib import Path

from kdlora.foreign import read_front_matter

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
"""What ids of licences consist of; anything else would be markup in the student's own card."""


def read_licence(name: str, revision: str | None = None) -> str | None:
    """Read the licence that a model's card states."""
    card = Path(name) / "README.md" if Path(name).is_dir() else _fetch_card(name, revision)
    if card is None or not card.is_file():
        return None
    try:
        metadata = read_front_matter(card)
    except ValueError:
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None


def _fetch_card(name: str, revision: str | None) -> Path | None:
    """Fetch a card from the Hub or its cache; without one the student's card says that it is not known."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "README.md", revision=revision, etag_timeout=5))
    except (
        OSError,
        ValueError,
    ):  # not there, not reachable, not allowed
        return None
