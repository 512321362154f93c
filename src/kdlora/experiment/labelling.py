"""Teacher logits for collections of text that do not fit in memory: rows come in windows, logits go out in shards."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from kdlora.configfile import COLLECTION_MANIFEST, expand_home, expand_target
from kdlora.data.logit_table import Shard, begin_store, find_shard, open_store, write_note
from kdlora.data.parquet import parquet_faults
from kdlora.data.spool import TEXTS, doubles, make_dataset, spool
from kdlora.data.tags import Words, split_words
from kdlora.data.tasks import Task
from kdlora.data.word_tokens import WORDS
from kdlora.deploy.predict import most_characters
from kdlora.deploy.rows import SUFFIXES, Columns, Row, RowReader, cut_windows
from kdlora.distil.inference import TEACHER_TOKENS, Teacher
from kdlora.distil.precision import resolve_device, resolve_precision
from kdlora.errors import ArtifactError, ConfigError, DataError
from kdlora.experiment.engines import open_engine
from kdlora.models.encoders import load_fine_tuned, read_task
from kdlora.models.loading import open_source, read_config
from kdlora.searchconfig import Resources
from kdlora.system.ownership import refuse_foreign
from kdlora.system.storage import hold_lock, write_text_atomic

Progress = Callable[[int, int | None], None]
"""Called with rows done and rows in all; the latter is None where the input does not say how many it has."""


@dataclass(frozen=True)
class LabelSettings:
    """How a collection is labelled.

    Attributes:
        text: text column, or the two of a pair; by default those of the training data, or `text` (and `text_pair`).
        id_column: any but `id` must be there. Without it a row's id is its number from 0, or "FILE:NUMBER" of several.
        label_names: names of the model's outputs in their order, where its config only says LABEL_0, LABEL_1, …
        revision: commit, tag or branch of a Hub id.
        max_length: longest input in tokens; by default as the model's training noted it in its folder, else 128.
        rows_per_shard: rows of the input in one file; also the piece of work that a kill can cost. By default 10,000,
            or what the folder was begun with.
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
    max_length: int | None = None
    rows_per_shard: int | None = None
    precision: str = "auto"
    device: str = "auto"
    texts: bool = True
    strict: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range. A worker remembers its teacher by the settings, which lists could not name."""
        for name in ("text", "label_names"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name, least in (("rows_per_shard", 1), ("max_length", 4)):
            if (number := getattr(self, name)) is not None and number < least:
                raise ConfigError(f"{name} is at least {least}; got {number}")
        if self.text is not None and len(self.text) not in (1, 2):
            raise ConfigError(f"expected one text column or the two of a pair, got {', '.join(self.text) or 'none'}")


@dataclass(frozen=True)
class LabelSummary:
    """What a labelling left.

    Attributes:
        folder: of the collection.
        rows: rows with logits.
        rejected: rows without text or the like; the files `rejected-*.jsonl` name them with the reason.
        truncated: texts that the teacher read cut.
        max_length: where it cut them, in tokens.
        shards: files of the collection.
        resumed: rows that an earlier, interrupted call had done.
        seconds: wall-clock time of this call.
    """

    folder: Path
    rows: int
    rejected: int
    truncated: int
    max_length: int
    shards: int
    resumed: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    """All that a worker has to know, on whatever machine it runs; a precision of `auto` is settled."""

    model: str
    settings: LabelSettings
    task: Task
    folder: Path
    files: tuple[Path, ...]
    rows_per_shard: int = 10_000
    weights: str = ""  # a hash, so that a worker with other weights refuses

    def columns(self, longest: int) -> Columns:
        """Say where a row's text is, of which so many characters are kept."""
        own, read = self.settings, self.task.text
        names, words, several = (own.text, read, own.id_column), self.task.kind == "tokens", len(self.files) > 1
        return Columns(*names, longest, words=words, texts=len(read), several=several)


@dataclass(frozen=True)
class _Unit:
    """What one worker does in order: a shard of a Parquet file, or a whole file of lines."""

    file: int
    shard: int
    to_the_end: bool

    def name(self, number: int) -> str:
        """Name one of its shards by the input, so that whoever does it again writes the same file."""
        return f"logits-{self.file:05d}-{self.shard + number:06d}.parquet"

    def is_done(self, shards: Sequence[Shard]) -> bool:
        return bool(shards) and (shards[-1].ends or not self.to_the_end)

    def finished_shards(self, folder: Path) -> list[Shard]:
        """List its shards that are whole and unchanged, up to the first that is not."""
        found: list[Shard] = []
        while not self.is_done(found) and (shard := find_shard(folder, self.name(len(found)))) is not None:
            found.append(shard)
        return found


def label_collection(
    model: str,
    data: str,
    to: str | Path,
    settings: LabelSettings | None = None,
    *,
    on: str | None = None,
    progress: Progress | None = None,
) -> LabelSummary:
    """Let a fine-tuned model read a collection of any size, and store its logits by example id.

    Rows go through memory in windows of a few thousand. A shard counts once it is on disk with its checksum: however
    often the call is killed and started again, every row is in the result once. The folder serves as
    `data.unlabelled` of an experiment, or as `teacher.logits`.

    Args:
        model: the fine-tuned teacher: a folder, such as `runs/NAME/teacher`, or a Hub id.
        data: a file, a folder or a pattern of Parquet, JSON Lines, CSV, TSV or text files (one text a line).
        to: the collection's folder; the same call on it goes on.
        settings: columns, lengths and the like.
        on: `ray`, or `ray://ADDRESS`, to spread the work over the machines of a Ray cluster that share the folders.
        progress: called as rows are done.

    Returns:
        Counts and time.

    Raises:
        DataError: no such input, a column that is missing, ids that are not unique.
        ModelError: the model is no classifier, or its outputs have no names.
        ArtifactError: the folder holds a collection of something else, or another process is writing it.
        ConfigError: a number out of range, or Ray cannot be reached.

    Examples:
        >>> labelled = label_collection("runs/reviews/teacher", "reviews.csv", "labelled", LabelSettings(max_length=64))
    """
    start = time.perf_counter()
    folder = refuse_foreign(Path(os.path.realpath(expand_target(to))), COLLECTION_MANIFEST, "labelled collection")
    job = _begin(model, data, folder, settings or LabelSettings())
    held = hold_lock(folder / ".lock", f"labels into {folder}", remedy=", or name another with --to")
    with held, contextlib.ExitStack() as stack:
        stack.callback(_load_teacher.cache_clear)  # another call may find another model there
        teacher = _load_teacher(job.model, job.settings, job.task)
        job = replace(job, weights=teacher.weights)
        store = teacher.new_store(folder / COLLECTION_MANIFEST, _ingredients(job), job.rows_per_shard)
        store = begin_store(store.model_copy(update={"model": job.model, "task": job.task.to_dict()}))
        done = {unit: unit.finished_shards(folder) for unit in _cut_work(job)}
        resumed = sum(shard.rows_read for shards in done.values() for shard in shards)
        _carry_out(job, done, on, progress)
        shards = [shard for shards in done.values() for shard in shards]
        rows, rejected, cut = (sum(getattr(one, key) for one in shards) for key in ("rows", "rejected", "truncated"))
        _refuse_doubles(store.model_copy(update={"shards": shards}).batches(["id"]), str(folder))
        store.finish(shards, len(job.task.text) if job.settings.texts else 0)
    if not rows:
        told = f"none of the {rejected} rows can be labelled; see rejected-*.jsonl there"
        raise DataError(f"{folder}: {told if rejected else f'{data} has no rows'}")
    seconds = time.perf_counter() - start
    return LabelSummary(folder, rows, rejected, cut, teacher.max_length, len(shards), resumed, seconds)


def _given_ids(files: Sequence[Path], columns: Columns) -> Iterator[pa.RecordBatch]:
    """Give the ids of rows with a text, as far as files name them; what numbers its rows is not read to the end."""
    for file in files:
        with contextlib.closing(iter(RowReader(file, columns))) as rows:
            for window in cut_windows(rows):
                if not (ids := [row.id for row in window if row.text is not None and row.id and not row.numbered]):
                    break
                yield pa.record_batch([pa.array(ids, pa.string())], ["id"])


def _refuse_doubles(batches: Iterator[pa.RecordBatch], where: str) -> None:
    """Refuse a collection in which an id occurs twice: logits could not be attached to the right row."""
    first = next(batches, None)  # none where no row has a text, or an id
    if first is not None and len(found := doubles(spool(chain([first], batches), where)["id"])):
        raise DataError(
            f"{where}: the id {found[0].as_py()!r} occurs more than once; ids must be unique over the whole "
            "collection. Make them so, or name another column with --id-column and another folder with --to"
        )


def _begin(model: str, data: str, folder: Path, settings: LabelSettings) -> _Job:
    files = _find_files(data, folder)
    place = expand_home(model)
    model = str(place.resolve()) if place.exists() else model  # found from anywhere; a Hub id stays
    task = read_task(model, text=settings.text or ("text",), **_about_model(settings))
    job = _Job(model, settings, task, folder, files)
    new = () if (folder / COLLECTION_MANIFEST).exists() else files
    # Before anything is begun with ids that are not unique, or columns that are not there.
    _refuse_doubles(_given_ids(new, job.columns(20_000)), data)
    begun = {} if new else open_store(folder / COLLECTION_MANIFEST).ingredients  # timing or model may differ now
    if settings.precision != "auto" or (precision := begun.get("precision")) is None:  # else perhaps another device's
        precision = resolve_precision(settings.precision, settings.device)[0]
    noted = read_config(open_source(model, settings.revision, settings.trust_remote_code))
    longest = settings.max_length or begun.get("max_length") or getattr(noted, "kdlora_max_length", None) or 128
    shard = settings.rows_per_shard or begun.get("rows_per_shard") or job.rows_per_shard
    return replace(job, settings=replace(settings, max_length=longest, precision=precision), rows_per_shard=shard)


def _about_model(settings: LabelSettings) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in ("label_names", "revision", "trust_remote_code")}


def _find_files(data: str, out: Path) -> tuple[Path, ...]:
    place = expand_home(data)
    if place.is_file():
        return (place.resolve(),)
    if place.is_dir():
        found = [path for path in place.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES]
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(place).parts)]
        collections = {path.parent for path in place.rglob(COLLECTION_MANIFEST)} - {place}  # of earlier calls
        found = [path for path in found if collections.isdisjoint(path.parents)]
        if links := [path for path in found if not path.resolve().is_relative_to(place.resolve())]:
            raise DataError(f"{min(links)} is a link out of {data}; copy that file there, or label it by itself")
    else:
        found = [Path(path) for path in glob.glob(str(place), recursive=True) if Path(path).is_file()]  # noqa: PTH207
    found = [path for path in {one.resolve() for one in found} if not path.is_relative_to(out)]  # a link to one is it
    if not found:
        raise DataError(
            f"{data}: no files of {', '.join(SUFFIXES)} there; give a file, a folder, or a pattern in quotes such as "
            "'texts/*.parquet'"
        )
    return tuple(sorted(found))


def _ingredients(job: _Job) -> dict[str, Any]:
    own = {"id_column": job.settings.id_column, "texts": job.settings.texts, "rows_per_shard": job.rows_per_shard}
    inputs = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in job.files]
    return own | {"inputs": inputs, "text": None if job.settings.text is None else list(job.settings.text)}


def _cut_work(job: _Job) -> list[_Unit]:
    """Cut the work: one unit a shard of a Parquet file, whose rows are numbered; one a file of lines."""
    units: list[_Unit] = []
    for number, file in enumerate(job.files):
        lines = file.suffix.lower() != ".parquet"
        shards = 1 if lines else max(1, -(-_count_rows(file) // job.rows_per_shard))
        units += [_Unit(number, shard, to_the_end=lines) for shard in range(shards)]
    return units


def _count_rows(file: Path) -> int:
    with parquet_faults(str(file)):
        return int(pq.read_metadata(file).num_rows)


def _carry_out(job: _Job, done: dict[_Unit, list[Shard]], on: str | None, progress: Progress | None) -> None:
    """Do the units that are not finished, and count rows; what is done twice writes the same file."""
    rows = sum(shard.rows_read for shards in done.values() for shard in shards)
    total = sum(map(_count_rows, job.files)) if all(file.suffix.lower() == ".parquet" for file in job.files) else None

    def tell(more: int) -> None:
        nonlocal rows
        rows += more
        if progress is not None:
            progress(rows, total)

    tell(0)
    left = [unit for unit, shards in done.items() if not unit.is_done(shards)]
    if not left:
        return
    needs = Resources(gpus=0.0 if job.settings.device == "cpu" else None)
    paths = [str(job.folder), *([job.model] if Path(job.model).is_absolute() else [])]
    with open_engine(on, needs, paths) as engine:
        work, next_unit = functools.partial(label_unit, job), functools.partial(next, iter(left), None)
        for unit, shards in engine.results(work, next_unit, lambda _, count: tell(count)):
            if isinstance(shards, Exception):
                raise shards
            done[unit] = shards
            if on is not None:
                tell(sum(shard.rows_read for shard in shards))


@functools.lru_cache(maxsize=1)
def _load_teacher(model: str, settings: LabelSettings, task: Task) -> Teacher:
    """Load the model that labels; a process keeps it between units."""
    encoder, columns = load_fine_tuned(model, task, **_about_model(settings))
    encoder.model.to(resolve_device(settings.device))
    assert settings.max_length is not None  # it is settled
    return Teacher(encoder, columns, task, settings.max_length, settings.precision, TEACHER_TOKENS)


def label_unit(job: _Job, unit: _Unit, hear: Callable[[int], None] | None = None) -> list[Shard]:
    """Do what is left of a unit, on whatever machine, and say how many rows each window had."""
    shards, settings = unit.finished_shards(job.folder), job.settings
    teacher = _load_teacher(job.model, settings, job.task)
    if teacher.weights != job.weights:
        raise ArtifactError(
            f"{job.model}: the weights on this machine are not those that the job began with; bring the same model here"
        )
    longest = sys.maxsize if job.task.kind == "tokens" else most_characters(teacher.max_length, job.task.windows)
    start = unit.shard * job.rows_per_shard + sum(shard.rows_read for shard in shards)
    with contextlib.closing(iter(RowReader(job.files[unit.file], job.columns(longest), start=start))) as rows:
        ahead = list(islice(rows, 1))  # one row, which says whether the file has ended
        while not unit.is_done(shards):
            part = islice(chain(ahead, rows), job.rows_per_shard)
            shard = _write_shard(job, teacher, job.files[unit.file], unit.name(len(shards)), part, hear)
            ahead = list(islice(rows, 1))
            shards.append(shard.model_copy(update={"ends": not ahead}))
            write_note(job.folder, shards[-1])
    return shards


def _write_shard(
    job: _Job, teacher: Teacher, file: Path, name: str, rows: Iterator[Row], hear: Callable[[int], None] | None
) -> Shard:
    root = os.path.commonpath([str(one.parent) for one in job.files])
    prefix = f"{file.relative_to(root).as_posix()}:" if len(job.files) > 1 else ""
    rejected: list[str] = []

    def named(row: Row) -> Row:
        """Make a row's number unique over all files; without an id beside others' it cannot be told from them."""
        return replace(row, id=prefix + row.id) if row.numbered else row if row.id else replace(row, text=None)

    def windows() -> Iterator[Dataset]:
        for window in cut_windows(map(named, rows)):
            bad = [{"id": row.id, "error": row.error} for row in window if row.text is None]
            if bad and job.settings.strict:
                raise DataError(f"{file}, {bad[0]['error']}")
            rejected.extend(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad)
            if good := [row for row in window if row.text is not None]:
                yield _window(good, names)
            if hear is not None:
                hear(len(window))

    names = ["id", *TEXTS[: len(job.task.text)], *(WORDS if job.task.kind == "tokens" else ())]
    kept = names if job.settings.texts else ["id"]
    shard = teacher.write_shard(job.folder / name, windows(), kept=kept)
    if not rejected:
        return shard
    beside = name.replace("logits", "rejected").replace(".parquet", ".jsonl")
    write_text_atomic(job.folder / beside, "".join(rejected))
    return shard.model_copy(update={"rejected": len(rejected), "rejected_file": beside})


def _window(rows: Sequence[Row], names: Sequence[str]) -> Dataset:
    """Make a data set of rows: id, a text or two, and for a task of tokens where each word begins and ends."""
    cells = []
    for row in rows:
        parts: tuple[Any, ...] = row.text if isinstance(row.text, tuple) else (row.text,)
        if WORDS[0] in names and not isinstance(row.text, Words):
            parts = (row.text, *split_words(str(row.text)))
        cells.append((row.id, *parts))
    columns = map(list, zip(*cells, strict=True))
    return make_dataset(pa.table(dict(zip(names, columns, strict=True))))
