"""A user's table as the teacher: any model can teach that can fill in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdlora.data.collection import LOGIT, is_collection
from kdlora.data.faults import REMEDY, UNREADABLE
from kdlora.data.tasks import Task
from kdlora.distil.logits import TeacherLogits, read_collection
from kdlora.errors import DataError, did_you_mean
from kdlora.system.integrity import hash_file, hash_json

PREFIX = LOGIT
_RESERVED = ("id", "split", "label", "group", "text", "text_pair", "__index_level_0__")
_PARQUET, _JSON_LINES = (".parquet", ".pq"), (".jsonl", ".ndjson", ".json")
_NEVER = -1e6  # log of a probability of 0: finite, and 0 again at every temperature
_TOLERANCE = 1e-3


def read_teacher_table(path: str | Path, task: Task, *, values: str, split: str = "train") -> TeacherLogits:
    """Read a teacher's outputs from a Parquet or JSON Lines file, or from a folder that `kdlora label` made.

    Columns: `id`, one per label name (case does not count; `logit:<label>` is accepted too), optionally `split`.
    Without `split` the table covers the training split. For regression the one column is named as the label or
    `prediction`.

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
        DataError: no such file or format, missing or other columns, doubled ids, values out of range.
    """
    file = Path(path)
    if is_collection(file):
        return _from_collection(file, task, values, split)
    table = _read(file)
    if "id" not in table.column_names:
        raise DataError(
            f"{file}: expected a column 'id', found {', '.join(table.column_names)}."
            + did_you_mean("id", table.column_names)
        )
    table = _rows_of_split(table, split, file)
    columns = _label_columns(table, task, file)
    given = values == "probabilities" and task.kind != "regression"
    outputs = np.empty((table.num_rows, len(columns)), np.float64 if given else np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused with its id
        for place, column in enumerate(columns):
            outputs[:, place] = _numbers(table, column, file)
    logits = _as_logits(outputs, task, table.column("id"), file).astype(np.float32) if given else outputs
    fingerprint = hash_json({"file": hash_file(file), "values": values, "split": split, "labels": task.label_names})
    return TeacherLogits(
        ids=_ids(table, file),
        logits=logits,
        label_names=task.label_names,
        fingerprint=fingerprint,
        source=str(file),
        from_probabilities=given,
    )


def _from_collection(folder: Path, task: Task, values: str, split: str) -> TeacherLogits:
    if values != "logits":
        raise DataError(f"{folder} holds logits; set teacher.logits in place of teacher.probabilities")
    if split != "train":
        raise DataError(f"{folder}: a labelled collection covers the training split, not {split!r}")
    return read_collection(folder, task, "teacher.logits")


def _read(file: Path) -> pa.Table:
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected a table of teacher outputs")
    suffix = file.suffix.lower()
    if suffix in _PARQUET:
        try:
            table = pq.read_table(file, partitioning=None)
            table.validate(full=True)  # pyarrow itself takes any bytes for text
        except UNREADABLE as fault:
            raise DataError(f"{file}: not a readable Parquet file: {fault}; {REMEDY}") from None
        return table
    if suffix in _JSON_LINES:
        return _read_json_lines(file)
    raise DataError(
        f"{file}: a table of teacher outputs is Parquet ({', '.join(_PARQUET)}) or JSON Lines "
        f"({', '.join(_JSON_LINES)}); got {suffix or 'no extension'!r}"
    )


def _read_json_lines(file: Path) -> pa.Table:
    """Read line by line, since a fault should name its line."""
    rows = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                rows.append(_parse_line(line, number, file))
    except UnicodeDecodeError as fault:
        raise DataError(f"{file}: expected UTF-8 text: {fault}. Save the file as UTF-8") from None
    if not rows:
        raise DataError(f"{file}: the file has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as fault:
        raise DataError(f"{file}: a column holds values of several types: {fault}") from None


def _parse_line(line: str, number: int, file: Path) -> dict[str, object]:
    try:
        row = json.loads(line)
    except RecursionError:
        raise DataError(f"{file}, line {number}: expected a JSON object, but it is nested too deep") from None
    except ValueError as fault:  # broken JSON, or a number with thousands of digits
        raise DataError(f"{file}, line {number}: expected a JSON object: {fault}") from None
    if "\\u" in line and any(0xD800 <= ord(character) <= 0xDFFF for character in json.dumps(row, ensure_ascii=False)):
        raise DataError(f"{file}, line {number}: it holds half a character (a lone surrogate); write the text again")
    if not isinstance(row, dict):
        raise DataError(f"{file}, line {number}: expected a JSON object, got {type(row).__name__}")
    return row


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


def _label_columns(table: pa.Table, task: Task, file: Path) -> list[str]:
    """Find the column of every label by name, and refuse labels that the task does not have."""
    found: dict[str, str] = {}
    for column in table.column_names:
        if column not in _RESERVED or column in task.label_names:
            key = column.removeprefix(PREFIX).strip().casefold()
            if key in found:
                raise DataError(f"{file}: the columns {found[key]!r} and {column!r} differ by case only")
            found[key] = column
    if task.kind == "regression":
        return [_value_column(found, task, file)]
    wanted = {name.strip().casefold(): name for name in task.label_names}
    missing = [name for key, name in wanted.items() if key not in found]
    foreign = [column for key, column in found.items() if key not in wanted]
    if missing or foreign:
        raise DataError(_label_fault(file, task, list(found.values()), missing, foreign))
    return [found[key] for key in wanted]


def _value_column(found: dict[str, str], task: Task, file: Path) -> str:
    for name in (*task.label_names, "prediction"):
        if name.strip().casefold() in found:
            return found[name.strip().casefold()]
    raise DataError(
        f"{file}: expected the teacher's value in a column {task.label_names[0]!r} or 'prediction', found "
        f"{', '.join(found.values()) or 'none'}.{did_you_mean(task.label_names[0], found.values())}"
    )


def _label_fault(file: Path, task: Task, found: Sequence[str], missing: Sequence[str], foreign: Sequence[str]) -> str:
    parts = [
        f"{file}: expected one column for each label of the task ({', '.join(task.label_names)}), "
        f"found {', '.join(found) or 'none'}."
    ]
    if missing:
        parts.append(f"Missing: {', '.join(name + did_you_mean(name, foreign) for name in missing)}.")
    if foreign:
        parts.append(f"Not a label of the task: {', '.join(foreign)}; rename or remove them.")
    return " ".join(parts)


def _numbers(table: pa.Table, column: str, file: Path) -> np.ndarray:
    array = table.column(column)
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy())[0])
        raise DataError(
            f"{file}: {array.null_count} rows lack a value in column {column!r}, first id "
            f"{table.column('id')[row].as_py()!r}"
        )
    try:
        numbers: np.ndarray = array.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as fault:
        raise DataError(f"{file}: expected numbers in column {column!r}, got {array.type}: {fault}") from None
    return numbers


def _ids(table: pa.Table, file: Path) -> pa.ChunkedArray:
    ids = table.column("id")
    kind = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{file}: expected text or whole numbers in column 'id', got {kind}")
    return ids


def _as_logits(probabilities: np.ndarray, task: Task, ids: pa.ChunkedArray, file: Path) -> np.ndarray:
    """Turn probabilities into logits whose softmax or sigmoid they are."""

    def refuse(unfit: Any, expected: str) -> None:
        wrong = np.asarray(unfit)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{file}: expected probabilities {expected}; {int(wrong.sum())} rows are not, first id "
                f"{ids[row].as_py()!r}: {probabilities[row].tolist()}. If these are logits, set teacher.logits instead"
            )

    refuse(~np.isfinite(probabilities).all(axis=1), "that are finite numbers")
    refuse(((probabilities < 0.0) | (probabilities > 1.0)).any(axis=1), "between 0 and 1")
    if task.kind == "single-label":
        refuse(np.abs(probabilities.sum(axis=1) - 1.0) > _TOLERANCE, "that sum to 1 over the labels")
        with np.errstate(divide="ignore"):
            return np.maximum(np.log(probabilities), _NEVER)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probabilities) - np.log1p(-probabilities), _NEVER, -_NEVER)
