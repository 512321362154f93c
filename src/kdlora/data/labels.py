"""Labels as numbers: codes, values or rows of 0 and 1; whatever does not fit is named by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdlora.data.read import RawTable, is_text
from kdlora.data.tasks import Task
from kdlora.errors import DataError, did_you_mean

INTEGER = r"^[+-]?[0-9]+$"
DECIMAL = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
_LIST_VALUES = 1 << 30  # offsets of an Arrow list are 32-bit


def encode_labels(raw: RawTable, columns: Sequence[str], task: Task) -> pa.Array | pa.ChunkedArray:
    """Encode the labels of every row."""
    if task.kind == "single-label":
        return _codes(raw, columns[0], task.label_names)
    if task.kind == "regression":
        return _numbers(raw, columns[0])
    if len(columns) > 1:
        ordered = [_zeros_and_ones(raw, column) for column in task.label_names]  # the names are the columns
        return _as_lists(np.stack(ordered, axis=1))
    return _as_lists(_list_matrix(raw, columns[0], task.label_names))


def first_true(mask: pa.ChunkedArray | pa.Array) -> int | None:
    """Give the first row where a mask is true."""
    position: int = pc.index(mask, True).as_py()
    return None if position < 0 else position


def label_strings(raw: RawTable, column: str) -> pa.ChunkedArray:
    """Spell single labels as their names."""
    values = raw.table[column]
    if column in raw.class_names:
        return _named_codes(values, raw.class_names[column])
    kind = values.type
    if pa.types.is_boolean(kind):
        return pc.if_else(values, "True", "False")
    if pa.types.is_floating(kind):
        fractional = pc.and_(pc.is_finite(values), pc.not_equal(pc.floor(values), values))
        if (position := first_true(fractional)) is not None:
            raise DataError(
                f"{raw.where(position)}: the label {column!r} is {values[position].as_py()}, a decimal, but the task "
                "is single-label; set task.kind: regression, or make the labels names"
            )
        values = pc.if_else(pc.is_finite(values), values, None).cast(pa.int64())
    elif not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"{raw.source}: the label column {column!r} holds {kind}; expected names, integers or true/false"
        )
    strings = values.cast(pa.string())
    empty = pc.equal(strings, "")
    return pc.if_else(empty, None, strings) if pc.any(empty).as_py() else strings


def refuse_missing(raw: RawTable, column: str, missing: pa.ChunkedArray | pa.Array) -> None:
    """Name the first row without a label."""
    if (position := first_true(missing)) is not None:
        raise DataError(
            f"{raw.where(position)}: no label in column {column!r} ({pc.sum(missing).as_py()} of "
            f"{raw.table.num_rows} rows); remove the rows, or label them"
        )


def as_doubles(raw: RawTable, column: str) -> pa.ChunkedArray:
    """Read a column of numbers, or of text that spells numbers."""
    values = raw.table[column]
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.float64(), safe=False)
    if not is_text(values.type):
        raise DataError(f"{raw.source}: the label column {column!r} holds {values.type}; expected numbers")
    trimmed = pc.utf8_trim_whitespace(values.cast(pa.string()))
    trimmed = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    try:
        return trimmed.cast(pa.float64())
    except pa.ArrowInvalid:
        number = pc.or_(
            pc.match_substring_regex(trimmed, DECIMAL), pc.match_substring_regex(trimmed, "(?i)^[+-]?(nan|inf)")
        )
        position = first_true(pc.invert(number))
        where, value = (raw.source, "a value") if position is None else (raw.where(position), values[position].as_py())
        raise DataError(f"{where}: the label {column!r} is {value!r}, but a number is expected; correct it") from None


def _named_codes(codes: pa.ChunkedArray | pa.Array, names: Sequence[str]) -> pa.ChunkedArray | pa.Array:
    """Give the names of codes; a code without a name, such as the Hub's -1 for a hidden label, has none."""
    inside = pc.and_(pc.greater_equal(codes, 0), pc.less(codes, len(names)))
    return pc.take(pa.array(names, pa.string()), pc.if_else(inside, codes, None))


def _refuse_unknown(where: str, found: Any, column: str, names: Sequence[str]) -> NoReturn:
    raise DataError(
        f"{where}: the label {found!r} ({column!r}) is not among the labels {', '.join(map(repr, names))}."
        f"{did_you_mean(str(found), names)} Correct it, name it in task.label_names where that is set, or add training "
        "examples of it"
    )


def _codes(raw: RawTable, column: str, names: tuple[str, ...]) -> pa.ChunkedArray:
    strings = label_strings(raw, column)
    refuse_missing(raw, column, pc.is_null(strings))
    codes = pc.index_in(strings, pa.array(names))
    if not any(name.lstrip("+-").isdigit() for name in names):
        # 0, 1 ... (or true and false) are taken as positions in the list of label names
        for others in ([str(code) for code in range(len(names))], ["False", "True"][: 2 * (len(names) == 2)]):
            if codes.null_count == len(codes):
                codes = pc.index_in(strings, pa.array(others, pa.string()))
    if (position := first_true(pc.is_null(codes))) is not None:
        _refuse_unknown(raw.where(position), strings[position].as_py(), column, names)
    return codes.cast(pa.int64())


def _numbers(raw: RawTable, column: str) -> pa.Array:
    values = as_doubles(raw, column)
    refuse_missing(raw, column, pc.is_null(values))
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused
        narrow = values.to_numpy().astype(np.float32)
    for position in np.flatnonzero(~np.isfinite(narrow))[:1].tolist():
        raise DataError(
            f"{raw.where(position)}: the label {column!r} is {values[position].as_py()}; a regression needs finite "
            "numbers. Remove the row or correct it"
        )
    return pa.array(narrow)


def _zeros_and_ones(raw: RawTable, column: str) -> npt.NDArray[np.float32]:
    values = raw.table[column]
    strings = pc.utf8_lower(values.cast(pa.string()))
    refuse_missing(raw, column, pc.fill_null(pc.is_in(strings, pa.array(["", "nan"])), True))
    one = pc.is_in(strings, pa.array(["1", "1.0", "true"]))
    allowed = pc.or_(one, pc.is_in(strings, pa.array(["0", "0.0", "false"])))
    if (position := first_true(pc.invert(allowed))) is not None:
        _refuse_value(raw.where(position), column, values[position])
    return np.asarray(one.to_numpy(), np.float32)


def _refuse_value(where: str, column: str, value: pa.Scalar) -> NoReturn:
    raise DataError(
        f"{where}: {column!r} is {value.as_py()!r}, but a multi-label column holds only 0 and 1; correct it"
    )


def _list_matrix(raw: RawTable, column: str, names: tuple[str, ...]) -> npt.NDArray[np.float32]:
    values = raw.table[column].combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    refuse_missing(raw, column, pc.is_null(values))
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(values)), lengths)
    inner = values.flatten()
    if column in raw.class_names or is_text(inner.type) or pa.types.is_null(inner.type):
        if column in raw.class_names:
            inner = _named_codes(inner, raw.class_names[column])
        codes = pc.index_in(inner.cast(pa.string()), pa.array(names))
        if (position := first_true(pc.is_null(codes))) is not None:
            _refuse_unknown(raw.where(int(rows[position])), inner[position].as_py(), column, names)
        matrix = np.zeros((len(values), len(names)), np.float32)
        matrix[rows, codes.to_numpy(zero_copy_only=False).astype(np.int64)] = 1.0
        return matrix
    for position in np.flatnonzero(lengths != len(names))[:1].tolist():
        raise DataError(
            f"{raw.where(position)}: {column!r} has {lengths[position]} values, but there are {len(names)} labels; "
            "expected a list of 0 and 1 with one value per label, or a list of label names"
        )
    flat = inner.cast(pa.float32(), safe=False)
    allowed = pc.is_in(flat, pa.array([0.0, 1.0], pa.float32()))  # false for null
    if (position := first_true(pc.invert(allowed))) is not None:
        _refuse_value(raw.where(int(rows[position])), column, inner[position])
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(len(values), len(names))


def _as_lists(matrix: npt.NDArray[np.float32]) -> pa.ChunkedArray:
    rows, width = matrix.shape
    step = max(1, _LIST_VALUES // width)
    chunks = [
        pa.ListArray.from_arrays(
            pa.array(np.arange(0, (len(part) + 1) * width, width, dtype=np.int32)),
            pa.array(np.ascontiguousarray(part).ravel()),
        )
        for part in (matrix[start : start + step] for start in range(0, rows, step))
    ]
    return pa.chunked_array(chunks)
