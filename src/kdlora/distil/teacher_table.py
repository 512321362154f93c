"""A user's table as the teacher: any model can teach that can fill in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdlora.data.augment import beginnings
from kdlora.data.labels import WHOLE
from kdlora.data.load import Splits
from kdlora.data.logit_table import LOGIT, RESERVED, as_offsets, is_collection, open_collection
from kdlora.data.opening import open_collection_texts
from kdlora.data.read import is_list, is_text, open_file
from kdlora.data.spool import read_column, text_columns
from kdlora.data.tasks import Task, fold, match_labels
from kdlora.distil.logits import TeacherLogits
from kdlora.errors import ConfigError, DataError, did_you_mean
from kdlora.system.integrity import hash_file, hash_json

_NEVER = -1e6  # log of a probability of 0: finite, and 0 again at every temperature
_TOLERANCE, _LOOSE = 1e-3, 0.05
_SMOOTHING = 0.1
"""Of the probability of a named label, this is spread evenly over all labels (label smoothing, arXiv 1512.00567)."""


def read_teacher_table(path: str | Path, task: Task, *, values: str, split: str = "train") -> TeacherLogits:
    """Read a teacher's outputs from a CSV, JSON Lines or Parquet file, or from a folder that `kdlora label` made.

    Columns: `id`, one per label name (case does not count; `logit:<label>` is accepted too), optionally `split`.
    Without `split` the table covers the training split. For regression the one column is named as the label or
    `prediction`. In place of a column per label, probabilities of a single-label task may be one column `label` of
    label names: such a label has 0.9 and its share of the 0.1 that is spread evenly over all. For tokens every column
    holds a list, a value for each word of the example; null for a word that the teacher could not see.

    Args:
        path: the file or folder.
        task: its label names decide the columns' order.
        values: `logits`, or `probabilities` (0 to 1; of a single-label task they sum to 1). Both mean the
            predicted value in a regression task.
        split: which rows to take, where the table has a `split` column.

    Returns:
        Logits in the task's label order; probabilities become log-probabilities (single-label) or log-odds
        (multi-label), and it is noted that they are none.

    Raises:
        ConfigError: another word than these two for `values`.
        DataError: no such file or format, missing or other columns, doubled ids, values out of range.

    Examples:
        >>> said = read_teacher_table("answers.jsonl", splits.task, values="probabilities")
    """
    if values not in ("logits", "probabilities"):
        raise ConfigError(f"values is `logits` or `probabilities`; got {values!r}")
    file = Path(path)
    if is_collection(file):
        if values != "logits":
            raise DataError(f"{file} holds logits; set teacher.logits in place of teacher.probabilities")
        if split != "train":
            raise DataError(f"{file}: a labelled collection covers the training split, not {split!r}")
        return read_collection(file, task, "teacher.logits")
    source = open_file(file, f"teacher.{values}", every_key=True)
    source.require("id", f"teacher.{values}")
    is_named = values == "probabilities" and _names_labels(source.columns, task)
    columns = ["label"] if is_named else _label_columns(source.columns, task, file)
    wanted = ["id", *({"split"} & set(source.columns)), *columns]
    table = _rows_of_split(source.read(tuple(dict.fromkeys(wanted))).table, split, file)
    _check_ids(table, file)
    given = values == "probabilities" and task.kind != "regression"
    cells, offsets = _by_word(table, columns, file) if task.kind == "tokens" else (table, None)
    logits = _smoothed(cells, task, file) if is_named else _matrix(cells, columns, file, given)
    if given:  # words that are not answered stay without
        seen = ~np.isnan(logits).all(axis=1) | (offsets is None)
        logits[seen] = _as_logits(logits[seen], task, cells.column("id").filter(pa.array(seen)), file)
    return TeacherLogits(
        ids=table.column("id"),
        logits=logits.astype(np.float32, copy=False),
        offsets=offsets,
        label_names=task.label_names,
        fingerprint=hash_json({"file": hash_file(file), "values": values, "split": split, "labels": task.label_names}),
        source=str(file),
        from_probabilities=given,
    )


def doubts_of_logits(table: TeacherLogits, task: Task) -> list[str]:
    """Say whether a teacher's logits are probabilities, which lie so close together that they teach next to nothing."""
    said = table.logits
    if task.kind != "single-label" or said.min() < 0 or (np.abs(said.sum(axis=1) - 1) > _LOOSE).any():
        return []
    return [
        f"{table.source}: each row of these logits sums to 1, as probabilities do, which would teach next to nothing. "
        "Set teacher.probabilities in place of teacher.logits."
    ]


def _check_ids(table: pa.Table, file: Path) -> None:
    kind = table.column("id").type
    if not (is_text(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{file}: expected text or whole numbers in column 'id', got {kind}")


def read_collection(folder: Path, task: Task, key: str) -> TeacherLogits:
    return TeacherLogits.of(open_collection(folder), task, key)


def _rows_of_split(table: pa.Table, split: str, file: Path) -> pa.Table:
    if "split" not in table.column_names:
        if split != "train":
            raise DataError(f"{file}: without a column 'split' the table covers the training split, not {split!r}")
        return table
    names = table.column("split").cast(pa.string())
    kept = table.filter(pc.equal(names, split))
    if kept.num_rows == 0:
        found = [str(name) for name in pc.unique(names).to_pylist()]
        raise DataError(f"{file}: no row is of split {split!r}; found {', '.join(found)}.{did_you_mean(split, found)}")
    return kept


def _by_word(table: pa.Table, columns: Sequence[str], file: Path) -> tuple[pa.Table, np.ndarray]:
    """Give a row a word, with the id of its example, and where the words of each example begin."""
    for name in columns:
        if not is_list(table.column(name).type):
            raise DataError(
                f"{file}: expected a list in column {name!r}, a value a word, got {table.column(name).type}; a task of "
                "tokens wants an answer for each word"
            )
    counts = [np.asarray(pc.fill_null(pc.list_value_length(table.column(name)), 0)) for name in columns]
    for name, other in zip(columns, counts, strict=True):
        for row in np.flatnonzero(other != counts[0])[:1].tolist():
            raise DataError(
                f"{file}: the example {table.column('id')[row].as_py()!r} has {counts[0][row]} values in column "
                f"{columns[0]!r}, but {other[row]} in {name!r}; every word needs one of each label"
            )
    flat = {name: pc.list_flatten(table.column(name)) for name in columns}
    flat = {
        name: part if is_text(part.type) else pc.fill_null(part.cast(pa.float64(), safe=False), np.nan)
        for name, part in flat.items()
    }
    ids = table.column("id").take(pa.array(np.repeat(np.arange(table.num_rows), counts[0])))
    return pa.table({"id": ids, **flat}), as_offsets(counts[0])


def _label_columns(columns: Sequence[str], task: Task, file: Path) -> list[str]:
    """Find the column of every label by name, and refuse labels that the task does not have."""
    found = [
        column
        for column in columns
        if column not in RESERVED or (column in task.label_names and LOGIT + column not in columns)
    ]
    names = [column.removeprefix(LOGIT) for column in found]
    if task.kind == "regression":
        wanted = {fold(name) for name in (*task.label_names, "prediction")}
        fitting = [column for column, name in zip(found, names, strict=True) if fold(name) in wanted]
        if len(fitting) == 1:
            return fitting
        raise DataError(
            f"{file}: expected the teacher's value, and no true one, in one column {task.label_names[0]!r} or "
            f"'prediction', found {', '.join(fitting or found) or 'none'}"
        )
    remedy = (
        "A table has one column for each label of the task; rename or remove others, or name all in task.label_names"
    )
    return [found[place] for place in match_labels(names, task.label_names, str(file), remedy)]


def _names_labels(columns: Sequence[str], task: Task) -> bool:
    """Say whether a table names one label a row, or a word, in place of a column for each label."""
    fits = task.kind in ("single-label", "tokens") and "label" in columns and "label" not in task.label_names
    return fits and all(column in RESERVED for column in columns)


def _smoothed(table: pa.Table, task: Task, file: Path) -> np.ndarray:
    """Give probabilities of the labels that are named; a word without one was not seen."""
    places = {fold(name): place for place, name in enumerate(task.label_names)}
    labels = table.column("label").to_pylist()
    kept = [row for row, name in enumerate(labels) if name is not None or task.kind != "tokens"]
    names = [str(name) for name in labels]
    spelt = [name if fold(name) in places else re.sub(WHOLE, r"\1", name) for name in names]  # 1.0 is the label 1
    found = [None if labels[row] is None else places.get(fold(spelt[row])) for row in kept]
    if None in found:
        row = kept[found.index(None)]
        raise DataError(
            f"{file}: expected a label of the task in column 'label' ({', '.join(task.label_names):.200}); "
            f"{found.count(None)} rows have none, first id {table.column('id')[row].as_py()!r}: {names[row]!r:.80}."
            f"{did_you_mean(names[row], task.label_names)}"
        )
    size = len(task.label_names)
    values = np.full((len(labels), size), np.nan)
    values[kept] = np.eye(size)[np.array(found, dtype=int)] * (1 - _SMOOTHING) + _SMOOTHING / size
    return values


def _matrix(table: pa.Table, columns: Sequence[str], file: Path, is_exact: bool) -> np.ndarray:
    """Put columns of numbers side by side, in float64 where they are exact."""
    values = np.empty((table.num_rows, len(columns)), np.float64 if is_exact else np.float32)
    for place, column in enumerate(columns):
        array = table.column(column)
        if array.null_count:
            row = int(np.flatnonzero(array.is_null().to_numpy())[0])
            raise DataError(
                f"{file}: {array.null_count} rows lack a value in column {column!r}, first id "
                f"{table.column('id')[row].as_py()!r}"
            )
        try:
            numbers = array.cast(pa.float64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as fault:
            raise DataError(f"{file}: expected numbers in column {column!r}, got {array.type}: {fault}") from None
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused with its id
            values[:, place] = numbers
    return values


def _as_logits(probabilities: np.ndarray, task: Task, ids: pa.ChunkedArray, file: Path) -> np.ndarray:
    """Turn probabilities into float32 logits whose softmax or sigmoid they are."""
    is_single = task.kind != "multi-label"
    with np.errstate(divide="ignore", invalid="ignore"):
        fits = {
            "that are finite numbers": np.isfinite(probabilities).all(axis=1),
            "between 0 and 1": ((probabilities >= 0.0) & (probabilities <= 1.0)).all(axis=1),
            "that sum to 1 over the labels": np.bool_(not is_single)
            | (np.abs(probabilities.sum(axis=1) - 1.0) <= _TOLERANCE),
        }
        logits = np.log(probabilities) - (0.0 if is_single else np.log1p(-probabilities))
    remedy = "If these are logits, set teacher.logits instead"
    if fits["between 0 and 1"].all():
        remedy = "If they were rounded, divide each row by its sum"
    for expected, is_fit in fits.items():
        if not is_fit.all():
            row = int(np.argmin(is_fit))
            raise DataError(
                f"{file}: expected probabilities {expected}; {int((~is_fit).sum())} rows are not, first id "
                f"{ids[row].as_py()!r}: {probabilities[row].tolist()}. {remedy}"
            )
    return np.clip(logits, _NEVER, -_NEVER).astype(np.float32)


def refuse_other_texts(table: Path, splits: Splits) -> None:
    """See that a collection's logits are of the texts that have their ids here, where it keeps texts."""
    if open_collection(table).texts != len(splits.task.text):
        return
    names = text_columns(splits.train)
    here, there = (
        zip(read_column(rows, "id").to_pylist(), map(hash, beginnings(rows, names)), strict=True)  # not all the texts
        for rows in (splits.train, open_collection_texts(table, splits.task))
    )
    texts = dict(here)
    if other := [name for name, text in there if texts.get(name, text) != text]:
        raise DataError(
            f"{table} (teacher.logits) was labelled with other texts: {len(other)} of its ids, first {other[0]!r}, are "
            "of another text in the training rows. Give both files ids (data.id_column) and label these rows; where "
            "other texts are meant, label with --without-texts"
        )
