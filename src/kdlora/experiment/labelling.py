"""Teacher logits for collections of text that do not fit in memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from kdlora.configfile import COLLECTION_MANIFEST, expand_home
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import hash_model
from kdlora.distil.precision import resolve_precision
from kdlora.errors import ArtifactError, ConfigError, DataError, KdLoraError
from kdlora.experiment.label_job import (
    LabelJob,
    Shard,
    Unit,
    begin_collection,
    find_files,
    finish_collection,
    finished_shards,
    is_finished,
    make_units,
    refuse_double_ids,
)
from kdlora.experiment.label_work import Labeller, load_teacher
from kdlora.experiment.ray_cluster import connect
from kdlora.models.encoders import read_task
from kdlora.system.environment import collect_versions

ROWS_PER_SHARD = 50_000
_RETRIES = 3
"""How often Ray starts a lost worker, or what it was doing, again."""

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
    job, labeller = _begin(
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
    return _carry_out(job, labeller, on, progress, start)


def _begin(job: LabelJob) -> tuple[LabelJob, Labeller]:
    """Settle what the model decides, and load it once."""
    task = read_task(
        job.model,
        label_names=job.label_names,
        text=job.text or ("text",),
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
    )
    if job.text is not None:
        task = replace(task, text=job.text)
    precision, _ = resolve_precision(_recorded_precision(job) if job.precision == "auto" else job.precision, job.device)
    job = replace(job, task=task, precision=precision)
    encoder, columns = load_teacher(job)
    job = replace(job, weights=hash_model(encoder.model))
    return job, Labeller(job, encoder, columns)


def _recorded_precision(job: LabelJob) -> str:
    """Give what `auto` was found to be when this collection was begun: a second timing may come out otherwise."""
    manifest = job.folder / COLLECTION_MANIFEST
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["ingredients"]["precision"])
    except (OSError, ValueError, KeyError, TypeError):
        return job.precision


def _carry_out(
    job: LabelJob, labeller: Labeller, on: str | None, progress: Progress | None, start: float
) -> LabelSummary:
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(
            f"another process labels into {job.folder}; wait for it, or name another with --to"
        ) from None
    with lock:
        content = begin_collection(job, labeller.ingredients(), collect_versions())
        units = make_units(job)
        done = {unit: finished_shards(job.folder, unit) for unit in units}
        resumed = sum(shard.rows_read for shards in done.values() for shard in shards)
        tell = _counting(job, progress, resumed)
        wanting = [unit for unit, shards in done.items() if not is_finished(unit, shards)]
        if on is None:
            done.update((unit, labeller.label(unit, tell)) for unit in wanting)
        elif wanting:
            done.update(_label_on_ray(job, on, wanting, tell))
        shards = [shard for shards in done.values() for shard in shards]
        refuse_double_ids([job.folder / shard.file for shard in shards])
        finish_collection(job, content, shards, len(job.task.text) if job.texts else 0)
    rows, rejected, truncated = (sum(getattr(one, key) for one in shards) for key in ("rows", "rejected", "truncated"))
    if not rows:
        raise DataError(f"{job.folder}: none of the {rejected} rows has a text; see rejected-*.jsonl there")
    seconds = time.perf_counter() - start
    return LabelSummary(job.folder, rows, rejected, truncated, len(shards), resumed, seconds)


def _label_on_ray(
    job: LabelJob, on: str, units: list[Unit], tell: Callable[[int], None]
) -> Iterator[tuple[Unit, list[Shard]]]:
    """Do units on a cluster, with a pool of actors that hold the model; what is done twice writes the same file."""
    ray = connect(on)
    try:
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if job.device != "cpu" else 0
        needs = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": _RETRIES, "max_task_retries": _RETRIES}
        worker = ray.remote(Labeller).options(**needs)
        count = max(1, min(len(units), gpus or int(resources.get("CPU", 1))))
        pool = ActorPool([worker.remote(job) for _ in range(count)])
        try:
            for unit, shards in pool.map_unordered(lambda actor, unit: actor.label_whole.remote(unit), units):
                tell(sum(shard.rows_read for shard in shards))
                yield unit, shards
        except RayTaskError as fault:  # Ray wraps what a worker raises in pages of its own
            raise fault.cause from None
        except RayError as fault:
            reason = str(fault).strip().splitlines()[-1]
            raise KdLoraError(f"a worker was lost again and again, the last time by: {reason}") from None
    finally:
        ray.shutdown()


def _counting(job: LabelJob, progress: Progress | None, done: int) -> Callable[[int], None]:
    """Give a function that adds rows and tells the caller, first of those that were there."""
    known = all(file.suffix.lower() == ".parquet" for file in job.files)
    total = sum(int(pq.ParquetFile(file).metadata.num_rows) for file in job.files) if known else None

    def add(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    add(0)
    return add


def _absolute(model: str) -> str:
    """Name a folder so that it is found from anywhere; leave a Hub id alone."""
    place = expand_home(model)
    return str(place.resolve()) if place.exists() else model


def _short_names(files: Sequence[Path]) -> tuple[str, ...]:
    """Call files by what tells them apart."""
    common = Path(os.path.commonpath([str(file.parent) for file in files]))
    return tuple(file.relative_to(common).as_posix() for file in files)
