"""The licence of a pretrained model, which passes on to what is made from it."""

from __future__ import annotations

from pathlib import Path

import yaml


def read_licence(name: str, revision: str | None = None) -> str | None:
    """Read the licence that a model's card states.

    Args:
        name: a folder or a Hub id.
        revision: commit, tag or branch of a Hub id.

    Returns:
        The Hub's id of the licence, such as `apache-2.0`; None where there is no card, or none can be reached.
    """
    card = Path(name) / "README.md" if Path(name).is_dir() else _fetch_card(name, revision)
    if card is None or not card.is_file():
        return None
    _, opening, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        metadata = yaml.safe_load(rest.partition("\n---")[0]) if opening else None
    except yaml.YAMLError:
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and licence else None


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
