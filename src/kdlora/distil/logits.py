"""Teacher logits by example id: what teaches, wherever it came from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, List, Value

from kdlora.errors import DataError

logger = logging.getLogger(__name__)

COLUMN = "teacher_logits"
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher's outputs, keyed by example id.

    Attributes:
        ids: one id per row, unique.
        logits: float32 (rows, labels), finite, columns in the order of `label_names`.
        label_names: the task's labels in its order.
        fingerprint: of all that made the logits.
        versions: library versions that made them.
        truncated: texts that the teacher read cut.
        source: folder or file, for messages.
    """

    ids: pa.Array
    logits: np.ndarray
    label_names: tuple[str, ...]
    fingerprint: str
    versions: Mapping[str, str] = field(default_factory=dict)
    truncated: int = 0
    source: str = "the teacher's logits"

    def __repr__(self) -> str:
        """Say whose logits these are."""
        return f"TeacherLogits({self.source!r}, {len(self.ids):,} examples, labels {list(self.label_names)})"

    def __post_init__(self) -> None:
        """Refuse what could not be attached to the right example.

        Raises:
            DataError: ids that are null or doubled, another shape than (ids, labels), or values that are not finite.
        """
        object.__setattr__(self, "ids", _as_ids(self.ids))
        expected = (len(self.ids), len(self.label_names))
        if self.logits.shape != expected:
            raise DataError(f"{self.source}: expected logits of shape {expected}, got {self.logits.shape}")
        if self.ids.null_count:
            raise DataError(f"{self.source}: {self.ids.null_count} rows have no id")
        _refuse_doubles(self.ids, self.source)
        finite = np.isfinite(self.logits).all(axis=1)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            raise DataError(
                f"{self.source}: {len(bad)} rows hold values that are not finite numbers, first id "
                f"{self.ids[int(bad[0])].as_py()!r}: {self.logits[bad[0]].tolist()}. Let the teacher answer these anew"
            )

    def attach(self, dataset: Dataset) -> Dataset:
        """Give every example its teacher's logits, by id.

        Args:
            dataset: has a column `id`; an older `teacher_logits` column is replaced.

        Returns:
            The same rows in the same order, with `teacher_logits`. Ids of the teacher that no example has are
            counted in the log.

        Raises:
            DataError: examples that the teacher has no row for.
        """
        index, extra = self._match(dataset)
        if extra:
            logger.info(
                "%s: %d of %d rows belong to no example here and are not used", self.source, extra, len(self.ids)
            )
        values = self.logits[index]
        offsets = np.arange(len(values) + 1, dtype=np.int64) * len(self.label_names)
        column = pa.LargeListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
        rest = dataset.remove_columns(COLUMN) if COLUMN in dataset.column_names else dataset
        feature = List(Value("float32"))
        return rest.add_column(COLUMN, column.cast(pa.list_(pa.float32())), feature=feature)

    def count_extra(self, dataset: Dataset) -> int:
        """Count the teacher's rows that belong to no example.

        Args:
            dataset: has a column `id`.

        Raises:
            DataError: examples that the teacher has no row for.
        """
        return self._match(dataset)[1]

    def _match(self, dataset: Dataset) -> tuple[np.ndarray, int]:
        """Find the teacher's row of every example, and the number of rows left over."""
        wanted = _as_ids(dataset.select_columns(["id"]).with_format("arrow")[:].column("id"))
        index = pc.index_in(wanted, value_set=self.ids)
        if index.null_count:
            absent = wanted.filter(pc.is_null(index))
            some = ", ".join(repr(value) for value in absent.slice(0, _SHOWN).to_pylist())
            raise DataError(
                f"{self.source}: {index.null_count} of {len(wanted)} examples have no teacher logits, first ids {some}"
                f"; it has {len(self.ids)} rows, first ids {self.ids.slice(0, _SHOWN).to_pylist()}. Every training "
                "example needs one: add the rows, or set data.id_column to the column that holds these ids"
            )
        rows: np.ndarray = index.to_numpy()
        return rows, len(self.ids) - len(np.unique(rows))


def _as_ids(ids: pa.Array | pa.ChunkedArray | list[str]) -> pa.Array:
    """Bring ids to one type, whatever they were stored as: 7 and "7" name the same example."""
    array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.large_string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_string())


def _refuse_doubles(ids: pa.Array, source: str) -> None:
    if len(pc.unique(ids)) == len(ids):
        return
    counted = pc.value_counts(ids)
    doubled = counted.filter(pc.greater(counted.field("counts"), 1))
    some = ", ".join(repr(value) for value in doubled.field("values").slice(0, _SHOWN).to_pylist())
    raise DataError(
        f"{source}: {len(doubled)} ids occur more than once, first {some}; expected one row per example. "
        "Remove the doubles, or add a `split` column if the rows are of different splits"
    )
