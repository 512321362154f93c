"""A labelled collection: a folder of texts with a teacher's logits, as `kdlora label` writes it, and how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas
import pyarrow.parquet as pq
from datasets import Dataset

from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.logit_table import LogitStore, open_store
from kdlora.data.parquet import read_batches
from kdlora.data.spool import TEXTS, are_distinct, make_dataset, spool
from kdlora.data.tasks import Task, match_labels
from kdlora.data.word_tokens import WORDS
from kdlora.errors import ArtifactError, DataError

_MOST_HASHES = 1 << 22
"""Hashes in memory at a time, 8 bytes each; more rows take more passes over the ids."""


def is_collection(folder: Path) -> bool:
    """Whether `kdlora label` wrote this folder."""
    return (folder / COLLECTION_MANIFEST).is_file()


def open_collection(folder: Path) -> LogitStore:
    """Read the manifest of a finished collection."""
    try:
        collection = open_store(folder / COLLECTION_MANIFEST)
    except ArtifactError as fault:
        raise DataError(str(fault)) from None
    if not collection.complete:
        raise DataError(f"{folder}: this labelled collection is unfinished; run the same kdlora label command again")
    return collection


def match_collection(collection: LogitStore, task: Task, key: str) -> list[str]:
    """Name the collection's labels in the task's order, or refuse those of another task."""
    if task.kind == "regression" and len(collection.label_names) == 1:
        return collection.label_names
    where, remedy = f"{collection.folder} ({key})", "Label it with a teacher of this task"
    return [
        collection.label_names[place] for place in match_labels(collection.label_names, task.label_names, where, remedy)
    ]


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
    match_collection(collection, task, "data.unlabelled")
    words = WORDS if task.kind == "tokens" else ()
    table = spool(collection.batches(["id", *TEXTS[: len(task.text)], *words]), str(folder))
    if not are_distinct(table["id"]):
        raise DataError(f"{folder}: ids occur more than once in this collection; label it again from unique ids")
    return make_dataset(table)


def refuse_double_ids(files: Sequence[Path], most_hashes: int = _MOST_HASHES) -> None:
    """Refuse a collection in which an id occurs twice: logits could not be attached to the right row."""
    parts = -(-max(1, sum(pq.read_metadata(file).num_rows for file in files)) // most_hashes)
    for part in range(parts):
        found = [hashes[hashes % parts == part] for _, _, hashes in _hashed_ids(files)]
        values, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]), return_counts=True)
        if not len(suspects := values[counts > 1][:1000]):
            continue
        seen: dict[str, Path] = {}
        for file, ids, hashes in _hashed_ids(files):  # two ids may share a hash
            for name in ids[np.isin(hashes, suspects)]:
                if name in seen:
                    raise DataError(
                        f"the id {name!r} occurs more than once ({seen[name].name}, {file.name}); ids must be unique "
                        "over the whole collection. Make them so, or name another column with --id-column and another "
                        "folder with --to"
                    )
                seen[name] = file


def _hashed_ids(files: Sequence[Path]) -> Iterator[tuple[Path, npt.NDArray[np.object_], npt.NDArray[np.uint64]]]:
    """Give the ids of each file batch by batch, with a hash of 64 bits for each."""
    for file in files:
        for batch in read_batches(file, ["id"]):
            ids = batch.column(0).to_numpy(zero_copy_only=False)
            yield file, ids, pandas.util.hash_array(ids, categorize=False)
