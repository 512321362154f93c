"""Logits of a model for many texts, a teacher's stored by id and read back; the hashes of a model and a tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlora.data.batches import INPUTS, Collator, Tokenised, length_sorted_batches, tokenise
from kdlora.data.logit_table import (
    LOGIT,
    LogitStore,
    Shard,
    as_offsets,
    begin_store,
    find_shard,
    logit_columns,
    open_store,
    write_note,
    write_tables,
)
from kdlora.data.spool import TEXTS, doubles, hash_columns, read_column, slice_rows, text_columns
from kdlora.data.tags import go_on
from kdlora.data.tasks import Task
from kdlora.data.windows import WindowSettings
from kdlora.data.word_tokens import (
    READ,
    WORDS,
    split_row,
    split_windows,
    window_counts,
    word_columns,
    word_offsets,
    words_joined,
    words_seen,
)
from kdlora.distil.cpu_kernels import fast_reading
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.losses import last_linear
from kdlora.distil.precision import (
    DTYPES,
    autocast,
    evaluating,
    freed_memory_kept,
    kept_exact,
    resolve_device,
    resolve_precision,
)
from kdlora.distil.processes import ALONE, Processes, current_processes
from kdlora.errors import DataError, ModelError
from kdlora.models.encoders import Encoder
from kdlora.system.environment import collect_versions
from kdlora.system.integrity import hash_json
from kdlora.system.storage import hold_lock

logger = logging.getLogger(__name__)

_ARCHITECTURE = ("model_type", "num_attention_heads", "n_heads", "hidden_act", "activation", "layer_norm_eps")
_OF_SOME = (
    *("classifier_pooling", "hidden_activation", "norm_eps", "local_attention", "global_attn_every_n_layers"),
    *("activation_function", "layer_norm_epsilon", "rms_norm_eps", "rope_parameters", "sliding_window"),
)
"""Traits that only some architectures have; hashes of the others do not know of them."""

BATCH_TOKENS = 4096
"""Tokens of one pass: a larger pass is no faster, and its activations would be the peak of a small student's memory."""
TEACHER_TOKENS = 16384
CPU_TOKENS = 1024
"""At most so many on a CPU, whose caches hold their activations: a large teacher is about twice as fast."""
LOGITS_MANIFEST = "manifest.json"


def predict_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Tokenised,
    *,
    precision: str = "fp32",
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> np.ndarray:
    """Run a model over token ids; where examples have words it gives a row a word, NaN for one that it cannot see."""
    words, counts = word_offsets(data.dataset), window_counts(data.dataset)
    lengths, done = read_column(data.dataset, "length").to_numpy(), 0
    # Where the answers of each row begin among all: a word or a window has one of its own.
    edges = as_offsets(np.ones(len(lengths)) if counts is None else counts) if words is None else words
    answered = np.ones(edges[-1], bool) if words is None else words_seen(data.dataset)
    inputs = data.dataset.select_columns([name for name in (*INPUTS, *READ) if name in data.dataset.column_names])
    device = next(model.parameters()).device
    batch_tokens = min(batch_tokens, CPU_TOKENS) if device.type == "cpu" else batch_tokens
    collator = Collator.of(tokenizer, "single-label" if words is None else "tokens", data.max_length, device)
    order: list[np.ndarray] = []
    outputs: list[torch.Tensor] = []

    def read(rows: list[int]) -> Iterator[torch.Tensor]:
        columns = inputs[rows]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if "windows" in columns:
            split = split_windows if words is None else split_row
            examples = [window for example in examples for window in split(example)]
        at_once = max(1, batch_tokens // max(len(one["input_ids"]) for one in examples))
        for start in range(0, len(examples), at_once):  # several for the windows of long texts alone
            made = collator(examples[start : start + at_once])
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in made.items()}
            places = batch.pop("words", None)
            logits: torch.Tensor = model(**batch).logits.float()
            yield logits if places is None else logits.flatten(0, 1)[places]

    with freed_memory_kept(device), evaluating(model), torch.inference_mode(), autocast(precision, device):
        # The batches are those of a single process, so that the figures are the same to the bit.
        for rows in length_sorted_batches(lengths, batch_tokens, collator.multiple)[processes.rank :: processes.count]:
            outputs.extend(read(rows))
            places = np.concatenate([np.arange(*edges[row : row + 2]) for row in rows])
            order.append(places[answered[places]])
            done += len(rows)
            if progress is not None:
                progress(min(done * processes.count, len(lengths)))
    # One copy from the device at the end, so that no batch waits for it.
    own = (np.concatenate(order), torch.cat(outputs).cpu().numpy()) if outputs else None
    found = [part for part in processes.gather(own) if part is not None]
    logits = np.full((edges[-1], found[0][1].shape[1]), np.nan, dtype=np.float32)
    for numbers, values in found:
        logits[numbers] = values
    del own, found
    if words is not None:
        config: Any = model.config  # whose names need not be in the order of the outputs
        names = [config.id2label[place] for place in range(config.num_labels)]
        go_on(logits, names, words_joined(data.dataset))
    return logits if counts is None else WindowSettings(pool=data.pool).pool_logits(logits, counts)


def faulty_rows(logits: np.ndarray, data: Tokenised) -> np.ndarray:
    """Number the rows whose logits are not finite, other than those of words that the model cannot see."""
    bad = ~np.isfinite(logits).all(axis=1)
    return np.flatnonzero(bad if word_offsets(data.dataset) is None else bad & words_seen(data.dataset))


def hash_model(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Give the SHA-256 of all parameters and buffers, by name, and of the traits that no weight shows."""
    left_out = tuple(f"{name}." for name in without)
    traits = [type(model).__name__, *(str(getattr(model.config, name, None)) for name in _ARCHITECTURE)]
    own = {name: getattr(model.config, name) for name in _OF_SOME if hasattr(model.config, name)}
    traits += [json.dumps(own, sort_keys=True, default=str)] if own else []
    digest = hashlib.sha256(json.dumps(traits).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(left_out):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the SHA-256 of how a tokenizer turns text into ids; truncation and padding do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        return hash_json({**vocabulary, "special": tokenizer.special_tokens_map})
    content = json.loads(backend.to_str())
    content.pop("truncation")
    content.pop("padding")
    names = tokenizer.model_input_names
    if names[-1] == "token_type_ids" and names[-1] not in type(tokenizer).model_input_names:
        content["inputs"] = names  # `load_tokenizer` gave them back: a pair has another answer
    return hash_json(content)


def _check_rows(dataset: Dataset) -> None:
    """Refuse rows without a text or with an id that occurs twice before the teacher reads any."""
    if lacking := [name for name in ("id", TEXTS[0]) if name not in dataset.column_names]:
        raise DataError(f"the rows have no column {lacking[0]!r}; they have {', '.join(dataset.column_names)}")
    if doubled := doubles(read_column(dataset, "id")).to_pylist():
        raise DataError(f"{len(doubled)} ids occur more than once, first {doubled[0]!r}; make them unique")
    for part in slice_rows(dataset, ["id", *text_columns(dataset)]):
        for name in part.column_names[1:]:
            if part[name].null_count:
                first = part["id"].filter(part[name].is_null())[0].as_py()
                raise DataError(f"row {first!r} has no {name}, it is null; put a text there, or leave the row out")


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
    batch_tokens: int = TEACHER_TOKENS,
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
        precision: `fp32`, `bf16`, `fp16` or `auto` matrix products.
        device: `auto`, `cpu` or `cuda`.
        rows_per_shard: examples in one file.
        batch_tokens: largest number of padded tokens in one pass; fewer need less memory. On a CPU at most 1,024.
        progress: called with rows done and rows in all.

    Raises:
        ArtifactError: the folder holds logits that something else made; the message names what changed.
        ModelError: the teacher's output is not finite.
        DataError: rows without ids or texts, ids that are not unique.

    Examples:
        >>> said = teacher_logits(encoder, columns, splits.train, splits.task, "work/logits", max_length=64)
    """
    _check_rows(dataset)
    processes = current_processes()
    if precision not in DTYPES:  # else as was settled, perhaps on another device
        precision = resolve_precision(precision, device)[0]
    places = [int(column) for column in columns]
    teacher = Teacher(encoder, places, task, max_length, processes.first_says(precision), batch_tokens, processes)
    examples = {"examples": hash_columns(dataset, ["id", *TEXTS, *word_columns(dataset)])}
    wanted = teacher.new_store(Path(folder) / LOGITS_MANIFEST, examples, rows_per_shard)
    held = hold_lock(Path(folder) / ".lock", f"computes the teacher logits in {folder}", wait=True)
    with held if processes.is_first else contextlib.nullcontext():
        store = processes.first_says(begin_store(wanted) if processes.is_first else None)
        finished = _fill(store, teacher, dataset, resolve_device(device), progress)
        return TeacherLogits.of(finished, task)


def _fill(
    store: LogitStore,
    teacher: Teacher,
    dataset: Dataset,
    device: Any,
    progress: Callable[[int, int], None] | None,
) -> LogitStore:
    """Compute the shards that are not there, each of consecutive rows."""
    step, total, processes = store.rows_per_shard, len(dataset), teacher.processes
    starts = range(0, total, step)
    parts = {f"logits-{start // step:05d}.parquet": range(start, min(start + step, total)) for start in starts}
    found = processes.first_says({name: find_shard(store.folder, name) for name in parts})
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
        found[name] = teacher.write_shard(store.folder / name, [dataset.select(parts[name])], hear)
        if processes.is_first:
            write_note(store.folder, found[name])
        done += len(parts[name])
    return processes.first_says(store.finish(list(found.values())) if processes.is_first else None)


@dataclass(frozen=True)
class Teacher:
    """A fine-tuned model that answers, and how: label j of the task is column `columns[j]` of its output."""

    encoder: Encoder
    columns: list[int]
    task: Task
    max_length: int
    precision: str
    batch_tokens: int
    processes: Processes = ALONE  # that answer together

    @cached_property
    def weights(self) -> str:
        return hash_model(self.encoder.model)

    def new_store(self, manifest: Path, more: dict[str, Any], rows_per_shard: int) -> LogitStore:
        """Begin a store of what makes its answer to a text, by hash or value, and of `more`, which makes the rows."""
        ingredients: dict[str, Any] = {
            "weights": self.weights,
            "tokenizer": hash_tokenizer(self.encoder.tokenizer),
            "labels": list(self.task.label_names),
            "columns": self.columns,
            "max_length": self.max_length,
            "precision": self.precision,
            **more,
        }
        if (windows := self.task.to_dict().get("windows")) is not None:
            ingredients["windows"] = windows
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
                logits = self._answer(tokens, progress)
                rows, truncated = rows + len(window), truncated + tokens.truncated
                columns = {name: read_column(window, name).cast(kind) for name, kind in types.items()}
                found = logit_columns(self.task.label_names, logits, word_offsets(window))
                yield pa.table({**columns, **found}, schema)

        if self.processes.is_first:
            digest = write_tables(path, schema, tables())
        else:
            digest = ""
            for _ in tables():
                pass
        return Shard(file=path.name, sha256=digest, rows=rows, truncated=truncated)

    def _answer(self, tokens: Tokenised, progress: Callable[[int], None] | None) -> np.ndarray:
        # The head of a regression has the labels' scale, where bf16 has steps of 8 at 2,000, and fp16 ends at 65,504.
        head = last_linear(self.encoder.model, 1, biased=False) if self.task.kind == "regression" else None
        with fast_reading(self.encoder.model, self.precision, exact=head), kept_exact(head):
            logits = predict_logits(
                self.encoder.model,
                self.encoder.tokenizer,
                tokens,
                precision=self.precision,
                batch_tokens=self.batch_tokens,
                progress=progress,
                processes=self.processes,
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
    return TeacherLogits.of(open_store(Path(folder) / LOGITS_MANIFEST), task)
