"""Teacher logits for collections of text that do not fit in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kdlora.configfile import expand_home
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError, ConfigError, DataError
from kdlora.evidence.records import collect_versions
from kdlora.scale.label_ids import refuse_double_ids
from kdlora.scale.label_plan import (
    LabelJob,
    Shard,
    Unit,
    begin_collection,
    describe_inputs,
    find_files,
    finish_collection,
    finished_shards,
    is_finished,
    make_units,
)

if TYPE_CHECKING:
    from kdlora.models.encoders import Encoder

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 50_000

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
    *,
    text: Sequence[str] | None = None,
    id_column: str = "id",
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
    max_length: int = 128,
    rows_per_shard: int = ROWS_PER_SHARD,
    precision: str = "auto",
    device: str = "auto",
    texts: bool = True,
    strict: bool = False,
    trust_remote_code: bool = False,
    on: str | None = None,
    progress: Progress | None = None,
) -> LabelSummary:
    """Let a fine-tuned model read a collection of any size, and store its logits by example id.

    Rows go through memory in windows of a few thousand. A shard counts once it is on disk with its checksum: however
    often the call is killed and started again, every row is in the result once. The folder serves as
    `data.unlabelled`, and as `teacher.logits` where its ids are those of the training rows.

    Args:
        model: a fine-tuned classifier: a folder, such as `runs/NAME/teacher`, or a Hub id.
        data: a file, a folder or a pattern of Parquet, JSON Lines, CSV, TSV or text files (one text a line).
        to: the collection's folder; the same call on it goes on.
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
    if rows_per_shard < 1 or max_length < 4:
        raise ConfigError(f"rows_per_shard is at least 1 and max_length 4; got {rows_per_shard} and {max_length}")
    if text is not None and len(text) not in (1, 2):
        raise ConfigError(f"expected one text column or the two of a pair, got {len(text)}: {', '.join(text)}")
    job, encoder = _begin(
        LabelJob(
            model=_absolute(model),
            revision=revision,
            label_names=None if label_names is None else tuple(label_names),
            task=Task("regression", ("text",), ("label",), ("label",), ()),  # settled in `_begin`
            folder=expand_home(str(to)).resolve(),
            files=(files := find_files(data)),
            names=_short_names(files),
            text=None if text is None else tuple(text),
            id_column=id_column,
            rows_per_shard=rows_per_shard,
            max_length=max_length,
            precision=precision,
            device=device,
            texts=texts,
            strict=strict,
            weights="",
            trust_remote_code=trust_remote_code,
        )
    )
    return _carry_out(job, encoder, on, progress, start)


def _begin(job: LabelJob) -> tuple[LabelJob, tuple[Encoder, list[int]]]:
    """Settle what the model decides, and load it once."""
    from kdlora.distil.fingerprints import hash_model
    from kdlora.distil.precision import resolve_precision
    from kdlora.models.fine_tuned import read_task
    from kdlora.scale.label_work import load_teacher

    task = read_task(
        job.model,
        label_names=job.label_names,
        text=_canonical(job.text),
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
    )
    if job.text is not None:
        task = replace(task, text=job.text)
    precision, _ = resolve_precision(job.precision, job.device)
    job = replace(job, task=task, precision=precision)
    encoder, columns = load_teacher(job)
    return replace(job, weights=hash_model(encoder.model)), (encoder, columns)


def _carry_out(
    job: LabelJob,
    teacher: tuple[Encoder, list[int]],
    on: str | None,
    progress: Progress | None,
    start: float,
) -> LabelSummary:
    from kdlora.distil.fingerprints import hash_tokenizer

    encoder, columns = teacher
    ingredients = {
        "weights": job.weights,
        "tokenizer": hash_tokenizer(encoder.tokenizer),
        "labels": list(job.task.label_names),
        "columns": columns,
        "max_length": job.max_length,
        "precision": job.precision,
        "inputs": describe_inputs(job.files),
        "text": None if job.text is None else list(job.text),
        "id_column": job.id_column,
        "texts": job.texts,
        "rows_per_shard": job.rows_per_shard,
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(
            f"another process labels into {job.folder}; wait for it, or name another with --to"
        ) from None
    with lock:
        content = begin_collection(job, ingredients, collect_versions())
        units = make_units(job)
        done = {unit: finished_shards(job.folder, unit) for unit in units}
        resumed = sum(shard.rows_read for shards in done.values() for shard in shards)
        shards = _label_units(job, teacher, on, done, _Counter(job, progress, resumed))
        refuse_double_ids([job.folder / shard.file for shard in shards])
        finish_collection(job, content, shards, len(job.task.text) if job.texts else 0)
    rows, rejected, truncated = (sum(getattr(one, key) for one in shards) for key in ("rows", "rejected", "truncated"))
    if not rows:
        raise DataError(f"{job.folder}: none of the {rejected} rows has a text; see rejected-*.jsonl there")
    seconds = time.perf_counter() - start
    return LabelSummary(job.folder, rows, rejected, truncated, len(shards), resumed, seconds)


def _label_units(
    job: LabelJob,
    teacher: tuple[Encoder, list[int]],
    on: str | None,
    done: dict[Unit, list[Shard]],
    count: _Counter,
) -> list[Shard]:
    """Do the units that are not finished, here or on a cluster; give all shards in the order of the rows."""
    open_units = [unit for unit, shards in done.items() if not is_finished(unit, shards)]
    found = _label_here(job, teacher, open_units, count) if on is None else _on_ray(job, on, open_units, count)
    done.update(found)
    return [shard for shards in done.values() for shard in shards]


def _label_here(
    job: LabelJob, teacher: tuple[Encoder, list[int]], units: list[Unit], count: _Counter
) -> Iterator[tuple[Unit, list[Shard]]]:
    from kdlora.scale.label_work import Labeller

    labeller = Labeller(job, *teacher)
    for unit in units:
        yield unit, labeller.label(unit, count.add)


def _on_ray(job: LabelJob, on: str, units: list[Unit], count: _Counter) -> Iterator[tuple[Unit, list[Shard]]]:
    from kdlora.scale.label_ray import label_on_ray

    for unit, shards in label_on_ray(job, on, units):
        count.add(sum(shard.rows_read for shard in shards))
        yield unit, shards


class _Counter:
    """Rows done so far, told to the caller."""

    def __init__(self, job: LabelJob, progress: Progress | None, done: int) -> None:
        self._progress = progress
        self._done = done
        self._total = _total_rows(job)
        self.add(0)

    def add(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)


def _total_rows(job: LabelJob) -> int | None:
    """Count the rows where all files say how many they have."""
    import pyarrow.parquet as pq

    if any(file.suffix.lower() != ".parquet" for file in job.files):
        return None
    return sum(int(pq.ParquetFile(file).metadata.num_rows) for file in job.files)


def _absolute(model: str) -> str:
    """Name a folder so that it is found from anywhere; leave a Hub id alone."""
    place = expand_home(model)
    return str(place.resolve()) if place.exists() else model


def _canonical(text: tuple[str, ...] | None) -> tuple[str, ...]:
    return text if text is not None else ("text",)


def _short_names(files: Sequence[Path]) -> tuple[str, ...]:
    """Call files by what tells them apart."""
    if len(files) == 1:
        return (files[0].name,)
    import os

    common = Path(os.path.commonpath([str(file.parent) for file in files]))
    return tuple(file.relative_to(common).as_posix() for file in files)


def describe(summary: LabelSummary) -> dict[str, Any]:
    """Give a summary as JSON can hold it.

    Args:
        summary: of a labelling.
    """
    return {**vars(summary), "folder": str(summary.folder)}
