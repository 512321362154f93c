"""The one form in which logits lie on disk: shards of an example id and a column `logit:LABEL` a label.

Of an example with words a column holds a list, a value a word; in memory the words of all examples come one after the
other, and `offsets` say where those of each begin.

A shard is a Parquet file. It counts once a note beside it says so; a manifest says what made all of them, and lists
them when they are complete. An experiment's teacher logits and a labelled collection are such folders.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.parquet import parquet_faults, read_batches
from kdlora.data.tasks import Task, match_labels
from kdlora.errors import ArtifactError, DataError, StaleError
from kdlora.foreign import is_plain_name, read_json
from kdlora.system.integrity import compare, hash_file, is_sealed_or_old, seal
from kdlora.system.storage import atomic_file, write_json_atomic

logger = logging.getLogger(__name__)

LOGIT = "logit:"
"""Marks the columns of logits, so that a label named `id` cannot collide."""
RESERVED = ("id", "split", "label", "group", "text", "text_pair", "starts", "ends", "words", "__index_level_0__")
"""Columns of a table by people that are no labels."""


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"the file {name!r:.80} is not in the same folder")
    return name


class Shard(BaseModel):
    """A finished file: rows with logits, rows rejected, texts read cut, and whether the input file `ends` with it."""

    model_config = ConfigDict(strict=True, frozen=True)
    file: Annotated[str, AfterValidator(_plain)]
    sha256: str
    rows: int = 0
    rejected: int = 0
    truncated: int
    ends: bool = False
    rejected_file: str | None = None

    @property
    def rows_read(self) -> int:
        return self.rows + self.rejected

    def state(self, folder: Path) -> str:
        """Say whether the file is `whole`, `damaged` or `gone` since it was written."""
        path = folder / self.file
        if path.is_file() and hash_file(path) == self.sha256:
            return "whole"
        return "damaged" if path.exists() else "gone"


def write_note(folder: Path, shard: Shard) -> None:
    """Let a shard that is on disk count."""
    write_json_atomic(folder / f"{shard.file}.json", shard.model_dump())


def find_shard(folder: Path, name: str) -> Shard | None:
    """Find a shard that is noted, and unchanged."""
    noted = _read_note(folder / f"{name}.json")
    if noted is None or noted.file != name:
        return None
    if (state := noted.state(folder)) != "whole":
        logger.warning("%s is %s since it was written", folder / name, state)
        return None
    return noted


def _read_note(path: Path) -> Shard | None:
    try:
        return Shard.model_validate(read_json(path))
    except (ArtifactError, ValueError):
        return None


class LogitStore(BaseModel):
    """A folder of logits and what its manifest says; `texts` a row lie beside the logits."""

    model_config = ConfigDict(strict=True, frozen=True)
    path: Annotated[Path, Field(exclude=True)]
    schema_version: Literal[1] = 1
    complete: bool = False
    fingerprint: str
    ingredients: dict[str, Any]
    model: str = ""
    task: dict[str, Any] = {}
    label_names: Annotated[list[str], Field(min_length=1)]
    texts: Annotated[int, Field(ge=0, le=2)] = 0
    rows_per_shard: Annotated[int, Field(gt=0)] = 50_000
    versions: dict[str, str]
    shards: list[Shard] = []

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def files(self) -> list[Path]:
        return [self.folder / shard.file for shard in self.shards]

    @property
    def remedy(self) -> str:
        return (
            f"Run the command that made {self.folder} again, which computes what is missing, or delete the folder "
            "first if that does not help"
        )

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.path, seal(self.model_dump()))

    def finish(self, shards: Sequence[Shard], texts: int = 0) -> LogitStore:
        """Write the manifest that makes the logits readable."""
        finished = self.model_copy(update={"complete": True, "shards": list(shards), "texts": texts})
        if finished != self:
            finished.save()
        return finished

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for file in self.files:
            yield from read_batches(file, columns, f"{file}, a shard of logits,", self.remedy)

    def read(self, label_names: Sequence[str]) -> tuple[pa.ChunkedArray, np.ndarray, np.ndarray | None]:
        """Read ids, float32 logits `(rows or words, labels)` and offsets of words; all shards must be whole."""
        if not self.complete:
            raise ArtifactError(f"{self.folder}: these teacher logits are unfinished. {self.remedy}")
        for shard in self.shards:
            if (state := shard.state(self.folder)) != "whole":
                raise ArtifactError(f"{self.folder / shard.file} is {state} since it was written. {self.remedy}")
        names, ids, done = [LOGIT + name for name in label_names], list[pa.Array](), 0
        with parquet_faults(f"{self.folder}, a folder of logits,", self.remedy):
            rows = sum(int(pq.read_metadata(file).num_rows) for file in self.files)
        logits, words, lengths = np.empty((rows, len(names)), np.float32), list[np.ndarray](), list[np.ndarray]()
        for batch in self.batches(["id", *names]):
            ids.append(batch.column(0))
            values, counts = read_logits(batch.columns[1:])
            if counts is None:
                logits[done : done + len(batch)] = values
            else:
                words.append(values)
                lengths.append(counts)
            done += len(batch)
        every = pa.chunked_array(ids, type=pa.string())
        return (every, np.concatenate(words), as_offsets(np.concatenate(lengths))) if words else (every, logits, None)


def open_store(path: Path) -> LogitStore:
    try:
        content = read_json(path)
        if not is_sealed_or_old(content):
            raise ValueError("its content does not fit its checksum: damaged or edited")
        return LogitStore.model_validate(content | {"path": path})
    except (ArtifactError, ValueError) as fault:
        reason = str(fault)
        if isinstance(fault, ValidationError):
            first = fault.errors(include_url=False, include_input=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ArtifactError(
            f"{path}: not a manifest of logits that this version of kdlora reads ({reason}). {_anew(path.parent)}"
        ) from None


def is_collection(folder: Path) -> bool:
    """Whether `kdlora label` wrote this folder."""
    return (folder / COLLECTION_MANIFEST).is_file()


def open_collection(folder: Path) -> LogitStore:
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


def begin_store(wanted: LogitStore) -> LogitStore:
    """Go on with the store of a folder, which must be of the same making, or start it."""
    if not wanted.path.is_file():
        for note in wanted.folder.glob("logits-*.parquet.json"):  # of a store that lost its manifest
            if _read_note(note) is not None:
                write_json_atomic(note, {})  # it no longer counts; what removes a file is in one place
        wanted.save()
        return wanted
    store = open_store(wanted.path)
    if changed := compare(store.ingredients, wanted.ingredients):
        raise StaleError(f"{store.folder}: these logits are stale: {', '.join(changed)} changed. {_anew(store.folder)}")
    before = {name: store.versions.get(name) for name in wanted.versions}
    newer = [f"{name} {before[name]} -> {now}" for name, now in wanted.versions.items() if before[name] != now]
    if newer:
        logger.warning("%s: logits were made with other library versions: %s", store.folder, ", ".join(newer))
    return store


def _anew(folder: Path) -> str:
    return f"Delete the folder {folder} to compute them anew, or choose another output folder"


def logit_columns(
    label_names: Sequence[str], logits: np.ndarray, offsets: np.ndarray | None = None
) -> dict[str, pa.Array]:
    """Give the columns of a table of logits `(rows, labels)`, or of words by their offsets."""
    columns = {LOGIT + name: pa.array(logits[:, place], pa.float32()) for place, name in enumerate(label_names)}
    if offsets is None:
        return columns
    return {name: as_lists(column, offsets) for name, column in columns.items()}


def read_logits(columns: Sequence[pa.Array | pa.ChunkedArray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Give float32 logits, a row an example; or a row a word, beside the number of words of each example."""
    lengths = None
    if pa.types.is_list(columns[0].type):
        lengths, *others = (np.asarray(pc.fill_null(pc.list_value_length(column), 0)) for column in columns)
        if any((other != lengths).any() for other in others):
            raise ArtifactError("the labels of an example have different numbers of words; write the logits again")
        columns = [pc.list_flatten(column) for column in columns]
    return np.stack([np.asarray(column, np.float32) for column in columns], axis=1), lengths


def as_lists(values: pa.Array, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def as_offsets(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def write_table(path: Path, columns: Mapping[str, pa.Array]) -> str:
    table = pa.table(dict(columns))
    return write_tables(path, table.schema, [table])


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> str:
    """Write one table after the other into a file, atomically, and give its SHA-256."""
    with atomic_file(path) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        return hash_file(temporary)
