"""The teacher as a source of logits: every example is read once, its logits are stored by id, and read back."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from kdlora.data.batches import tokenise
from kdlora.data.logit_table import LogitFile, logit_columns, read_logits, write_table
from kdlora.data.spool import hash_columns
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import compare, hash_model, hash_tokenizer
from kdlora.distil.inference import column_values, predict_logits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_device
from kdlora.distil.processes import Processes, current_processes
from kdlora.errors import ArtifactError, ModelError
from kdlora.models.encoders import Encoder
from kdlora.system.environment import collect_versions
from kdlora.system.integrity import hash_json, is_sealed_or_old, seal
from kdlora.system.storage import hold_lock, write_json_atomic

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
BATCH_TOKENS = 16384
_MANIFEST = "manifest.json"
_MEANING = {
    "weights": "the teacher's weights",
    "tokenizer": "the teacher's tokenizer",
    "examples": "ids or texts of the examples",
    "labels": "the labels or their order",
    "columns": "the order of the teacher's outputs",
    "max_length": "the longest input (max_length)",
    "precision": "the number format (precision)",
}


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
        dataset: canonical columns `id`, `text` and for pairs `text_pair`.
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
    """
    processes, ingredients = current_processes(), _hash_inputs(encoder, dataset)
    ingredients |= {"labels": list(task.label_names), "columns": [int(column) for column in columns]}
    ingredients |= {"max_length": max_length, "precision": processes.first_says(precision)}
    with contextlib.ExitStack() as held:
        store = None
        if processes.is_first:
            held.enter_context(hold_lock(Path(folder) / ".lock", f"computes the teacher logits in {folder}", wait=True))
            store = _open_store(LogitStore(Path(folder), ingredients, len(dataset), rows_per_shard, collect_versions()))
        store = processes.first_says(store)
        wanting = processes.first_says(store.wanting())
        logger.info("%d of %d shards of teacher logits are to be computed", len(wanting), store.shard_count)
        if wanting:
            encoder.model.to(resolve_device(device))
        done = len(dataset) - sum(len(store.rows_of(number)) for number in wanting)
        if progress is not None:
            progress(done, len(dataset))
        for number in wanting:
            tell = None if progress is None else _counting_on(progress, done, len(dataset))
            _compute_shard(encoder, dataset, store, number, tell, processes)
            done += len(store.rows_of(number))
        return processes.first_says(store).read()  # the first process has noted the shards


def _hash_inputs(encoder: Encoder, dataset: Dataset) -> dict[str, Any]:
    return {
        "weights": hash_model(encoder.model),
        "tokenizer": hash_tokenizer(encoder.tokenizer),
        "examples": hash_columns(dataset, ["id", "text", "text_pair"]),
    }


def _counting_on(progress: Callable[[int, int], None], done: int, total: int) -> Callable[[int], None]:
    return lambda finished: progress(done + finished, total)


def _compute_shard(
    encoder: Encoder,
    dataset: Dataset,
    store: LogitStore,
    number: int,
    progress: Callable[[int], None] | None,
    processes: Processes,
) -> None:
    """Label the rows of one shard: the texts in memory are those of a shard, however large the data."""
    part, columns = dataset.select(store.rows_of(number)), list(store.ingredients["columns"])
    precision = str(store.ingredients["precision"])
    tokens = tokenise(part, encoder.tokenizer, int(store.ingredients["max_length"]))
    logits = predict_logits(
        encoder.model,
        encoder.tokenizer,
        tokens,
        precision=precision,
        batch_tokens=BATCH_TOKENS,
        progress=progress,
        processes=processes,
    )
    if max(columns) >= logits.shape[1]:
        raise ModelError(f"{encoder.source} has {logits.shape[1]} outputs; expected {max(columns) + 1} at least")
    chosen = logits[:, columns]
    ids = [str(name) for name in column_values(part, "id").tolist()]  # 7 and "7" name the same example
    if not np.isfinite(chosen).all():
        row = int(np.flatnonzero(~np.isfinite(chosen).all(axis=1))[0])
        raise ModelError(
            f"{encoder.source} answers example {ids[row]!r} with {chosen[row].tolist()}; expected finite logits. "
            + ("Try precision: fp32" if precision != "fp32" else "Its weights are damaged or its training diverged")
        )
    if processes.is_first:
        store.write(number, ids, np.ascontiguousarray(chosen), tokens.truncated)


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
    if wanting := store.wanting():
        raise ArtifactError(
            f"{place}: {len(wanting)} of {store.shard_count} shards of teacher logits are unfinished or damaged, "
            f"first number {wanting[0]}. {remedy}"
        )
    return store.read()


@dataclass
class LogitStore:
    """A folder of shards by number, each a run of consecutive rows, with a manifest that says what made them."""

    folder: Path
    ingredients: Mapping[str, Any]
    rows: int
    rows_per_shard: int
    versions: Mapping[str, str]
    shards: dict[int, LogitFile] = field(default_factory=dict)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(self.ingredients["labels"])

    @property
    def shard_count(self) -> int:
        """Number of shards when all are there."""
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, number: int) -> range:
        """Rows that a shard holds."""
        return range(number * self.rows_per_shard, min((number + 1) * self.rows_per_shard, self.rows))

    def wanting(self) -> list[int]:
        """Number the shards that were not finished, or are not what was written any more."""
        found = []
        for number in range(self.shard_count):
            shard = self.shards.get(number)
            if shard is not None and (state := shard.state(self.folder)) != "whole":
                logger.warning("%s is %s since it was written", self.folder / shard.file, state)
            if shard is None or state != "whole":
                found.append(number)
        return found

    def write(self, number: int, ids: Sequence[str], logits: np.ndarray, truncated: int) -> None:
        """Store a shard, then say so in the manifest."""
        name = f"logits-{number:05d}.parquet"
        columns = {"id": pa.array(ids, pa.string())} | logit_columns(self.label_names, logits)
        digest = write_table(self.folder / name, columns)
        self.shards[number] = LogitFile(file=name, sha256=digest, truncated=truncated)
        self.save()

    def read(self) -> TeacherLogits:
        """Read all shards, which are whole."""
        files = [self.shards[number] for number in range(self.shard_count)]
        ids, logits = read_logits(self.folder, files, self.label_names, _remedy(self.folder))
        return TeacherLogits(
            ids=ids,
            logits=logits,
            label_names=self.label_names,
            fingerprint=hash_json(dict(self.ingredients)),
            versions=dict(self.versions),
            truncated=sum(shard.truncated for shard in files),
            source=str(self.folder),
        )

    def save(self) -> None:
        """Write the manifest."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": hash_json(dict(self.ingredients)),
            "ingredients": dict(self.ingredients),
            "label_names": list(self.label_names),
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "versions": dict(self.versions),
            "shards": {str(number): shard.model_dump() for number, shard in sorted(self.shards.items())},
        }
        write_json_atomic(self.folder / _MANIFEST, seal(content))


def load_store(folder: Path) -> LogitStore | None:
    """Read the manifest of a folder."""
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ArtifactError(f"{path}: of another version of kdlora. {_remedy(folder)}")
        if not is_sealed_or_old(content):
            raise ArtifactError(f"{path}: its content does not fit its checksum: damaged or edited. {_remedy(folder)}")
        store = LogitStore(
            folder=folder,
            ingredients=content["ingredients"],
            rows=int(content["rows"]),
            rows_per_shard=int(content["rows_per_shard"]),
            versions=content["versions"],
            shards={int(number): LogitFile.model_validate(shard) for number, shard in content["shards"].items()},
        )
        if store.ingredients["labels"] != content["label_names"]:
            raise ValueError("the labels are not those of its ingredients")
        return store
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ArtifactError(f"{path}: not a manifest of teacher logits ({fault!r}). {_remedy(folder)}") from None


def _open_store(wanted: LogitStore) -> LogitStore:
    """Continue the store of a folder, or start one."""
    store = load_store(wanted.folder)
    if store is None:
        wanted.save()
        return wanted
    changed = compare(store.ingredients, wanted.ingredients)
    if changed:
        named = ", ".join(_MEANING.get(name, name) for name in changed)
        raise ArtifactError(
            f"{wanted.folder}: these teacher logits are stale: {named} changed. {_remedy(wanted.folder)}"
        )
    before = {name: store.versions.get(name) for name in wanted.versions}
    newer = [f"{name} {before[name]} -> {now}" for name, now in wanted.versions.items() if before[name] != now]
    if newer and store.shards:
        logger.warning("%s: teacher logits were made with other library versions: %s", store.folder, ", ".join(newer))
    return store


def _remedy(folder: Path) -> str:
    return f"Delete the folder {folder} to compute them anew, or choose another output folder"
