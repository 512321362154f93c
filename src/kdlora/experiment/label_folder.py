"""A labelled collection on disk: its input files, the pieces of work, the shards that are done, the manifest."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdlora.configfile import COLLECTION_MANIFEST, expand_home
from kdlora.data.collection import SCHEMA_VERSION
from kdlora.data.faults import REMEDY, UNREADABLE
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import compare
from kdlora.errors import ArtifactError, DataError
from kdlora.foreign import is_plain_name
from kdlora.system.integrity import hash_file, hash_json
from kdlora.system.storage import write_json_atomic

Hashes = npt.NDArray[np.uint64]
_BATCH_ROWS = 65536
MOST_HASHES = 1 << 22
"""Hashes in memory at a time, 8 bytes each; more rows take more passes over the ids."""
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_MEANING = {
    "weights": "the teacher's weights",
    "tokenizer": "the teacher's tokenizer",
    "labels": "the labels or their order",
    "columns": "the order of the teacher's outputs",
    "max_length": "the longest input (--max-length)",
    "precision": "the number format (--precision)",
    "inputs": "the input files",
    "text": "the text columns (--text)",
    "id_column": "the id column (--id-column)",
    "texts": "whether texts are kept (--without-texts)",
    "rows_per_shard": "the rows of a shard (--rows-per-shard)",
}


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


@dataclass(frozen=True)
class Shard:
    """One finished file of the output: rows with logits, rows rejected, texts that the teacher read cut.

    The input file ends with it where `ends` says so.
    """

    file: str
    sha256: str
    rows: int
    rejected: int
    truncated: int
    ends: bool
    rejected_file: str | None = None

    @property
    def rows_read(self) -> int:
        """Rows of the input that it covers."""
        return self.rows + self.rejected

    def __post_init__(self) -> None:
        """Refuse a name that leaves the folder."""
        if not is_plain_name(self.file):
            raise ValueError(f"the file {self.file!r:.80} is not in the same folder")


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
        shards = max(1, -(-_count_rows(file) // job.settings.rows_per_shard))
        units += [Unit(number, shard, last=shard == shards - 1) for shard in range(shards)]
    return units


def _count_rows(file: Path) -> int:
    try:
        return int(pq.ParquetFile(file).metadata.num_rows)
    except UNREADABLE as fault:
        raise DataError(f"{file} is no readable Parquet file ({fault}); {REMEDY}") from None


def finished_shards(folder: Path, unit: Unit) -> list[Shard]:
    """List the shards of a unit that are whole and unchanged, up to the first that is not."""
    found: list[Shard] = []
    while not is_finished(unit, found):
        name = shard_name(unit.file, unit.shard + len(found))
        try:
            shard = Shard(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
            if shard.file != name or hash_file(folder / name) != shard.sha256:
                break
        except (OSError, ValueError, TypeError, RecursionError):
            break
        found.append(shard)
    return found


def is_finished(unit: Unit, shards: list[Shard]) -> bool:
    """Say whether whole shards are all of a unit."""
    return bool(shards) and (shards[-1].ends or not unit.last)


def write_note(folder: Path, shard: Shard) -> None:
    """Let a shard that is on disk count."""
    write_json_atomic(folder / f"{shard.file}.json", asdict(shard))


def begin_collection(job: LabelJob, ingredients: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """Write the manifest of a new collection, or check that the one there is of the same job."""
    path = job.folder / COLLECTION_MANIFEST
    if path.is_file():
        content = _read_manifest(path)
        if changed := compare(content["ingredients"], ingredients):
            named = ", ".join(_MEANING.get(name, name) for name in changed)
            raise ArtifactError(
                f"{job.folder} holds a collection that was labelled otherwise: {named} changed. Name another folder "
                "with --to, or delete this one"
            )
        return content
    if job.folder.exists() and any(not entry.name.startswith(".") for entry in job.folder.iterdir()):
        raise ArtifactError(f"{job.folder} is not empty and holds no labelled collection; name another with --to")
    content = {
        "schema_version": SCHEMA_VERSION,
        "complete": False,
        "fingerprint": hash_json(dict(ingredients)),
        "ingredients": dict(ingredients),
        "model": job.model,
        "task": job.task.to_dict(),
        "label_names": list(job.task.label_names),
        "texts": 0,
        "versions": dict(versions),
        "shards": [],
    }
    write_json_atomic(path, content)
    return content


def finish_collection(job: LabelJob, content: Mapping[str, Any], shards: list[Shard], texts: int) -> None:
    """Write the manifest that makes the collection readable."""
    done = {"complete": True, "texts": texts, "shards": [asdict(shard) for shard in shards]}
    write_json_atomic(job.folder / COLLECTION_MANIFEST, {**content, **done})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] == SCHEMA_VERSION and "ingredients" in content:
            return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ArtifactError(f"{path}: damaged, or of another version of kdlora; delete {path.parent} and label it again")


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
        for name in ids.filter(pa.array(np.isin(hashes, suspects))).to_pylist():
            if name in seen:
                raise DataError(
                    f"the id {name!r} occurs more than once ({seen[name].name}, {file.name}); ids must be unique over "
                    "the whole collection. Make them so, or name another column with --id-column and another folder "
                    "with --to"
                )
            seen[name] = file


def _hashed(files: Sequence[Path]) -> Iterator[tuple[Path, pa.Array, Hashes]]:
    """Give the ids of each file batch by batch, with a hash of 64 bits for each."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=["id"]):
                ids = batch.column(0)
                texts = pc.cast(ids, pa.binary()).to_pylist()
                digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
                yield file, ids, np.frombuffer(digests, dtype=np.uint64)
