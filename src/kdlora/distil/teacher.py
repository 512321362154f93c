"""The teacher as a source of logits: every example is read once, its logits are stored by id, and read back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from kdlora.data.batches import Tokenised, tokenise
from kdlora.data.logit_table import (
    LOGIT,
    LogitStore,
    Shard,
    begin_store,
    find_shard,
    logit_columns,
    open_store,
    write_note,
    write_tables,
)
from kdlora.data.spool import TEXTS, hash_columns, read_column
from kdlora.data.tasks import Task
from kdlora.data.word_tokens import WORDS, word_columns, word_offsets
from kdlora.distil.inference import faulty_rows, hash_model, hash_tokenizer, predict_logits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_device
from kdlora.distil.processes import ALONE, Processes, current_processes
from kdlora.errors import ArtifactError, ModelError
from kdlora.models.encoders import Encoder
from kdlora.system.environment import collect_versions
from kdlora.system.integrity import hash_json
from kdlora.system.storage import hold_lock

logger = logging.getLogger(__name__)

BATCH_TOKENS = 16384
_MANIFEST = "manifest.json"


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
    rows_per_shard: int = 50_000,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherLogits:
    """Let a teacher read every example once, with its own tokenizer, and store its logits by example id.

    Finished shards are reused, so that a second call runs no forward pass and an interrupted one goes on. Of two calls
    with one folder, one waits. Processes that torch.distributed has joined share the work; the first of them writes.

    Args:
        encoder: the fine-tuned teacher.
        columns: label j of the task is column `columns[j]` of the teacher's output.
        dataset: canonical columns `id`, `text`, for pairs `text_pair`, for tokens `starts` and `ends`.
        task: its label names are the columns of the result.
        folder: for the shards and their manifest.
        max_length: longest input in tokens.
        precision: `fp32`, `bf16` or `fp16` matrix products.
        device: `auto`, `cpu` or `cuda`.
        rows_per_shard: examples in one file.
        progress: called with rows done and rows in all.

    Raises:
        ArtifactError: the folder holds logits that something else made; the message names what changed.
        ModelError: the teacher's output is not finite.
        DataError: ids that are not unique.

    Examples:
        >>> said = teacher_logits(encoder, columns, splits.train, splits.task, "work/logits", max_length=64)
    """
    processes = current_processes()
    places = [int(column) for column in columns]
    teacher = Teacher(encoder, places, task, max_length, processes.first_says(precision), BATCH_TOKENS)
    ingredients = teacher.ingredients() | {"examples": hash_columns(dataset, ["id", *TEXTS, *word_columns(dataset)])}
    with contextlib.ExitStack() as held:
        store = None
        if processes.is_first:
            held.enter_context(hold_lock(Path(folder) / ".lock", f"computes the teacher logits in {folder}", wait=True))
            store = begin_store(teacher.new_store(Path(folder) / _MANIFEST, ingredients, rows_per_shard))
        store = processes.first_says(store)
        finished = _fill(store, teacher, dataset, resolve_device(device), progress, processes)
        return TeacherLogits.of(finished, task.label_names, task)


def _fill(
    store: LogitStore,
    teacher: Teacher,
    dataset: Dataset,
    device: Any,
    progress: Callable[[int, int], None] | None,
    processes: Processes,
) -> LogitStore:
    """Compute the shards that are not there, each of consecutive rows."""
    step, total = store.rows_per_shard, len(dataset)
    starts = range(0, total, step)
    parts = {f"logits-{start // step:05d}.parquet": range(start, min(start + step, total)) for start in starts}
    found = processes.first_says({name: find_shard(store.folder, name, store.shards) for name in parts})
    wanting = [name for name, shard in found.items() if shard is None]
    logger.info("%d of %d shards of teacher logits are to be computed", len(wanting), len(parts))
    if wanting:
        teacher.encoder.model.to(device)
    tell = progress or (lambda done, total: None)
    done = total - sum(len(parts[name]) for name in wanting)
    tell(done, total)
    for name in wanting:
        # The texts in memory are those of a shard, however large the data.
        hear = partial(lambda before, rows: tell(before + rows, total), done)
        found[name] = teacher.write_shard(store.folder / name, [dataset.select(parts[name])], hear, processes)
        if processes.is_first:
            write_note(store.folder, found[name])
        done += len(parts[name])
    finished: LogitStore = processes.first_says(store.finish(list(found.values())) if processes.is_first else None)
    return finished


@dataclass(frozen=True)
class Teacher:
    """A fine-tuned model that answers, and how: label j of the task is column `columns[j]` of its output."""

    encoder: Encoder
    columns: list[int]
    task: Task
    max_length: int
    precision: str
    batch_tokens: int

    @cached_property
    def weights(self) -> str:
        return hash_model(self.encoder.model)

    def ingredients(self) -> dict[str, Any]:
        """Name what makes its answer to a text, by hash or value."""
        ingredients = {
            "weights": self.weights,
            "tokenizer": hash_tokenizer(self.encoder.tokenizer),
            "labels": list(self.task.label_names),
            "columns": self.columns,
            "max_length": self.max_length,
            "precision": self.precision,
        }
        windows = self.task.to_dict().get("windows")
        return ingredients if windows is None else ingredients | {"windows": windows}

    def new_store(self, manifest: Path, ingredients: dict[str, Any], rows_per_shard: int) -> LogitStore:
        """Describe a store of its logits that has no shards yet."""
        return LogitStore(
            path=manifest,
            fingerprint=hash_json(ingredients),
            ingredients=ingredients,
            label_names=list(self.task.label_names),
            versions=collect_versions(),
            rows_per_shard=rows_per_shard,
        )

    def write_shard(
        self,
        path: Path,
        windows: Iterable[Dataset],
        progress: Callable[[int], None] | None = None,
        processes: Processes = ALONE,
        kept: Sequence[str] = ("id",),
    ) -> Shard:
        """Store the answers to some rows in a file, a window at a time; of several processes the first writes."""
        value = pa.list_(pa.float32()) if self.encoder.reads_words else pa.float32()
        types = {name: pa.list_(pa.int32()) if name in WORDS else pa.string() for name in kept}
        schema = pa.schema([*types.items(), *((LOGIT + name, value) for name in self.task.label_names)])
        rows = truncated = 0

        def tables() -> Iterator[pa.Table]:
            nonlocal rows, truncated
            for window in windows:
                tokens = tokenise(
                    window, self.encoder.tokenizer, self.max_length, windows=self.task.windows, quiet=True
                )
                logits = self._answer(tokens, progress, processes)
                rows, truncated = rows + len(window), truncated + tokens.truncated
                columns = {name: read_column(window, name).cast(kind) for name, kind in types.items()}
                found = logit_columns(self.task.label_names, logits, word_offsets(window))
                yield pa.table({**columns, **found}, schema)

        if processes.is_first:
            digest = write_tables(path, schema, tables())
        else:
            digest = ""
            for _ in tables():
                pass
        return Shard(file=path.name, sha256=digest, rows=rows, truncated=truncated)

    def _answer(self, tokens: Tokenised, progress: Callable[[int], None] | None, processes: Processes) -> np.ndarray:
        """Give the logits `(rows, labels)` of a window, or `(words, labels)`."""
        logits = predict_logits(
            self.encoder.model,
            self.encoder.tokenizer,
            tokens,
            precision=self.precision,
            batch_tokens=self.batch_tokens,
            progress=progress,
            processes=processes,
        )
        source = self.encoder.source
        if max(self.columns) >= logits.shape[1]:
            raise ModelError(f"{source} has {logits.shape[1]} outputs; expected {max(self.columns) + 1} at least")
        chosen = np.ascontiguousarray(logits[:, self.columns])
        if len(bad := faulty_rows(chosen, tokens)):
            words = word_offsets(tokens.dataset)
            row = bad[0] if words is None else np.searchsorted(words, bad[0], side="right") - 1
            raise ModelError(
                f"{source} answers example {tokens.dataset[int(row)]['id']!r} with {chosen[bad[0]].tolist()}; "
                "expected finite logits. "
                + ("Try the precision fp32" if self.precision != "fp32" else "Its weights are damaged or it diverged")
            )
        return chosen


def read_stored_logits(folder: str | Path, task: Task) -> TeacherLogits:
    """Read logits that `teacher_logits` stored, without the teacher."""
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder}: there are no stored teacher logits. Run the same command again to compute them")
    store = open_store(path)
    if tuple(store.label_names) != task.label_names:
        raise ArtifactError(
            f"{folder}: these teacher logits are of the labels {', '.join(store.label_names)}; expected "
            f"{', '.join(task.label_names)}. Delete {folder} and run the same command again"
        )
    return TeacherLogits.of(store, task.label_names, task)
