"""What a labelling job consists of: the input files, the pieces of work, and what is done already."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlora.configfile import COLLECTION_MANIFEST, expand_home
from kdlora.data.collection import SCHEMA_VERSION
from kdlora.data.faults import REMEDY, UNREADABLE
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import compare, hash_file, hash_json
from kdlora.errors import ArtifactError, DataError
from kdlora.evidence.records import write_json_atomic

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
class LabelJob:
    """All that a worker has to know, on whatever machine it runs.

    Attributes:
        model: source of the teacher: a folder or a Hub id.
        revision: commit, tag or branch on the Hub.
        label_names: names of the teacher's columns, where its config has none.
        task: labels and kind.
        folder: of the collection.
        files: the input files.
        names: how ids call the files, where rows have no id and there are several files.
        text: text columns; None finds them by name.
        id_column: column that names a row.
        rows_per_shard: rows of the input in one file of the output.
        max_length: longest input of the teacher in tokens.
        precision: `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu` or `cuda`.
        texts: whether the texts are kept beside the logits.
        strict: stop at the first bad row.
        weights: hash of the teacher's weights, so that a worker with others refuses.
        trust_remote_code: let the teacher's own Python code run.
    """

    model: str
    revision: str | None
    label_names: tuple[str, ...] | None
    task: Task
    folder: Path
    files: tuple[Path, ...]
    names: tuple[str, ...]
    text: tuple[str, ...] | None
    id_column: str
    rows_per_shard: int
    max_length: int
    precision: str
    device: str
    texts: bool
    strict: bool
    weights: str
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Unit:
    """A piece of work that one worker does in order.

    Attributes:
        file: number of the input file.
        shard: number of the first shard of the file that belongs to it.
        last: whether it goes on to the file's end, over as many shards as it takes; else it is one shard.
    """

    file: int
    shard: int
    last: bool


@dataclass(frozen=True)
class Shard:
    """One finished file of the output.

    Attributes:
        file: its name.
        sha256: of its bytes.
        rows: rows with logits.
        rejected: rows of the input that have none, each with its reason in the file `rejected_file`.
        truncated: texts that the teacher read cut.
        ends: whether the input file ends with it.
        rejected_file: beside it, or None.
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


def find_files(data: str) -> tuple[Path, ...]:
    """Find the input files.

    Args:
        data: a file, a folder (searched with its folders), or a pattern such as `texts/*.parquet`.

    Returns:
        The files in the order of their names, absolute.

    Raises:
        DataError: there are none.
    """
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
    """Name a shard by its input, so that whoever does it again writes the same file.

    Args:
        file: number of the input file.
        shard: number of the shard within it.
    """
    return f"logits-{file:05d}-{shard:06d}.parquet"


def make_units(job: LabelJob) -> list[Unit]:
    """Cut the work: one unit a shard of a Parquet file, whose rows are numbered; one a file of lines.

    Args:
        job: the job.

    Raises:
        DataError: a Parquet file cannot be read.
    """
    units: list[Unit] = []
    for number, file in enumerate(job.files):
        if file.suffix.lower() != ".parquet":
            units.append(Unit(number, 0, last=True))
            continue
        shards = max(1, -(-_count_rows(file) // job.rows_per_shard))
        units += [Unit(number, shard, last=shard == shards - 1) for shard in range(shards)]
    return units


def _count_rows(file: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return int(pq.ParquetFile(file).metadata.num_rows)
    except UNREADABLE as fault:
        raise DataError(f"{file} is no readable Parquet file ({fault}); {REMEDY}") from None


def finished_shards(folder: Path, unit: Unit) -> list[Shard]:
    """List the shards of a unit that are whole, up to the first that is not.

    Args:
        folder: of the collection.
        unit: the piece of work.
    """
    found: list[Shard] = []
    for number in range(unit.shard, unit.shard + 1) if not unit.last else _upwards(unit.shard):
        shard = read_shard(folder, shard_name(unit.file, number))
        if shard is None:
            break
        found.append(shard)
        if shard.ends:
            break
    return found


def is_finished(unit: Unit, shards: list[Shard]) -> bool:
    """Say whether whole shards are all of a unit.

    Args:
        unit: the piece of work.
        shards: from `finished_shards`.
    """
    return bool(shards) and (shards[-1].ends or not unit.last)


def _upwards(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


def note_path(folder: Path, name: str) -> Path:
    """Name the small file that makes a shard count.

    Args:
        folder: of the collection.
        name: of the shard.
    """
    return folder / f"{name}.json"


def read_shard(folder: Path, name: str) -> Shard | None:
    """Read what is known of a shard, if it is whole and unchanged.

    Args:
        folder: of the collection.
        name: of the shard.
    """
    try:
        shard = Shard(**json.loads(note_path(folder, name).read_text(encoding="utf-8")))
        return shard if hash_file(folder / name) == shard.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def write_note(folder: Path, shard: Shard) -> None:
    """Let a shard count.

    Args:
        folder: of the collection.
        shard: which is on disk.
    """
    write_json_atomic(note_path(folder, shard.file), asdict(shard))


def describe_inputs(files: tuple[Path, ...]) -> list[list[Any]]:
    """Name the files with size and time, by which a change shows.

    Args:
        files: of the input.
    """
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def begin_collection(job: LabelJob, ingredients: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """Write the manifest of a new collection, or check that the one there is of the same job.

    Args:
        job: the job.
        ingredients: hash or value of all that makes the logits.
        versions: library versions.

    Returns:
        The manifest, not complete.

    Raises:
        ArtifactError: the folder holds something else.
    """
    path = job.folder / COLLECTION_MANIFEST
    if path.is_file():
        content = _read_manifest(path)
        changed = compare(content["ingredients"], ingredients)
        if changed:
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
    """Write the manifest that makes the collection readable.

    Args:
        job: the job.
        content: the manifest so far.
        shards: all of them, in the order of the rows.
        texts: text columns that the shards hold, 0 to 2.
    """
    done = {"complete": True, "texts": texts, "shards": [asdict(shard) for shard in shards]}
    write_json_atomic(job.folder / COLLECTION_MANIFEST, {**content, **done})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] == SCHEMA_VERSION and "ingredients" in content:
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ArtifactError(f"{path}: damaged, or of another version of kdlora; delete {path.parent} and label it again")
