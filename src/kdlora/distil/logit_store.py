"""Teacher logits on disk: shards with checksums and a manifest that says what made them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdlora.distil.fingerprints import compare
from kdlora.distil.tables import PREFIX
from kdlora.errors import ArtifactError
from kdlora.foreign import is_plain_name
from kdlora.system.integrity import hash_file, hash_json, is_sealed_or_old, seal
from kdlora.system.storage import atomic_file, write_json_atomic

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_MEANING = {
    "weights": "the teacher's weights",
    "tokenizer": "the teacher's tokenizer",
    "examples": "ids or texts of the examples",
    "labels": "the labels or their order",
    "columns": "the order of the teacher's outputs",
    "max_length": "the longest input (max_length)",
    "precision": "the number format (precision)",
}


@dataclass(frozen=True)
class Shard:
    """One finished file.

    Attributes:
        file: its name in the folder.
        sha256: of its bytes.
        truncated: texts of it that the teacher read cut.
    """

    file: str
    sha256: str
    truncated: int

    def __post_init__(self) -> None:
        """Refuse a name that leaves the folder."""
        if not is_plain_name(self.file):
            raise ValueError(f"the file {self.file!r:.80} is not in the same folder")


@dataclass
class LogitStore:
    """A folder of shards, each holding a run of consecutive rows.

    Attributes:
        folder: where the shards lie.
        ingredients: hash or value of all that makes the logits.
        label_names: the columns.
        rows: examples in all.
        rows_per_shard: examples in one file.
        versions: library versions that began the work.
        shards: the finished ones, by number.
    """

    folder: Path
    ingredients: Mapping[str, Any]
    label_names: tuple[str, ...]
    rows: int
    rows_per_shard: int
    versions: Mapping[str, str]
    shards: dict[int, Shard] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash over all ingredients."""
        return hash_json(dict(self.ingredients))

    @property
    def shard_count(self) -> int:
        """Number of shards when all are there."""
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, number: int) -> range:
        """Rows that a shard holds."""
        return range(number * self.rows_per_shard, min((number + 1) * self.rows_per_shard, self.rows))

    def is_whole(self, number: int) -> bool:
        """Say whether a shard was finished and is still what was written."""
        shard = self.shards.get(number)
        if shard is None:
            return False
        path = self.folder / shard.file
        if path.is_file() and hash_file(path) == shard.sha256:
            return True
        logger.warning("%s is %s since it was written", path, "damaged" if path.exists() else "gone")
        return False

    def write(self, number: int, ids: Sequence[str], logits: np.ndarray, truncated: int) -> None:
        """Store a shard, then say so in the manifest."""
        name = f"logits-{number:05d}.parquet"
        columns = {"id": pa.array(ids, pa.string())}
        columns |= {PREFIX + label: pa.array(logits[:, column]) for column, label in enumerate(self.label_names)}
        with atomic_file(self.folder / name) as temporary:
            pq.write_table(pa.table(columns), temporary, compression="zstd")
            digest = hash_file(temporary)
        self.shards[number] = Shard(name, digest, truncated)
        self.save()

    def read(self, number: int) -> tuple[pa.ChunkedArray, np.ndarray]:
        """Read ids and logits of a shard."""
        table = pq.read_table(self.folder / self.shards[number].file, partitioning=None)
        logits = [table.column(PREFIX + label).to_numpy() for label in self.label_names]
        return table.column("id"), np.stack(logits, axis=1)

    def save(self) -> None:
        """Write the manifest."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "ingredients": dict(self.ingredients),
            "label_names": list(self.label_names),
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "versions": dict(self.versions),
            "shards": {str(number): asdict(shard) for number, shard in sorted(self.shards.items())},
        }
        write_json_atomic(_manifest(self.folder), seal(content))


def load_store(folder: Path) -> LogitStore | None:
    """Read the manifest of a folder."""
    path = _manifest(folder)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ArtifactError(f"{path}: of another version of kdlora. {_remedy(folder)}")
        if not is_sealed_or_old(content):
            raise ArtifactError(f"{path}: its content does not fit its checksum: damaged or edited. {_remedy(folder)}")
        return LogitStore(
            folder=folder,
            ingredients=content["ingredients"],
            label_names=tuple(content["label_names"]),
            rows=int(content["rows"]),
            rows_per_shard=int(content["rows_per_shard"]),
            versions=content["versions"],
            shards={int(number): Shard(**shard) for number, shard in content["shards"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ArtifactError(f"{path}: not a manifest of teacher logits ({fault!r}). {_remedy(folder)}") from None


def open_store(
    folder: Path,
    ingredients: Mapping[str, Any],
    label_names: tuple[str, ...],
    rows: int,
    rows_per_shard: int,
    versions: Mapping[str, str],
) -> LogitStore:
    """Continue the store of a folder, or start one."""
    store = load_store(folder)
    if store is None:
        store = LogitStore(folder, ingredients, label_names, rows, rows_per_shard, versions)
        store.save()
        return store
    changed = compare(store.ingredients, ingredients)
    if changed:
        named = ", ".join(_MEANING.get(name, name) for name in changed)
        raise ArtifactError(f"{folder}: these teacher logits are stale: {named} changed. {_remedy(folder)}")
    newer = [
        f"{name} {store.versions.get(name)} -> {now}"
        for name, now in versions.items()
        if store.versions.get(name) != now
    ]
    if newer and store.shards:
        logger.warning("%s: teacher logits were made with other library versions: %s", folder, ", ".join(newer))
    return store


def _manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def _remedy(folder: Path) -> str:
    return f"Delete the folder {folder} to compute them anew, or choose another output folder"
