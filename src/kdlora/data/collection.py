"""A labelled collection: a folder of texts with a teacher's logits, as `kdlora label` writes it, and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.faults import parquet_faults
from kdlora.data.spool import are_distinct, make_dataset, spool
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError, DataError, did_you_mean
from kdlora.foreign import is_plain_name, read_json

SCHEMA_VERSION = 1
LOGIT = "logit:"
"""Marks the columns of logits, so that a label named `id` cannot collide."""
_BATCH_ROWS = 65536


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("expected a file in the collection's own folder")
    return name


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)
    file: Annotated[str, AfterValidator(_plain)]
    sha256: str
    truncated: int


class _Ingredients(BaseModel):
    model_config = ConfigDict(strict=True)
    weights: str


class _Manifest(BaseModel):
    """What a manifest must hold before anything is done with it."""

    model_config = ConfigDict(strict=True)
    schema_version: int
    complete: bool
    fingerprint: str
    model: str
    label_names: Annotated[list[str], Field(min_length=1)]
    ingredients: _Ingredients
    versions: dict[str, str]
    texts: Annotated[int, Field(ge=0, le=2)]
    shards: list[_Shard]


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
        """Map some columns of every row."""
        return spool(self._batches(columns), str(self.folder))

    def _batches(self, columns: Sequence[str]) -> Any:
        for file in self.files:
            remedy = f"run kdlora label again with --to {self.folder}, which writes what is missing"
            with parquet_faults(f"{file}, a shard of a labelled collection,", remedy), pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                    if missing := [name for name in columns if name not in batch.schema.names]:
                        raise DataError(f"{file}: this shard has no column {missing[0]!r}; {remedy}")
                    yield batch.select(list(columns))


def is_collection(folder: Path) -> bool:
    """Whether `kdlora label` wrote this folder."""
    return (folder / COLLECTION_MANIFEST).is_file()


def open_collection(folder: Path) -> Collection:
    """Read the manifest of a finished collection."""
    path = folder / COLLECTION_MANIFEST
    try:
        content = read_json(path)
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(f"{path}: written by another version of kdlora (schema {version!r:.40}); label it again")
        _Manifest.model_validate(content)
    except ArtifactError as fault:
        raise DataError(str(fault)) from None
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: not the manifest of a labelled collection ({place}: {first['msg']}); label it again"
        ) from None
    if not content["complete"]:
        raise DataError(f"{folder}: this labelled collection is unfinished; run the same kdlora label command again")
    return Collection(folder, content)


def open_collection_texts(folder: Path, task: Task) -> Dataset:
    """Read ids and texts of a collection that serves as unlabelled rows."""
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
    """Refuse a collection whose labels are not the task's."""
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
