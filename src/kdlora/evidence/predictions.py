"""Per-example predictions and the texts behind them, as Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdlora.data.logit_table import LOGIT, as_lists, as_offsets, logit_columns, read_logits, write_table, write_tables
from kdlora.data.parquet import UNREADABLE
from kdlora.errors import ArtifactError

_EXAMPLE_COLUMNS = ["id", "split", "text", "text_pair"]
_WORD_COLUMNS = ["starts", "ends"]
_SHIFT = "kdlora_shift"
_REMEDY = "Delete the run's folder and run the same command again."


@dataclass(frozen=True)
class Predictions:
    """The raw outputs of one model on one or more splits; of a task of tokens, logits and labels are those of words."""

    ids: tuple[str, ...]  # unique within a split (and group)
    split: tuple[str, ...]  # of each row, "validation" or "test"
    logits: np.ndarray  # float32 (rows, labels), columns as `label_names`; regression on the original scale
    label_names: tuple[str, ...]
    labels: np.ndarray  # int64 (rows,), float32 for regression, float32 (rows, labels) for multi-label
    groups: tuple[str, ...] | None = None  # of each row (MNLI: "matched", "mismatched"), where the task has them
    offsets: np.ndarray | None = None  # int64 (rows + 1,): where the words of each row begin, in a task of tokens
    shift: float = 0.0  # the logit above which a label is said, in a multi-label task

    @property
    def decided(self) -> np.ndarray:
        """The logits, moved so that a label is said above 0."""
        return self.logits - self.shift if self.shift else self.logits

    def only(self, split: str, group: str = "") -> Predictions:
        groups = self.groups if group and self.groups is not None else (group,) * len(self.split)
        keys = zip(self.split, groups, strict=True)
        return self.take([row for row, key in enumerate(keys) if key == (split, group)])

    def take(self, rows: Sequence[int]) -> Predictions:
        chosen, offsets = np.asarray(rows, np.int64), None
        if self.offsets is not None:
            lengths = np.diff(self.offsets)[chosen]
            offsets = as_offsets(lengths)
            chosen = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        ids, split = (tuple(values[row] for row in rows) for values in (self.ids, self.split))
        groups = None if self.groups is None else tuple(self.groups[row] for row in rows)
        logits, labels = self.logits[chosen], self.labels[chosen]
        return Predictions(ids, split, logits, self.label_names, labels, groups, offsets, self.shift)


@dataclass(frozen=True)
class ExampleText:
    """The text of one example; `text_pair` is None for tasks on single texts. In a task of tokens it has words."""

    id: str
    split: str
    text: str
    text_pair: str | None = None
    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    offsets, width = predictions.offsets, len(predictions.label_names)
    if predictions.logits.shape[1:] != (width,):  # pyarrow sees that all columns are of one length
        raise ValueError(f"expected logits of {width} labels, got shape {predictions.logits.shape}")
    columns = {"id": pa.array(predictions.ids, pa.string()), "split": pa.array(predictions.split, pa.string())}
    if predictions.groups is not None:
        columns["group"] = pa.array(predictions.groups, pa.string())
    given = predictions.labels
    kind = pa.int64() if np.issubdtype(given.dtype, np.integer) else pa.float32()
    labels = pa.array(given.tolist(), pa.list_(pa.float32()) if given.ndim == 2 else kind)
    columns["label"] = labels if offsets is None else as_lists(labels, offsets)
    logits = np.asarray(predictions.logits, dtype=np.float32)
    table = pa.table(columns | logit_columns(predictions.label_names, logits, offsets))
    told = {_SHIFT: repr(predictions.shift)} if predictions.shift else None
    write_tables(Path(path), table.schema.with_metadata(told), [table])


def read_predictions(path: str | Path) -> Predictions:
    table = _read_table(path, ("id", "split"))
    names = [name for name in table.column_names if name.startswith(LOGIT)]
    if not names:
        raise ArtifactError(f"{path}: expected columns named 'logit:<label>', found {table.column_names}. {_REMEDY}")
    kind = pa.list_(pa.float32()) if pa.types.is_list(table.schema.field(names[0]).type) else pa.float32()
    logits, lengths = read_logits([_cast(table, name, kind, path) for name in names])
    try:
        shift = float((table.schema.metadata or {}).get(_SHIFT.encode(), 0))
    except ValueError:
        shift = np.nan
    if not np.isfinite(shift):
        raise ArtifactError(f"{path}: its threshold is no number. {_REMEDY}")
    return Predictions(
        ids=tuple(table.column("id").to_pylist()),
        split=tuple(table.column("split").to_pylist()),
        logits=logits,
        label_names=tuple(name.removeprefix(LOGIT) for name in names),
        labels=_labels_of(table, path),
        groups=tuple(table.column("group").to_pylist()) if "group" in table.column_names else None,
        offsets=None if lengths is None else as_offsets(lengths),
        shift=shift,
    )


def write_examples(path: str | Path, examples: Iterable[ExampleText]) -> None:
    kept = list(examples)
    kinds = dict.fromkeys(_EXAMPLE_COLUMNS, pa.string())
    if any(one.ends for one in kept):
        kinds |= dict.fromkeys(_WORD_COLUMNS, pa.list_(pa.int32()))
    write_table(Path(path), {name: pa.array([getattr(one, name) for one in kept], kinds[name]) for name in kinds})


def read_examples(path: str | Path) -> dict[tuple[str, str], ExampleText]:
    table = _read_table(path, _EXAMPLE_COLUMNS, may_lack="text_pair")
    words = [name for name in _WORD_COLUMNS if name in table.column_names]
    rows = table.select([*_EXAMPLE_COLUMNS, *words]).to_pylist()
    return {(row["split"], row["id"]): ExampleText(**row) for row in rows}


def _read_table(path: str | Path, needed: Sequence[str], *, may_lack: str = "") -> pa.Table:
    """Read a file whose `needed` columns hold texts; in one of them a row may have none."""
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there is no such file. {_REMEDY}") from None
    except UNREADABLE as fault:
        raise ArtifactError(f"{path}: expected a whole Parquet file: {fault}. {_REMEDY}") from None
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ArtifactError(f"{path}: expected the columns {missing}, found {table.column_names}. {_REMEDY}")
    for name in (*needed, *({"group"} & set(table.column_names))):
        texts = _cast(table, name, pa.string(), path)
        if texts.null_count and name != may_lack:
            raise ArtifactError(f"{path}: {texts.null_count} rows have no {name}. {_REMEDY}")
        table = table.set_column(table.column_names.index(name), name, texts)
    return table


def _cast(table: pa.Table, name: str, kind: pa.DataType, path: str | Path) -> pa.ChunkedArray:
    try:
        return table.column(name).cast(kind)
    except pa.ArrowException as fault:
        raise ArtifactError(f"{path}: expected {kind} in column {name!r}: {fault}. {_REMEDY}") from None


def _labels_of(table: pa.Table, path: str | Path) -> np.ndarray:
    if "label" not in table.column_names or table.column("label").null_count:
        raise ArtifactError(f"{path}: expected a label in every row, in the column 'label'. {_REMEDY}")
    column = table.column("label")
    if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
        return np.asarray(pc.list_flatten(column))
    if pa.types.is_list(column.type):
        width = len(column[0]) if table.num_rows else 0
        return np.asarray(column.to_pylist(), dtype=np.float32).reshape(table.num_rows, width)
    return column.to_numpy()
