"""A labelled collection: a folder of texts with a teacher's logits, as `kdlora label` writes it, and how to read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.faults import UNREADABLE
from kdlora.data.ids import are_distinct
from kdlora.data.rows import make_dataset, spool
from kdlora.data.tasks import Task
from kdlora.errors import DataError, did_you_mean

SCHEMA_VERSION = 1
LOGIT = "logit:"
"""Marks the columns of logits, so that a label named `id` cannot collide."""
_BATCH_ROWS = 65536


@dataclass(frozen=True)
class Collection:
    """What the manifest of a finished collection says.

    Attributes:
        folder: where the shards lie.
        content: the manifest.
    """

    folder: Path
    content: dict[str, Any]

    @property
    def label_names(self) -> tuple[str, ...]:
        """Labels in the order of the columns."""
        return tuple(self.content["label_names"])

    @property
    def weights(self) -> str:
        """Hash of the teacher's weights."""
        return str(self.content["ingredients"]["weights"])

    @property
    def model(self) -> str:
        """Where the teacher came from."""
        return str(self.content["model"])

    @property
    def fingerprint(self) -> str:
        """Hash over all that made the logits."""
        return str(self.content["fingerprint"])

    @property
    def truncated(self) -> int:
        """Texts that the teacher read cut."""
        return sum(int(shard["truncated"]) for shard in self.content["shards"])

    @property
    def files(self) -> list[Path]:
        """The shards, in the order of the rows."""
        return [self.folder / str(shard["file"]) for shard in self.content["shards"]]

    @property
    def digests(self) -> dict[Path, str]:
        """SHA-256 of every shard, as it was written."""
        return {self.folder / str(shard["file"]): str(shard["sha256"]) for shard in self.content["shards"]}

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Map some columns of every row.

        Args:
            columns: names of columns.

        Raises:
            DataError: a shard is missing or damaged, or there are no rows.
        """
        return spool(self._batches(columns), str(self.folder))

    def _batches(self, columns: Sequence[str]) -> Any:
        for file in self.files:
            try:
                with pq.ParquetFile(file) as parquet:
                    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                        yield batch.select(list(columns))
            except (*UNREADABLE, KeyError) as fault:
                raise DataError(
                    f"{file}: this shard of a labelled collection cannot be read ({fault}); run kdlora label again "
                    f"with --to {self.folder}, which writes what is missing"
                ) from None


def is_collection(folder: Path) -> bool:
    """Whether `kdlora label` wrote this folder.

    Args:
        folder: any path.
    """
    return (folder / COLLECTION_MANIFEST).is_file()


def open_collection(folder: Path) -> Collection:
    """Read the manifest of a finished collection.

    Args:
        folder: as `kdlora label --to` named it.

    Raises:
        DataError: it is unfinished, damaged, or of another version of kdlora.
    """
    path = folder / COLLECTION_MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, complete = content["schema_version"], content["complete"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise DataError(f"{path}: not the manifest of a labelled collection ({fault!r}); label it again") from None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: written by another version of kdlora (schema {version!r}); label it again")
    if not complete:
        raise DataError(f"{folder}: this labelled collection is unfinished; run the same kdlora label command again")
    return Collection(folder, content)


def open_collection_texts(folder: Path, task: Task) -> Dataset:
    """Read ids and texts of a collection that serves as unlabelled rows.

    Args:
        folder: as `kdlora label --to` named it.
        task: whose labels the collection must have, and whether its texts are pairs.

    Returns:
        Canonical columns `id`, `text`, and `text_pair` for pairs.

    Raises:
        DataError: of other labels, without texts, or of single texts where pairs are wanted.
    """
    collection = open_collection(folder)
    names = ["id", "text", "text_pair"][: 1 + len(task.text)]
    if not collection.content["texts"]:
        raise DataError(
            f"{folder} (data.unlabelled) holds logits without texts; label it again without --without-texts"
        )
    if collection.content["texts"] != len(task.text):
        raise DataError(
            f"{folder} (data.unlabelled) holds {collection.content['texts']} text(s) a row, but the task has "
            f"{len(task.text)}: {', '.join(task.text)}"
        )
    check_labels(collection, task, "data.unlabelled")
    table = collection.read(names)
    _refuse_double_ids(table, folder)
    return make_dataset(table)


def check_labels(collection: Collection, task: Task, key: str) -> None:
    """Refuse a collection whose labels are not the task's.

    Args:
        collection: an opened one.
        task: its label names, in any order.
        key: the config key that names the folder.

    Raises:
        DataError: labels are missing or foreign.
    """
    found, wanted = set(collection.label_names), set(task.label_names)
    if found != wanted and not (task.kind == "regression" and len(found) == 1):
        absent = sorted(wanted - found) or sorted(found - wanted)
        raise DataError(
            f"{collection.folder} ({key}) has the labels {', '.join(collection.label_names)}; expected "
            f"{', '.join(task.label_names)}.{did_you_mean(absent[0], found)} Label it with a teacher of this task"
        )


def _refuse_double_ids(table: pa.Table, folder: Path) -> None:
    if not are_distinct(table["id"]):
        raise DataError(f"{folder}: ids occur more than once in this collection; label it again from unique ids")
