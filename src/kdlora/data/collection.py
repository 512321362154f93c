"""A labelled collection: a folder of texts with a teacher's logits, as `kdlora label` writes it, and how to read it."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.logit_table import LogitStore, open_store
from kdlora.data.spool import TEXTS, doubles, make_dataset, spool
from kdlora.data.tasks import Task, match_labels
from kdlora.data.word_tokens import WORDS
from kdlora.errors import ArtifactError, DataError


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
    if len(found := doubles(table["id"])):
        raise DataError(f"{folder}: the id {found[0].as_py()!r} occurs more than once; label it again from unique ids")
    return make_dataset(table)
