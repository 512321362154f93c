"""The work of labelling: rows come in windows, logits go out in shards; what is in memory is one window."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from kdlora.data.batches import Tokenised, encode_texts
from kdlora.data.collection import LOGIT
from kdlora.deploy.rows import Columns, Row, RowReader
from kdlora.distil.fingerprints import hash_model, hash_tokenizer
from kdlora.distil.inference import BATCH_TOKENS, predict_logits
from kdlora.distil.precision import resolve_device
from kdlora.errors import ArtifactError, DataError, ModelError
from kdlora.experiment.label_job import LabelJob, Shard, Unit, finished_shards, is_finished, shard_name, write_note
from kdlora.models.encoders import Encoder, load_fine_tuned
from kdlora.system.integrity import hash_file
from kdlora.system.storage import atomic_file, write_text_atomic

logger = logging.getLogger(__name__)

WINDOW_ROWS = 4096
_WINDOW_CHARACTERS = 8_000_000
_CHARACTERS_PER_TOKEN = 100
_LEAST_CHARACTERS = 20_000
_CUDA_BATCH_TOKENS = 65536


def load_teacher(job: LabelJob) -> tuple[Encoder, list[int]]:
    """Load the model that labels, onto its device."""
    encoder, columns = load_fine_tuned(
        job.model,
        job.task,
        label_names=job.label_names,
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
    )
    if job.weights and hash_model(encoder.model) != job.weights:
        raise ArtifactError(
            f"{job.model}: the weights on this machine are not those that the job began with; bring the same model here"
        )
    encoder.model.to(resolve_device(job.device))
    return encoder, columns


@dataclass
class Labeller:
    """One worker: a model in memory, and units of work one after the other.

    Attributes:
        job: the job.
        encoder: the teacher; loaded when the first row needs it.
        columns: for each label of the task the column of the teacher's output.
    """

    job: LabelJob
    encoder: Encoder | None = None
    columns: list[int] = field(default_factory=list)

    def ingredients(self) -> dict[str, Any]:
        """Name all that makes the logits, by hash or value."""
        assert self.encoder is not None  # whoever begins a job holds the teacher
        job = self.job
        return {
            "weights": job.weights,
            "tokenizer": hash_tokenizer(self.encoder.tokenizer),
            "labels": list(job.task.label_names),
            "columns": self.columns,
            "max_length": job.max_length,
            "precision": job.precision,
            "inputs": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in job.files],
            "text": None if job.text is None else list(job.text),
            "id_column": job.id_column,
            "texts": job.texts,
            "rows_per_shard": job.rows_per_shard,
        }

    def label_whole(self, unit: Unit) -> tuple[Unit, list[Shard]]:
        """Do a unit on another machine, and say which it was."""
        return unit, self.label(unit)

    def label(self, unit: Unit, progress: Callable[[int], None] | None = None) -> list[Shard]:
        """Do what is left of a unit."""
        shards = finished_shards(self.job.folder, unit)
        if is_finished(unit, shards):
            return shards
        done = sum(shard.rows_read for shard in shards)
        number = unit.shard + len(shards)
        start = unit.shard * self.job.rows_per_shard + done
        with contextlib.closing(iter(self._reader(unit.file, start))) as rows:
            ahead = _Ahead(rows)
            while not shards or (unit.last and not shards[-1].ends):
                shard = self._write(shard_name(unit.file, number), ahead, unit, progress)
                write_note(self.job.folder, shard)
                shards.append(shard)
                number += 1
        return shards

    def _reader(self, file: int, start: int) -> RowReader:
        recorded = self.job.task.text
        cut = max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * self.job.max_length)
        columns = Columns(self.job.text, recorded, self.job.id_column, cut)
        return RowReader(self.job.files[file], columns, start=start)

    def _write(self, name: str, ahead: _Ahead, unit: Unit, progress: Callable[[int], None] | None) -> Shard:
        """Write one shard, window by window."""
        rows = truncated = 0
        rejected: list[dict[str, str]] = []
        schema: pa.Schema | None = None
        with atomic_file(self.job.folder / name) as temporary, contextlib.ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for window in _windows(islice(ahead, self.job.rows_per_shard)):
                good = [row for row in window if row.text is not None]
                bad = [row for row in window if row.text is None]
                if bad and self.job.strict:
                    raise DataError(f"{self.job.files[unit.file]}, {bad[0].error}")
                rejected += [{"id": self._id(row, unit.file), "error": row.error} for row in bad]
                table, cut = self._window(good, unit.file)
                if writer is None:
                    schema = table.schema
                    writer = stack.enter_context(pq.ParquetWriter(temporary, schema, compression="zstd"))
                writer.write_table(table)
                rows, truncated = rows + len(good), truncated + cut
                if progress is not None:
                    progress(len(window))
            if writer is None:  # an input without rows
                table, _ = self._window([], unit.file)
                stack.enter_context(pq.ParquetWriter(temporary, table.schema, compression="zstd"))
            stack.close()
            digest = hash_file(temporary)
        beside = None
        if rejected:
            beside = name.replace("logits", "rejected").replace(".parquet", ".jsonl")
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
            write_text_atomic(self.job.folder / beside, lines)
        return Shard(name, digest, rows, len(rejected), truncated, ahead.is_empty(), beside)

    def _window(self, rows: list[Row], file: int) -> tuple[pa.Table, int]:
        """Label the rows of a window."""
        pairs = len(self.job.task.text) == 2
        if rows and any(isinstance(row.text, tuple) != pairs for row in rows[:1]):
            raise DataError(
                f"{self.job.files[file]}: the model reads {'pairs of texts' if pairs else 'single texts'}; name "
                f"{'two text columns' if pairs else 'one text column'} with --text"
            )
        names = ["text", "text_pair"] if pairs else ["text"]
        parts = zip(*(row.text if isinstance(row.text, tuple) else (row.text,) for row in rows), strict=True)
        texts = dict(zip(names, map(list, parts), strict=False)) or {name: [] for name in names}
        logits, truncated = self._predict(texts, [self._id(row, file) for row in rows])
        columns: dict[str, Any] = {"id": pa.array([self._id(row, file) for row in rows], pa.string())}
        if self.job.texts:
            columns |= {name: pa.array(values, pa.string()) for name, values in texts.items()}
        for column, label in enumerate(self.job.task.label_names):
            columns[LOGIT + label] = pa.array(logits[:, column], pa.float32())
        return pa.table(columns), truncated

    def _predict(self, texts: dict[str, list[Any]], ids: list[str]) -> tuple[np.ndarray, int]:
        """Run the teacher over the texts of a window."""
        if not ids:
            return np.zeros((0, self.job.task.num_labels), np.float32), 0
        if self.encoder is None:
            self.encoder, self.columns = load_teacher(self.job)
        model, tokenizer = self.encoder.model, self.encoder.tokenizer
        limit = min(self.job.max_length, tokenizer.model_max_length)
        encoded = encode_texts(texts, tokenizer, limit)
        truncated = sum(encoded.pop("truncated"))
        # Not `tokenise`, whose cache on disk would grow with the collection; a fingerprint of its own saves hashing.
        tokens = Tokenised(Dataset(pa.table(encoded), fingerprint="window"), truncated, limit)
        device = next(model.parameters()).device
        batch_tokens = BATCH_TOKENS if device.type == "cpu" else _CUDA_BATCH_TOKENS
        logits = predict_logits(model, tokenizer, tokens, precision=self.job.precision, batch_tokens=batch_tokens)
        chosen = np.ascontiguousarray(logits[:, self.columns])
        finite = np.isfinite(chosen).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise ModelError(
                f"{self.job.model} answers {ids[row]!r} with {chosen[row].tolist()}; expected finite logits. "
                + ("Try --precision fp32" if self.job.precision != "fp32" else "Its weights are damaged")
            )
        return chosen, truncated

    def _id(self, row: Row, file: int) -> str:
        """Give a row its id; a row number is only unique within its file."""
        return f"{self.job.names[file]}:{row.id}" if row.numbered and len(self.job.files) > 1 else row.id


class _Ahead:
    """An iterator that can be asked whether it has ended."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._next: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        while not self.is_empty():
            yield self._next.pop()

    def is_empty(self) -> bool:
        """Whether no row is left."""
        if not self._next:
            self._next = list(islice(self._rows, 1))
        return not self._next


def _windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group rows by count and by characters, so that long texts do not fill the memory."""
    window: list[Row] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += sum(map(len, row.text)) if isinstance(row.text, tuple) else len(row.text or "")
        if len(window) >= WINDOW_ROWS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window
