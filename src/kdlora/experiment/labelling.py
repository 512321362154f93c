"""Teacher logits for collections of text that do not fit in memory: rows come in windows, logits go out in shards."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from kdlora.configfile import COLLECTION_MANIFEST, expand_home
from kdlora.data.batches import Tokenised, encode_texts
from kdlora.data.collection import is_collection
from kdlora.data.logit_table import LogitStore, Shard, begin_store, open_store, write_note
from kdlora.deploy.encode import most_characters
from kdlora.deploy.rows import Columns, Row, RowReader, cut_windows
from kdlora.distil.inference import BATCH_TOKENS
from kdlora.distil.precision import resolve_device, resolve_precision
from kdlora.distil.teacher import Teacher, Window
from kdlora.errors import ArtifactError, ConfigError, DataError, KdLoraError
from kdlora.experiment.engines import LostError, open_engine
from kdlora.experiment.label_folder import (
    LabelJob,
    LabelSettings,
    Unit,
    count_rows,
    find_files,
    finished_shards,
    is_finished,
    make_units,
    refuse_double_ids,
    shard_name,
)
from kdlora.models.encoders import load_fine_tuned, read_task
from kdlora.searchconfig import Resources
from kdlora.system.storage import hold_lock, write_text_atomic

_CUDA_BATCH_TOKENS = 65536

Progress = Callable[[int, int | None], None]
"""Called with rows done and rows in all; the latter is None where the input does not say how many it has."""


@dataclass(frozen=True)
class LabelSummary:
    """What a labelling left.

    Attributes:
        folder: of the collection.
        rows: rows with logits.
        rejected: rows without text or the like; the files `rejected-*.jsonl` name them with the reason.
        truncated: texts that the teacher read cut.
        shards: files of the collection.
        resumed: rows that an earlier, interrupted call had done.
        seconds: wall-clock time of this call.
    """

    folder: Path
    rows: int
    rejected: int
    truncated: int
    shards: int
    resumed: int
    seconds: float


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
    """
    start = time.perf_counter()
    settings = settings or LabelSettings()
    _check(settings)
    labeller = _begin(model, data, expand_home(str(to)).resolve(), settings)
    job = labeller.job
    doing = f"labels into {job.folder}"
    with hold_lock(job.folder / ".lock", doing, remedy=", or name another with --to"):
        if not is_collection(job.folder) and any(not entry.name.startswith(".") for entry in job.folder.glob("*")):
            raise ArtifactError(f"{job.folder} is not empty and holds no labelled collection; name another with --to")
        store = begin_store(labeller.new_store())
        done = {unit: finished_shards(job.folder, unit) for unit in make_units(job)}
        resumed = sum(shard.rows_read for shards in done.values() for shard in shards)
        _carry_out(labeller, done, on, _counting(job, progress, resumed))
        shards = [shard for shards in done.values() for shard in shards]
        refuse_double_ids([job.folder / shard.file for shard in shards])
        store.finish(shards, len(job.task.text) if settings.texts else 0)
    rows, rejected, truncated = (sum(getattr(one, key) for one in shards) for key in ("rows", "rejected", "truncated"))
    if not rows:
        raise DataError(f"{job.folder}: none of the {rejected} rows has a text; see rejected-*.jsonl there")
    seconds = time.perf_counter() - start
    return LabelSummary(job.folder, rows, rejected, truncated, len(shards), resumed, seconds)


def _check(settings: LabelSettings) -> None:
    rows, tokens, text = settings.rows_per_shard, settings.max_length, settings.text
    if rows < 1 or tokens < 4:
        raise ConfigError(f"rows_per_shard is at least 1 and max_length 4; got {rows} and {tokens}")
    if text is not None and len(text) not in (1, 2):
        raise ConfigError(f"expected one text column or the two of a pair, got {len(text)}: {', '.join(text)}")


def _begin(model: str, data: str, folder: Path, settings: LabelSettings) -> Labeller:
    """Settle what the model decides, and load it once."""
    files = find_files(data)
    place = expand_home(model)
    model = str(place.resolve()) if place.exists() else model  # found from anywhere; a Hub id stays
    task = read_task(
        model,
        label_names=settings.label_names,
        text=settings.text or ("text",),
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    wanted = _recorded_precision(folder) if settings.precision == "auto" else settings.precision
    settings = replace(settings, precision=resolve_precision(wanted, settings.device)[0])
    task = task if settings.text is None else replace(task, text=settings.text)
    common = Path(os.path.commonpath([str(file.parent) for file in files]))
    names = tuple(file.relative_to(common).as_posix() for file in files)
    labeller = Labeller(LabelJob(model, settings, task, folder, files, names, ""))
    labeller.job = replace(labeller.job, weights=labeller.teacher.weights)
    return labeller


def _recorded_precision(folder: Path) -> str:
    """Give what `auto` was found to be when this collection was begun: a second timing may come out otherwise."""
    with contextlib.suppress(ArtifactError):
        return str(open_store(folder / COLLECTION_MANIFEST).ingredients.get("precision", "auto"))
    return "auto"


def _counting(job: LabelJob, progress: Progress | None, done: int) -> Callable[[int], None]:
    """Give a function that adds rows and tells the caller, first of those that were there."""
    known = all(file.suffix.lower() == ".parquet" for file in job.files)
    total = sum(count_rows(file) for file in job.files) if known else None

    def add(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    add(0)
    return add


def _carry_out(labeller: Labeller, done: dict[Unit, list[Shard]], on: str | None, tell: Callable[[int], None]) -> None:
    """Do the units that are not finished; what is done twice writes the same file."""
    job = labeller.job
    left = [unit for unit, shards in done.items() if not is_finished(unit, shards)]
    if not left:
        return
    units = iter(left)
    needs = Resources(gpus=0.0 if job.settings.device == "cpu" else None)
    paths = [str(job.folder), *([job.model] if Path(job.model).is_absolute() else [])]
    with open_engine(on, needs, paths) as engine:
        work = labeller.label if on is None else functools.partial(label_unit, job)
        for unit, shards in engine.results(work, lambda: next(units, None), lambda _, rows: tell(rows)):
            if isinstance(shards, LostError):
                raise KdLoraError(f"a worker was lost again and again, the last time by: {shards}")
            if isinstance(shards, Exception):
                raise shards
            done[unit] = shards
            if on is not None:
                tell(sum(shard.rows_read for shard in shards))


def label_unit(job: LabelJob, unit: Unit, hear: Callable[[int], None] | None = None) -> list[Shard]:
    """Do what is left of a unit, on whatever machine; a process keeps the teacher between units."""
    return _labeller(job).label(unit, hear)


@functools.lru_cache(maxsize=1)
def _labeller(job: LabelJob) -> Labeller:
    return Labeller(job)


class Labeller:
    """A teacher, loaded when the first row needs it, and the units of work that it does one after the other."""

    def __init__(self, job: LabelJob) -> None:
        self.job = job

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The model that labels, on its device."""
        job, settings = self.job, self.job.settings
        encoder, columns = load_fine_tuned(
            job.model,
            job.task,
            label_names=settings.label_names,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
        device = resolve_device(settings.device)
        batch_tokens = BATCH_TOKENS if device.type == "cpu" else _CUDA_BATCH_TOKENS
        names, precision = job.task.label_names, settings.precision
        teacher = Teacher(encoder, columns, names, settings.max_length, precision, batch_tokens)
        if job.weights and teacher.weights != job.weights:
            raise ArtifactError(
                f"{job.model}: the weights on this machine are not those that the job began with; bring the same "
                "model here"
            )
        encoder.model.to(device)
        return teacher

    def new_store(self) -> LogitStore:
        """Describe the collection to be made."""
        job, settings = self.job, self.job.settings
        ingredients = self.teacher.ingredients() | {
            "id_column": settings.id_column,
            "texts": settings.texts,
            "rows_per_shard": settings.rows_per_shard,
            "inputs": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in job.files],
            "text": None if settings.text is None else list(settings.text),
        }
        store = self.teacher.new_store(job.folder / COLLECTION_MANIFEST, ingredients, settings.rows_per_shard)
        return store.model_copy(update={"model": job.model, "task": job.task.to_dict()})

    def label(self, unit: Unit, hear: Callable[[int], None] | None = None) -> list[Shard]:
        """Do what is left of a unit, and say how many rows each window had."""
        shards = finished_shards(self.job.folder, unit)
        if is_finished(unit, shards):
            return shards
        settings = self.job.settings
        columns = Columns(settings.text, self.job.task.text, settings.id_column, most_characters(settings.max_length))
        start = unit.shard * settings.rows_per_shard + sum(shard.rows_read for shard in shards)
        with contextlib.closing(iter(RowReader(self.job.files[unit.file], columns, start=start))) as rows:
            ahead = list(islice(rows, 1))  # one row, which says whether the file has ended
            while not is_finished(unit, shards):
                part = islice(chain(ahead, rows), settings.rows_per_shard)
                shard = self._write(shard_name(unit.file, unit.shard + len(shards)), part, unit, hear)
                ahead = list(islice(rows, 1))
                shards.append(shard.model_copy(update={"ends": not ahead}))
                write_note(self.job.folder, shards[-1])
        return shards

    def _write(self, name: str, rows: Iterator[Row], unit: Unit, hear: Callable[[int], None] | None) -> Shard:
        """Write one shard, and beside it the rows that were rejected."""
        job, rejected = self.job, list[str]()
        kept = ["id", *(["text", "text_pair"][: len(job.task.text)] if job.settings.texts else [])]
        shard = self.teacher.write_shard(job.folder / name, self._windows(rows, unit, rejected, hear), kept=kept)
        if not rejected:
            return shard
        beside = name.replace("logits", "rejected").replace(".parquet", ".jsonl")
        write_text_atomic(job.folder / beside, "".join(rejected))
        return shard.model_copy(update={"rejected": len(rejected), "rejected_file": beside})

    def _windows(
        self, rows: Iterator[Row], unit: Unit, rejected: list[str], hear: Callable[[int], None] | None
    ) -> Iterator[Window]:
        """Give rows some thousand at a time, and set aside those without a text."""
        for window in cut_windows(rows):
            good = [row for row in window if row.text is not None]
            bad = [{"id": self._id(row, unit), "error": row.error} for row in window if row.text is None]
            if bad and self.job.settings.strict:
                raise DataError(f"{self.job.files[unit.file]}, {bad[0]['error']}")
            rejected += [json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad]
            if good:
                yield self._tokenise(good, unit)
            if hear is not None:
                hear(len(window))

    def _tokenise(self, rows: Sequence[Row], unit: Unit) -> Window:
        pairs = self.job.task.is_pair
        if isinstance(rows[0].text, tuple) != pairs:
            raise DataError(
                f"{self.job.files[unit.file]}: the model reads {'pairs of texts' if pairs else 'single texts'}; name "
                f"{'two text columns' if pairs else 'one text column'} with --text"
            )
        texts: dict[str, list[Any]] = {"text": [row.text for row in rows]}
        if pairs:
            texts = {name: [row.text[part] for row in rows] for part, name in enumerate(("text", "text_pair"))}  # type: ignore[index]
        tokenizer = self.teacher.encoder.tokenizer
        limit = min(self.job.settings.max_length, tokenizer.model_max_length)
        encoded = encode_texts(texts, tokenizer, limit)
        truncated = sum(encoded.pop("truncated"))
        # Not `tokenise`, which shows a bar of its own; a fingerprint of its own saves hashing.
        tokens = Tokenised(Dataset(pa.table(encoded), fingerprint="window"), truncated, limit)
        kept = texts if self.job.settings.texts else {}
        return Window({"id": [self._id(row, unit) for row in rows]} | kept, tokens)

    def _id(self, row: Row, unit: Unit) -> str:
        """Give a row its id; a row number is only unique within its file."""
        is_number = row.numbered and len(self.job.files) > 1
        return f"{self.job.names[unit.file]}:{row.id}" if is_number else row.id
