"""A labelled collection: a folder of texts with a teacher's logits, as `kdlora label` writes it, and how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.faults import parquet_faults
from kdlora.data.logit_table import LogitFile
from kdlora.data.spool import are_distinct, make_dataset, spool
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError, DataError, did_you_mean
from kdlora.foreign import read_json

SCHEMA_VERSION = 1
_BATCH_ROWS = 65536


class Collection(BaseModel):
    """What the manifest of a finished collection says: `texts` a row, and the hash of all that made the logits."""

    model_config = ConfigDict(strict=True, frozen=True)
    folder: Path
    complete: bool
    fingerprint: str
    model: str
    label_names: Annotated[list[str], Field(min_length=1)]
    ingredients: dict[str, Any]
    versions: dict[str, str]
    texts: Annotated[int, Field(ge=0, le=2)]
    shards: list[LogitFile]

    @property
    def files(self) -> list[Path]:
        """The shards, in the order of the rows."""
        return [self.folder / shard.file for shard in self.shards]

    @property
    def remedy(self) -> str:
        """What mends a damaged collection."""
        return f"run kdlora label again with --to {self.folder}, which writes what is missing"

    def check_labels(self, task: Task, key: str) -> None:
        """Refuse a collection whose labels are not the task's."""
        found, wanted = set(self.label_names), set(task.label_names)
        if found != wanted and not (task.kind == "regression" and len(found) == 1):
            absent = sorted(wanted - found) or sorted(found - wanted)
            raise DataError(
                f"{self.folder} ({key}) has the labels {', '.join(self.label_names)}; expected "
                f"{', '.join(task.label_names)}.{did_you_mean(absent[0], found)} Label it with a teacher of this task"
            )


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
        collection = Collection.model_validate(content | {"folder": folder})
    except ArtifactError as fault:
        raise DataError(str(fault)) from None
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: not the manifest of a labelled collection ({place}: {first['msg']}); label it again"
        ) from None
    if not collection.complete:
        raise DataError(f"{folder}: this labelled collection is unfinished; run the same kdlora label command again")
    return collection


def open_collection_texts(folder: Path, task: Task) -> Dataset:
    """Read ids and texts of a collection that serves as unlabelled rows."""
    collection = open_collection(folder)
    if not collection.texts:
        raise DataError(
            f"{folder} (data.unlabelled) holds logits without texts; label it again without --without-texts"
        )
    if collection.texts != len(task.text):
        raise DataError(
            f"{folder} (data.unlabelled) holds {collection.texts} text(s) a row, but the task has "
            f"{len(task.text)}: {', '.join(task.text)}"
        )
    collection.check_labels(task, "data.unlabelled")
    table = spool(_text_batches(collection, ["id", "text", "text_pair"][: 1 + len(task.text)]), str(folder))
    if not are_distinct(table["id"]):
        raise DataError(f"{folder}: ids occur more than once in this collection; label it again from unique ids")
    return make_dataset(table)


def _text_batches(collection: Collection, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for file in collection.files:
        faults = parquet_faults(f"{file}, a shard of a labelled collection,", collection.remedy)
        with faults, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                if missing := [name for name in columns if name not in batch.schema.names]:
                    raise DataError(f"{file}: this shard has no column {missing[0]!r}; {collection.remedy}")
                yield batch.select(list(columns))
