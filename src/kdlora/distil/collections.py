"""A labelled collection as a teacher: its logits by id."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdlora.data.collection import LOGIT, check_labels, open_collection
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import hash_file
from kdlora.distil.logits import TeacherLogits
from kdlora.errors import ArtifactError


def read_collection(folder: Path, task: Task, key: str) -> TeacherLogits:
    """Read the logits of a finished collection.

    Args:
        folder: as `kdlora label --to` named it.
        task: whose labels the collection must have; its columns are matched by name.
        key: the config key that names the folder, for messages.

    Raises:
        DataError: unfinished, unreadable, or of other labels.
        ArtifactError: a shard is not what was written.
    """
    collection = open_collection(folder)
    check_labels(collection, task, key)
    for file, digest in collection.digests.items():
        if not file.is_file() or hash_file(file) != digest:
            raise ArtifactError(
                f"{file} is {'damaged' if file.exists() else 'gone'} since it was written; run the same kdlora label "
                "command again, which writes it anew"
            )
    names = collection.label_names if task.kind == "regression" else task.label_names
    table = collection.read(["id", *(LOGIT + name for name in names)])
    logits = np.empty((table.num_rows, len(names)), np.float32)
    for column, name in enumerate(names):
        logits[:, column] = table[LOGIT + name].to_numpy()
    return TeacherLogits(
        ids=table["id"],
        logits=logits,
        label_names=task.label_names,
        fingerprint=collection.fingerprint,
        versions=dict(collection.content["versions"]),
        truncated=collection.truncated,
        source=str(folder),
    )
