"""The one form in which logits lie on disk: Parquet files of an example id and a column `logit:LABEL` a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict

from kdlora.data.faults import parquet_faults
from kdlora.errors import ArtifactError
from kdlora.foreign import is_plain_name
from kdlora.system.integrity import hash_file
from kdlora.system.storage import atomic_file

LOGIT = "logit:"
"""Marks the columns of logits, so that a label named `id` cannot collide."""


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"the file {name!r:.80} is not in the same folder")
    return name


class LogitFile(BaseModel):
    """A finished file of a folder, its SHA-256, and how many of its texts the teacher read cut."""

    model_config = ConfigDict(strict=True, frozen=True)
    file: Annotated[str, AfterValidator(_plain)]
    sha256: str
    truncated: int

    def state(self, folder: Path) -> str:
        """Say whether the file is `whole`, `damaged` or `gone` since it was written."""
        path = folder / self.file
        if path.is_file() and hash_file(path) == self.sha256:
            return "whole"
        return "damaged" if path.exists() else "gone"


def logit_columns(label_names: Sequence[str], logits: np.ndarray) -> dict[str, pa.Array]:
    """Give the columns of a table of logits `(rows, labels)`."""
    return {LOGIT + name: pa.array(logits[:, column], pa.float32()) for column, name in enumerate(label_names)}


def write_table(path: Path, columns: Mapping[str, pa.Array]) -> str:
    """Write a file atomically, and give its SHA-256."""
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(dict(columns)), temporary, compression="zstd")
        return hash_file(temporary)


def read_logits(
    folder: Path, files: Sequence[LogitFile], label_names: Sequence[str], remedy: str
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Read ids and float32 logits `(rows, labels)` of files in their order, which the caller has seen to be whole."""
    names, ids, done = [LOGIT + name for name in label_names], list[pa.Array](), 0
    with parquet_faults(f"{folder}, a folder of logits,", remedy):
        rows = sum(int(pq.read_metadata(folder / one.file).num_rows) for one in files)
        logits = np.empty((rows, len(names)), np.float32)
        for one in files:
            table = pq.read_table(folder / one.file, columns=["id", *names], partitioning=None)
            if missing := [name for name in ("id", *names) if name not in table.column_names]:
                raise ArtifactError(f"{folder / one.file} has no column {missing[0]!r}; {remedy}")
            ids += table["id"].chunks
            for column, name in enumerate(names):
                logits[done : done + table.num_rows, column] = table[name].to_numpy()
            done += table.num_rows
    return pa.chunked_array(ids, type=pa.string()), logits
