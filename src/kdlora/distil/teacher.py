"""The teacher as a source of logits: computed once and stored, read back, or given as a table."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from kdlora.data.batches import tokenise
from kdlora.data.spool import hash_columns
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import hash_model, hash_tokenizer
from kdlora.distil.inference import column_values, predict_logits
from kdlora.distil.logit_store import LogitStore, load_store, open_store
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_device
from kdlora.distil.processes import Processes, current_processes
from kdlora.errors import ArtifactError, ModelError
from kdlora.models.encoders import Encoder
from kdlora.system.environment import collect_versions
from kdlora.system.storage import hold_lock

logger = logging.getLogger(__name__)


def teacher_logits(
    encoder: Encoder,
    columns: Sequence[int],
    dataset: Dataset,
    task: Task,
    folder: str | Path,
    *,
    max_length: int,
    precision: str = "fp32",
    device: str = "auto",
    batch_tokens: int = 16384,
    rows_per_shard: int = 50_000,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherLogits:
    """Let a teacher read every example once, with its own tokenizer, and store its logits by example id.

    The folder carries a fingerprint of weights, tokenizer, examples, truncation, label order and number format.
    Where it fits, finished shards are reused, so that a second call runs no forward pass and an interrupted one
    goes on; where it does not, the call is refused. Of two processes with one folder, one computes and the other
    waits, and then reads. Processes that torch.distributed has joined share the work, and the first of them writes.

    Args:
        encoder: the fine-tuned teacher.
        columns: label j of the task is column `columns[j]` of the teacher's output.
        dataset: canonical columns `id`, `text` and for pairs `text_pair`.
        task: its label names are the columns of the result.
        folder: for the shards and their manifest.
        max_length: longest input in tokens.
        precision: `fp32`, `bf16` or `fp16` matrix products.
        device: `auto`, `cpu` or `cuda`.
        batch_tokens: most tokens in one pass, padding included.
        rows_per_shard: examples in one file.
        progress: called with rows done and rows in all.

    Returns:
        The logits, columns in the task's label order.

    Raises:
        ArtifactError: the folder holds logits that something else made; the message names what changed.
        ModelError: the teacher's output is not finite.
        DataError: ids that are not unique.
    """
    processes = current_processes()
    precision = processes.first_says(precision)
    ingredients = {
        "weights": hash_model(encoder.model),
        "tokenizer": hash_tokenizer(encoder.tokenizer),
        "examples": hash_columns(dataset, ["id", "text", "text_pair"]),
        "labels": list(task.label_names),
        "columns": [int(column) for column in columns],
        "max_length": max_length,
        "precision": precision,
    }
    versions = collect_versions()
    with contextlib.ExitStack() as held:
        if processes.is_first:
            held.enter_context(hold_lock(Path(folder) / ".lock", f"computes the teacher logits in {folder}", wait=True))
            store = open_store(Path(folder), ingredients, task.label_names, len(dataset), rows_per_shard, versions)
        store = processes.first_says(store if processes.is_first else None)
        wanting = [number for number in range(store.shard_count) if not store.is_whole(number)]
        wanting = processes.first_says(wanting)
        logger.info("%d of %d shards of teacher logits are to be computed", len(wanting), store.shard_count)
        if wanting:
            encoder.model.to(resolve_device(device))
            done = len(dataset) - sum(len(store.rows_of(number)) for number in wanting)
            for number in wanting:
                _compute_shard(
                    encoder, columns, dataset, store, number, precision, batch_tokens, done, progress, processes
                )
                done += len(store.rows_of(number))
        elif progress is not None:
            progress(len(dataset), len(dataset))
        return _collect(processes.first_says(store))  # the first process has noted the shards


def read_stored_logits(folder: str | Path, task: Task) -> TeacherLogits:
    """Read logits that `teacher_logits` stored, without the teacher."""
    place = Path(folder)
    store = load_store(place)
    remedy = f"Run the same command again to compute them, or delete {place} first if that does not help"
    if store is None:
        raise ArtifactError(f"{place}: there are no stored teacher logits. {remedy}")
    if store.label_names != task.label_names:
        raise ArtifactError(
            f"{place}: these teacher logits are of the labels {', '.join(store.label_names)}; expected "
            f"{', '.join(task.label_names)}. Delete {place} and run the same command again"
        )
    wanting = [number for number in range(store.shard_count) if not store.is_whole(number)]
    if wanting:
        raise ArtifactError(
            f"{place}: {len(wanting)} of {store.shard_count} shards of teacher logits are unfinished or damaged, "
            f"first number {wanting[0]}. {remedy}"
        )
    return _collect(store)


def _compute_shard(
    encoder: Encoder,
    columns: Sequence[int],
    dataset: Dataset,
    store: LogitStore,
    number: int,
    precision: str,
    batch_tokens: int,
    done: int,
    progress: Callable[[int, int], None] | None,
    processes: Processes,
) -> None:
    """Label the rows of one shard: the texts in memory are those of a shard, however large the data."""
    rows = store.rows_of(number)
    part = dataset.select(rows)
    tokens = tokenise(part, encoder.tokenizer, int(store.ingredients["max_length"]))
    logits = predict_logits(
        encoder.model,
        encoder.tokenizer,
        tokens,
        precision=precision,
        batch_tokens=batch_tokens,
        progress=None if progress is None else lambda finished: progress(done + finished, len(dataset)),
        processes=processes,
    )
    if max(columns) >= logits.shape[1]:
        raise ModelError(f"{encoder.source} has {logits.shape[1]} outputs; expected {max(columns) + 1} at least")
    chosen = logits[:, list(columns)]
    ids = [str(name) for name in column_values(part, "id").tolist()]  # 7 and "7" name the same example
    if not np.isfinite(chosen).all():
        row = int(np.flatnonzero(~np.isfinite(chosen).all(axis=1))[0])
        raise ModelError(
            f"{encoder.source} answers example {ids[row]!r} with {chosen[row].tolist()}; expected finite logits. "
            + ("Try precision: fp32" if precision != "fp32" else "Its weights are damaged or its training diverged")
        )
    if processes.is_first:
        store.write(number, ids, np.ascontiguousarray(chosen), tokens.truncated)


def _collect(store: LogitStore) -> TeacherLogits:
    parts = [store.read(number) for number in range(store.shard_count)]
    width = len(store.label_names)
    ids = [chunk for part, _ in parts for chunk in part.chunks]
    return TeacherLogits(
        ids=pa.chunked_array(ids, type=pa.string()),
        logits=np.concatenate([np.zeros((0, width), np.float32), *(logits for _, logits in parts)]),
        label_names=store.label_names,
        fingerprint=store.fingerprint,
        versions=dict(store.versions),
        truncated=sum(shard.truncated for shard in store.shards.values()),
        source=str(store.folder),
    )
