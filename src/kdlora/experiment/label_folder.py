"""What `kdlora label` is to do: its settings, the input files, the pieces of work, and the shards that are done."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas
import pyarrow.parquet as pq

from kdlora.configfile import expand_home
from kdlora.data.faults import REMEDY, UNREADABLE
from kdlora.data.logit_table import Shard, find_shard
from kdlora.data.tasks import Task
from kdlora.errors import DataError

Hashes = npt.NDArray[np.uint64]
_BATCH_ROWS = 65536
MOST_HASHES = 1 << 22
"""Hashes in memory at a time, 8 bytes each; more rows take more passes over the ids."""
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class LabelSettings:
    """How a collection is labelled.

    Attributes:
        text: text column, or the two of a pair; by default those of the training data, or `text` (and `text_pair`).
        id_column: names a row; where there is none the row's number from 0 is its id, after the file's name and a
            colon where there are several files.
        label_names: names of the model's outputs in their order, where its config only says LABEL_0, LABEL_1, …
        revision: commit, tag or branch of a Hub id.
        max_length: longest input in tokens.
        rows_per_shard: rows of the input in one file; also the piece of work that a kill can cost.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu` or `cuda`.
        texts: keep the texts beside the logits, so that the collection can serve as `data.unlabelled`.
        strict: stop at the first bad row instead of noting it in `rejected-*.jsonl`.
        trust_remote_code: let the model's own Python code run.
    """

    text: tuple[str, ...] | None = None
    id_column: str = "id"
    label_names: tuple[str, ...] | None = None
    revision: str | None = None
    max_length: int = 128
    rows_per_shard: int = 50_000
    precision: str = "auto"
    device: str = "auto"
    texts: bool = True
    strict: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Take lists too; a worker remembers its teacher by the settings, which lists could not name."""
        for name in ("text", "label_names"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class LabelJob:
    """All that a worker has to know, on whatever machine it runs.

    A precision of `auto` is settled; `names` is how ids call the files; `weights` is a hash, so that a worker with
    other weights refuses.
    """

    model: str
    settings: LabelSettings
    task: Task
    folder: Path
    files: tuple[Path, ...]
    names: tuple[str, ...]
    weights: str


@dataclass(frozen=True)
class Unit:
    """What one worker does in order: a shard of an input file, or all from there to the end of the file."""

    file: int
    shard: int
    last: bool


def find_files(data: str) -> tuple[Path, ...]:
    """Find the input files."""
    place = expand_home(data)
    if place.is_file():
        return (place.resolve(),)
    if place.is_dir():
        found = [path for path in place.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES]
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(place).parts)]
    else:
        found = [Path(path) for path in glob.glob(str(place), recursive=True) if Path(path).is_file()]  # noqa: PTH207
    if not found:
        raise DataError(
            f"{data}: no files of {', '.join(SUFFIXES)} there; give a file, a folder, or a pattern in quotes such as "
            "'texts/*.parquet'"
        )
    return tuple(sorted(path.resolve() for path in found))


def shard_name(file: int, shard: int) -> str:
    """Name a shard by its input, so that whoever does it again writes the same file."""
    return f"logits-{file:05d}-{shard:06d}.parquet"


def make_units(job: LabelJob) -> list[Unit]:
    """Cut the work: one unit a shard of a Parquet file, whose rows are numbered; one a file of lines."""
    units: list[Unit] = []
    for number, file in enumerate(job.files):
        if file.suffix.lower() != ".parquet":
            units.append(Unit(number, 0, last=True))
            continue
        shards = max(1, -(-count_rows(file) // job.settings.rows_per_shard))
        units += [Unit(number, shard, last=shard == shards - 1) for shard in range(shards)]
    return units


def count_rows(file: Path) -> int:
    """Count the rows of a Parquet file."""
    try:
        return int(pq.ParquetFile(file).metadata.num_rows)
    except UNREADABLE as fault:
        raise DataError(f"{file} is no readable Parquet file ({fault}); {REMEDY}") from None


def finished_shards(folder: Path, unit: Unit) -> list[Shard]:
    """List the shards of a unit that are whole and unchanged, up to the first that is not."""
    found: list[Shard] = []
    while not is_finished(unit, found):
        shard = find_shard(folder, shard_name(unit.file, unit.shard + len(found)))
        if shard is None:
            break
        found.append(shard)
    return found


def is_finished(unit: Unit, shards: Sequence[Shard]) -> bool:
    """Say whether whole shards are all of a unit."""
    return bool(shards) and (shards[-1].ends or not unit.last)


def refuse_double_ids(files: Sequence[Path], most_hashes: int = MOST_HASHES) -> None:
    """Refuse a collection in which an id occurs twice: logits could not be attached to the right row."""
    rows = sum(int(pq.ParquetFile(file).metadata.num_rows) for file in files)
    parts = -(-max(1, rows) // most_hashes)
    for part in range(parts):
        found = [hashes[hashes % parts == part] for _, _, hashes in _hashed(files)]
        values, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]), return_counts=True)
        if len(suspects := values[counts > 1][:1000]):
            _refuse_if_equal(files, suspects)


def _refuse_if_equal(files: Sequence[Path], suspects: Hashes) -> None:
    """Look at the ids themselves, since two of them may share a hash."""
    seen: dict[str, Path] = {}
    for file, ids, hashes in _hashed(files):
        for name in ids[np.isin(hashes, suspects)]:
            if name in seen:
                raise DataError(
                    f"the id {name!r} occurs more than once ({seen[name].name}, {file.name}); ids must be unique over "
                    "the whole collection. Make them so, or name another column with --id-column and another folder "
                    "with --to"
                )
            seen[name] = file


def _hashed(files: Sequence[Path]) -> Iterator[tuple[Path, npt.NDArray[np.object_], Hashes]]:
    """Give the ids of each file batch by batch, with a hash of 64 bits for each."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=["id"]):
                ids = batch.column(0).to_numpy(zero_copy_only=False)
                yield file, ids, pandas.util.hash_array(ids, categorize=False)
