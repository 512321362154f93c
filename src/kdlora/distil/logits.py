"""Teacher logits by example id, wherever they came from; rows without labels beside rows with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, List, Value, concatenate_datasets

from kdlora.config import DistilConfig
from kdlora.data.batches import Tokenised
from kdlora.data.load import Splits
from kdlora.data.logit_table import LogitStore, as_lists, as_offsets, match_collection
from kdlora.data.spool import SLICE_ROWS, doubles, label_array, read_column, settle, slice_rows, spool
from kdlora.data.tags import NO_TAG, go_on
from kdlora.data.tasks import Task, match_labels
from kdlora.data.word_tokens import GIVEN, word_offsets
from kdlora.errors import ConfigError, DataError

COLUMN = "teacher_logits"
LABELLED = "labelled"
"""The column, and the name in a batch, that is false where a label only fills its place."""
_SHOWN = 5
_AHEAD_ROWS = 4 * SLICE_ROWS
"""How many of the teacher's ids may hold the next slice of examples."""


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher's outputs, keyed by example id.

    Examples:
        >>> values = np.array([[2.0, -2.0], [-1.0, 1.0]], np.float32)
        >>> own = TeacherLogits(["id-1", "id-2"], values, ("negative", "positive"), fingerprint="by hand")
    """

    ids: pa.Array  # one per row, unique
    # float32 (rows, labels), finite, columns in the order of `label_names`; for tokens a row a word, NaN if not seen
    logits: np.ndarray
    label_names: tuple[str, ...]  # the task's labels in its order
    fingerprint: str  # of all that made the logits
    truncated: int = 0  # texts that the teacher read cut
    source: str = "the teacher's logits"  # folder or file, for messages
    offsets: np.ndarray | None = None  # for tokens: where each row's words begin among all words, and where they end
    from_probabilities: bool = False
    """They are logarithms of probabilities (log-odds in a multi-label task), which KL alone compares: 0 has none."""

    @classmethod
    def of(cls, store: LogitStore, task: Task, key: str = "teacher logits") -> TeacherLogits:
        """Read a store, or refuse one of other labels; `key` is how messages call it."""
        ids, logits, offsets = store.read(match_collection(store, task, key))
        return cls(
            ids=ids,
            logits=logits,
            label_names=task.label_names,
            fingerprint=store.fingerprint,
            truncated=sum(shard.truncated for shard in store.shards),
            source=str(store.folder),
            offsets=offsets,
        )

    def __repr__(self) -> str:
        return f"TeacherLogits({self.source!r}, {len(self.ids):,} examples, labels {list(self.label_names)})"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _as_ids(self.ids))
        expected = (len(self.ids) if self.offsets is None else int(self.offsets[-1]), len(self.label_names))
        if self.logits.shape != expected:
            raise DataError(f"{self.source}: expected logits of shape {expected}, got {self.logits.shape}")
        if self.ids.null_count:
            raise DataError(f"{self.source}: {self.ids.null_count} rows have no id")
        if len(doubled := doubles(self.ids)):
            raise DataError(
                f"{self.source}: {len(doubled)} ids occur more than once, first {_some(doubled)}; expected one row per "
                "example. Remove the doubles, or add a `split` column if the rows are of different splits"
            )
        bad = ~np.isfinite(self.logits).all(axis=1)
        if self.offsets is not None:
            bad &= ~np.isnan(self.logits).all(axis=1)
        if len(bad := np.flatnonzero(bad)):
            row = bad[0] if self.offsets is None else np.searchsorted(self.offsets, bad[0], side="right") - 1
            raise DataError(
                f"{self.source}: {len(bad)} rows hold values that are not finite numbers, first id "
                f"{self.ids[int(row)].as_py()!r}: {self.logits[bad[0]].tolist()}. Let the teacher answer these anew"
            )

    @property
    def unseen(self) -> int:
        """How many words the teacher could not see."""
        return int(np.isnan(self.logits[:, 0]).sum())

    def attach(self, dataset: Dataset) -> Dataset:
        """Give every example its teacher's logits, by id."""
        rows = self._match(dataset)
        found = self._places(rows, dataset)
        rest = settle(dataset.remove_columns(COLUMN) if COLUMN in dataset.column_names else dataset)
        column = spool(self._batches(*found), self.source)[COLUMN]
        return rest.add_column(COLUMN, column, feature=List(Value("float32")))

    def _batches(self, places: np.ndarray, edges: np.ndarray, inner: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Yield the logits at these places, a list for each example; inner parts of a word go on with its entity."""
        for start in range(0, len(edges) - 1, SLICE_ROWS):
            ends = edges[start : start + SLICE_ROWS + 1]
            values = self.logits[places[ends[0] : ends[-1]]]
            go_on(values, self.label_names, np.flatnonzero(inner[ends[0] : ends[-1]]))
            lists = as_lists(pa.array(values.reshape(-1)), (ends - ends[0]) * len(self.label_names))
            yield pa.RecordBatch.from_arrays([lists], names=[COLUMN])

    def _places(self, rows: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give the place of the logits of each example, or of each word, where those of each begin, and inner parts."""
        edges = word_offsets(dataset)
        if (edges is None) != (self.offsets is None):
            one, other = ("word", "example") if edges is not None else ("example", "word")
            raise DataError(f"{self.source}: expected logits for each {one}, got some for each {other}")
        if edges is None or self.offsets is None:
            return rows, np.arange(len(rows) + 1), np.zeros(len(rows), bool)
        own, theirs, answered = np.diff(edges), np.diff(self.offsets)[rows], np.ones(edges[-1], bool)
        if GIVEN in dataset.column_names:  # a table may answer for words before they were cut
            given = np.asarray(pc.list_flatten(read_column(dataset, GIVEN)))
            whole = np.diff(np.append(0, np.cumsum(given))[edges])
            answered = given | np.repeat(own == theirs, own)
            own = np.where(own == theirs, own, whole)
        for row in np.flatnonzero(own != theirs)[:1].tolist():
            raise DataError(
                f"{self.source}: the example {dataset[row]['id']!r} has {own[row]} words, but logits of {theirs[row]}; "
                "the teacher must answer for the words that the data has"
            )
        places = np.repeat(self.offsets[rows] - as_offsets(theirs)[:-1], theirs) + np.arange(theirs.sum())
        return places[np.cumsum(answered) - 1], edges, ~answered

    def count_extra(self, dataset: Dataset) -> int:
        """Count the teacher's rows that belong to no example; refuse those that do not fit the words of theirs."""
        rows = self._match(dataset)
        self._places(rows, dataset)
        return len(self.ids) - len(rows)

    def _match(self, dataset: Dataset) -> np.ndarray:
        """Find the teacher's row of every example, a few thousand ids at a time while they are in its order."""
        found, place = list[np.ndarray](), 0
        for part in slice_rows(dataset, ["id"]):
            near = pc.index_in(_as_ids(part["id"]), value_set=self.ids.slice(place, _AHEAD_ROWS))
            if near.null_count:
                break
            found.append(near.to_numpy() + place)
            place = int(found[-1][-1]) + 1
        else:
            return np.concatenate(found)
        wanted = _as_ids(read_column(dataset, "id"))
        index = pc.index_in(wanted, value_set=self.ids)
        if index.null_count:
            absent = wanted.filter(pc.is_null(index))
            raise DataError(
                f"{self.source}: {index.null_count} of {len(wanted)} examples have no teacher logits, first ids "
                f"{_some(absent)}; it has {len(self.ids)} rows, first ids {_some(self.ids)}. Every training example "
                "needs one: add the rows, or set data.id_column to the column that holds these ids"
            )
        return index.to_numpy()


def _as_ids(ids: pa.Array | pa.ChunkedArray | list[str]) -> pa.Array:
    """Bring ids to one type, whatever they were stored as: 7 and "7" name the same example."""
    array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_string())


def _some(ids: pa.Array) -> str:
    return ", ".join(repr(value) for value in ids.slice(0, _SHOWN).to_pylist())


def attach_teacher(
    splits: Splits,
    teacher: TeacherLogits,
    unlabelled: TeacherLogits | None = None,
    *,
    distil: DistilConfig = DistilConfig(),
) -> Splits:
    """Give the rows that teach a student their teacher's logits, in a column `teacher_logits`.

    Args:
        splits: the task with its examples.
        teacher: logits of the training rows.
        unlabelled: logits of the unlabelled rows; needed where the splits have such rows.
        distil: the distillation loss that a student trained on the result is to have.

    Raises:
        DataError: rows without logits, a teacher of other labels.
        ConfigError: a loss that compares logits, of a teacher that gives probabilities.

    Examples:
        >>> taught = attach_teacher(splits, said, distil=DistilConfig(loss="kl"))
    """
    if distil.loss == "mse" and any(one.from_probabilities for one in (teacher, unlabelled) if one is not None):
        raise ConfigError("distil.loss: mse compares logits, and this teacher gives probabilities; use kl")
    teacher = _in_order(teacher, splits.task)
    more = splits.unlabelled
    if more is not None and unlabelled is None:
        raise DataError("the splits have unlabelled rows, but no teacher logits of them were given; pass unlabelled=")
    more = None if more is None or unlabelled is None else _in_order(unlabelled, splits.task).attach(more)
    return replace(splits, train=teacher.attach(splits.train), unlabelled=more, distil=distil)


def _in_order(teacher: TeacherLogits, task: Task) -> TeacherLogits:
    """Bring the columns of a teacher that was made by hand to the order of the task's labels."""
    if task.kind == "regression" or teacher.label_names == task.label_names:
        return teacher
    remedy = "Name the teacher's columns as the task names its labels"
    places = match_labels(teacher.label_names, task.label_names, teacher.source, remedy)
    return replace(teacher, logits=teacher.logits[:, places], label_names=task.label_names)


def join_unlabelled(labelled: Tokenised, unlabelled: Tokenised, task: Task) -> Tokenised:
    """Put rows with and without labels together, in this order."""
    count, words = len(unlabelled.dataset), word_offsets(unlabelled.dataset)
    if words is not None:
        empty = as_lists(pa.array(np.full(words[-1], NO_TAG)), words)
    elif task.kind == "multi-label":
        empty = as_lists(pa.array(np.zeros(count * task.num_labels)), np.arange(count + 1) * task.num_labels)
    else:
        empty = pa.array(np.zeros(count))
    without = unlabelled.dataset.add_column("label", empty, feature=labelled.dataset.features["label"])
    names = [name for name in labelled.dataset.column_names if name in without.column_names]
    parts = [
        rows.select_columns(names).add_column(LABELLED, np.full(len(rows), is_labelled), feature=Value("bool"))
        for rows, is_labelled in ((labelled.dataset, True), (without, False))
    ]
    return replace(labelled, dataset=concatenate_datasets(parts))


def labelled_values(dataset: Dataset) -> np.ndarray:
    labels = label_array(dataset)
    if word_offsets(dataset) is not None:
        return labels[labels != NO_TAG]
    return labels[read_column(dataset, LABELLED).to_numpy()] if LABELLED in dataset.column_names else labels
