"""Labels as numbers, and what a user's columns are, inferred where that is safe; what does not fit is named by row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdlora.config import Kind, TaskConfig
from kdlora.data.lines import LINES
from kdlora.data.logit_table import as_lists, as_offsets
from kdlora.data.read import RawTable, first_true, is_blank, is_list, is_text, named_codes
from kdlora.data.tags import NO_TAG
from kdlora.data.tasks import DEFAULT_METRICS, Task, find_joined, refuse_names
from kdlora.errors import DataError, did_you_mean, listed

MOST_CLASSES, MOST_NAMES = 20, 1000
"""So many distinct integers, or names, are still taken for classes; short files allow fewer names."""
INTEGER = r"^\s*[+-]?[0-9]+\s*$"
_COMMA = r"^\s*[+-]?[0-9]+(,[0-9]+)?\s*$"
_PERCENT = r"^\s*[+-]?[0-9]+([.,][0-9]+)?\s*%?\s*$"
_POINT = "write decimals with a point, as in 0.5"
_NO_SIGN = "write them without the sign for a regression, or set task.kind: single-label if they are classes"
_STRANGE_NUMBERS = (
    (",", _COMMA, "numbers with a comma", f"{_POINT}, and several labels as lists"),
    ("%", _PERCENT, "percentages", _NO_SIGN),
)
DECIMAL = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
WHOLE = r"^([+-]?[0-9]+)\.0*$"
"""A whole number that is written as a decimal; without its decimals it is the same label."""
_ABSENT = frozenset(("nan", "null", "none", "na", "n/a", "#n/a", "<na>"))
_SET_KIND = "set task.kind to single-label or regression"
_LIST_VALUES = 1 << 30  # offsets of an Arrow list are 32-bit


def encode_labels(
    raw: RawTable, columns: Sequence[str], task: Task, notes: list[str], *, ordered: bool
) -> pa.Array | pa.ChunkedArray:
    """Encode labels by name; by position, too, where somebody gave the names their order: `ordered`."""
    if task.kind == "single-label":
        return _codes(raw, columns[0], task, notes, ordered)
    if task.kind == "regression":
        return _numbers(raw, columns[0])
    if len(columns) > 1:
        values = [zeros_and_ones(raw, column) for column in task.label_names]  # the names are the columns
        return _as_lists(np.stack(values, axis=1))
    return _as_lists(_list_matrix(raw, columns[0], task.label_names, notes, ordered))


def encode_tags(raw: RawTable, words: pa.Table, column: str, task: Task) -> pa.Array:
    """Encode the tags of the words of every row; a word without one has -100."""
    flat, offsets = pc.list_flatten(words["tags"]), as_offsets(pc.list_value_length(words["tags"]))
    codes = pc.index_in(flat, pa.array(task.label_names))
    if (position := first_true(pc.and_(pc.is_null(codes), pc.is_valid(flat)))) is not None:
        where = raw.where(int(np.searchsorted(offsets, position, side="right")) - 1)
        if LINES in words.column_names:
            where = f"{raw.source}, line {pc.list_flatten(words[LINES])[position].as_py()}"
        _refuse_unknown(where, flat[position].as_py()[2:], column, task.label_types)
    return as_lists(pc.fill_null(codes, NO_TAG).cast(pa.int64()).combine_chunks(), offsets)


def label_strings(raw: RawTable, column: str) -> pa.ChunkedArray:
    values = raw.table[column]
    kind = values.type
    if column in raw.class_names and not is_list(kind):
        return named_codes(values, raw.class_names[column])
    if pa.types.is_boolean(kind):
        return pc.if_else(values, "True", "False")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = values.cast(pa.float64())
        fractional = pc.or_(pc.not_equal(pc.floor(values), values), pc.greater(pc.abs(values), 2.0**53))
        if (position := first_true(pc.and_(pc.is_finite(values), fractional))) is not None:
            raise DataError(
                f"{raw.where(position)}: the label {column!r} is {values[position].as_py()}, a decimal, but the task "
                "is single-label; set task.kind: regression, or make the labels names"
            )
        values = pc.if_else(pc.is_finite(values), values, None).cast(pa.int64())
    elif not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        hint = "; for lists set task.kind: multi-label" if is_list(kind) else ""
        raise _holds(raw, column, f"{kind!s:.80}; expected names, integers or true/false{hint}")
    strings = values.cast(pa.string())
    return pc.if_else(is_blank(strings), None, strings)


def _holds(raw: RawTable, column: str, told: str) -> DataError:
    return DataError(f"{raw.source}: the label column {column!r} holds {told}")


_UNLABELLED = "label them, or move the rows to a file of texts (data.unlabelled; of kdlora ask --unlabelled)"


def refuse_missing(raw: RawTable, column: str, missing: pa.ChunkedArray | pa.Array, remedy: str = _UNLABELLED) -> None:
    if (position := first_true(missing)) is not None:
        raise DataError(
            f"{raw.where(position)}: no label in column {column!r} ({pc.sum(missing).as_py()} of "
            f"{raw.table.num_rows} rows); {remedy}"
        )


def as_doubles(raw: RawTable, column: str) -> pa.ChunkedArray:
    """Read a column of numbers, or of text that spells numbers."""
    values = raw.table[column]
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if any(is_one(values.type) for is_one in numbers):
        return values.cast(pa.float64(), safe=False)
    if not is_text(values.type):
        raise _holds(raw, column, f"{values.type!s:.80}; expected numbers")
    trimmed = pc.utf8_trim_whitespace(values.cast(pa.string()))
    trimmed = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    try:
        return trimmed.cast(pa.float64())
    except pa.ArrowInvalid:
        position = first_true(pc.invert(pc.match_substring_regex(trimmed, rf"{DECIMAL}|(?i:^[+-]?(nan|inf))")))
        where, value = (raw.source, "a value") if position is None else (raw.where(position), values[position].as_py())
        remedy = _POINT if re.match(_COMMA, value) else "correct it"
        raise DataError(f"{where}: the label {column!r} is {value!r}, but a number is expected; {remedy}") from None


def _refuse_unknown(where: str, found: Any, column: str, names: Sequence[str]) -> NoReturn:
    raise DataError(
        f"{where}: the label {found!r} ({column!r}) is not among the labels {listed(map(repr, names))}."
        f"{did_you_mean(str(found), names)} Correct it, name it in task.label_names (of kdlora ask in --labels, or "
        "leave out a column that is no label) where that is set, or add training examples of it"
    )


def _codes(raw: RawTable, column: str, task: Task, notes: list[str], ordered: bool) -> pa.ChunkedArray:
    strings, names = label_strings(raw, column), pa.array(task.label_names)
    refuse_missing(raw, column, pc.is_null(strings))
    codes = pc.index_in(strings, names)
    if codes.null_count and pc.any(pc.match_substring_regex(names, DECIMAL)).as_py():
        bare, known = (pc.replace_substring_regex(one, WHOLE, r"\1") for one in (strings, names))
        codes = pc.coalesce(codes, pc.index_in(bare, known))
    elif codes.null_count == len(codes):
        codes = _positions(raw, strings, task, notes, ordered)
    if (position := first_true(pc.is_null(codes))) is not None:
        _refuse_unknown(raw.where(position), strings[position].as_py(), column, task.label_names)
    return codes.cast(pa.int64())


def _positions(raw: RawTable, strings: pa.ChunkedArray, task: Task, notes: list[str], ordered: bool) -> pa.ChunkedArray:
    """Take 0, 1 ... (or true and false) as positions in the list of label names, and say so."""
    names = task.label_names
    for others in ([str(code) for code in range(len(names))], ["False", "True"][: 2 * (len(names) == 2)]):
        codes = pc.index_in(strings, pa.array(others, pa.string()))
        if codes.null_count < len(codes):
            if not task.name:  # GLUE's files hold codes
                notes.append(_read_as(raw, "labels", others, names, ordered))
            break
    return codes


def _read_as(raw: RawTable, what: str, codes: Sequence[str], names: Sequence[str], ordered: bool) -> str:
    """Say what codes were taken for; where the alphabet gave the order, they may as well mean the opposite."""
    if not ordered and list(names) == sorted(names):
        raise DataError(
            f"{raw.source}: the {what} are {listed(codes)}, the labels of the training rows are {listed(names)}, and "
            "nobody said which is which; write names here, or set task.label_names to all names in their order"
        )
    meant = listed(f"{code} = {name}" for code, name in zip(codes, names, strict=True))
    return f"{raw.source}: the {what} were read as positions: {meant}."


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
    exact = values.to_numpy()
    if np.abs(narrow - exact).max(initial=0) > 1e-3 * exact.std() > 0:
        raise _holds(
            raw,
            column,
            f"numbers that differ by little beside their size, such as {exact.item(0)!r}, so that 32 "
            "bits round their differences away; subtract a fixed number from all of them",
        )
    return pa.array(narrow)


def zeros_and_ones(raw: RawTable, column: str) -> npt.NDArray[np.float32]:
    values = raw.table[column]
    if pa.types.is_nested(values.type):
        _refuse_value(raw.where(0), column, values[0])
    strings = pc.utf8_lower(values.cast(pa.string()))
    remedy = f"write 0 where a text does not have {column!r}, and remove a row only if nobody has looked at it"
    refuse_missing(raw, column, pc.is_in(strings, pa.array(["", "nan", None])), remedy)
    one = pc.is_in(strings, pa.array(["1", "1.0", "true"]))
    allowed = pc.or_(one, pc.is_in(strings, pa.array(["0", "0.0", "false"])))
    if (position := first_true(pc.invert(allowed))) is not None:
        _refuse_value(raw.where(position), column, values[position])
    return np.asarray(one.to_numpy(), np.float32)


def _refuse_value(where: str, column: str, value: pa.Scalar) -> NoReturn:
    raise DataError(
        f"{where}: {column!r} is {value.as_py()!r}, but a multi-label column holds only 0 and 1; correct it"
    )


def _list_matrix(
    raw: RawTable, column: str, names: tuple[str, ...], notes: list[str], ordered: bool
) -> npt.NDArray[np.float32]:
    values = pa.concat_arrays(raw.table[column].chunks)
    refuse_missing(raw, column, pc.is_null(values), "write [] for a text without any label")
    _refuse_other_lists(raw, column, values.type)
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(values)), lengths)
    inner = values.flatten()
    if column in raw.class_names or is_text(inner.type) or pa.types.is_null(inner.type):
        if column in raw.class_names:
            inner = named_codes(inner, raw.class_names[column])
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
    if any(name != str(position) for position, name in enumerate(names)):
        notes.append(
            _read_as(raw, "places in lists of 0 and 1", [str(one) for one in range(len(names))], names, ordered)
        )
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(len(values), len(names))


def _as_lists(matrix: npt.NDArray[np.float32]) -> pa.ChunkedArray:
    rows, width = matrix.shape
    step, kind = max(1, _LIST_VALUES // width), pa.list_(pa.float32())
    flat = (pa.array(matrix[start : start + step].ravel()) for start in range(0, rows, step))
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(part, width).cast(kind) for part in flat], kind)


def infer_task(
    raw: RawTable, text: tuple[str, ...], label: tuple[str, ...], config: TaskConfig
) -> tuple[Task, list[str]]:
    """Complete a task from the label columns of the training rows, with notes on what was inferred."""
    kind = _infer_kind(raw, label) if config.kind == "auto" else config.kind
    if kind != "multi-label" and len(label) > 1:
        raise DataError(
            f"task.label names {len(label)} columns ({', '.join(label)}), but task.kind is {kind}; name one"
        )
    names = _label_names(raw, kind, label, config.label_names)
    if not names:
        raise DataError(f"{raw.source}: the label column {label[0]!r} is empty in every row; expected labels")
    if kind == "single-label" and len(names) < 2 and config.label_names:
        raise DataError(f"task.label_names names {names[0]!r} alone; a classifier needs two labels or more")
    if kind == "single-label" and len(names) < 2:
        told = f"one class only ({', '.join(names)}); a classifier needs two or more. Check the file, or task.label"
        raise _holds(raw, label[0], told)
    given = config.label_names is not None or label[0] in raw.class_names
    if kind != "regression":
        refuse_names(raw.source, label, names, given=given)
    notes = []
    if config.kind == "auto":
        notes.append(f"The kind of task, {kind}, was inferred from the labels in {raw.source} ({', '.join(label)}).")
        if kind == "single-label" and len(names) > 2 and all(re.match(INTEGER, name) for name in names):
            notes.append("Where these numbers are a quantity, as ratings are, set task.kind to regression.")
    if config.label_names is None and kind != "regression":
        notes.append(f"The {len(names)} label names and their order were taken from the data: {listed(names)}.")
    if kind == "single-label" and not given:
        if joined := find_joined(names, alone=False) if config.kind == "auto" else None:
            told = "If it is several, write lists, or a column of 0 and 1 each, and set task.kind: multi-label."
            notes.append(f"{joined!r} is read as one label. {told}")
        absent = [name for name in names if name.strip().casefold() in _ABSENT]
        absent += ["-1"] if {"-1", "2"} <= set(names) and "-2" not in names else []
        notes += [f"{one} became a class; where it marks rows without a label, remove these rows." for one in absent]
    return Task(kind, text, label, names, DEFAULT_METRICS[kind]), notes


def _infer_kind(raw: RawTable, label: Sequence[str]) -> Kind:
    if len(label) > 1:
        return "multi-label"
    column, values = label[0], raw.table[label[0]]
    if is_list(values.type):
        return "multi-label"
    if column in raw.class_names or pa.types.is_boolean(values.type):
        return "single-label"
    if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        refuse_missing(raw, column, pc.is_null(values, nan_is_null=True))
        return _kind_of_decimals(raw, column)
    strings = label_strings(raw, column)
    distinct = pc.unique(strings).drop_null()
    names = distinct.to_pylist()
    for mark, form, what, remedy in _STRANGE_NUMBERS:
        if (marked := [name for name in names if mark in name]) and all(re.match(form, name) for name in names):
            raise _holds(raw, column, f"{what} ({marked[0]!r}); {remedy}")
    if joined := find_joined(names):
        told = (
            "write them as lists (JSON Lines, Parquet) or as a column of 0 and 1 each, or set task.kind: single-label"
        )
        raise _holds(raw, column, f"several labels in one ({joined!r}); {told} if it is one label")
    refuse_missing(raw, column, pc.is_null(strings))
    if pc.all(pc.match_substring_regex(distinct, INTEGER)).as_py():
        if len(distinct) <= MOST_CLASSES:
            return "single-label"
        raise _holds(raw, column, f"{len(distinct)} different integers, classes or a quantity; {_SET_KIND}")
    decimal = pc.match_substring_regex(distinct, DECIMAL)
    if pc.all(decimal).as_py():
        return _kind_of_decimals(raw, column)
    if 2 * pc.sum(decimal).as_py() > len(distinct):
        strange = distinct.filter(pc.invert(decimal))[0].as_py()
        position = pc.index(raw.table[column].cast(pa.string()), strange).as_py()
        raise DataError(
            f"{raw.where(position)}: the label {column!r} is {strange!r}, other rows have numbers; correct it, or set "
            "task.kind: single-label if these are names"
        )
    if len(distinct) > min(MOST_NAMES, max(MOST_CLASSES, raw.table.num_rows // 5)):
        told = "Is it the label? Set task.label to another column, or task.kind: single-label if these are classes"
        raise _holds(raw, column, f"{len(distinct)} texts in {raw.table.num_rows} rows. {told}")
    return "single-label"


def _kind_of_decimals(raw: RawTable, column: str) -> Kind:
    numbers = as_doubles(raw, column)
    if pc.any(pc.not_equal(pc.floor(numbers), numbers)).as_py():
        return "regression"
    first = raw.table[column][0].as_py()
    raise _holds(raw, column, f"whole numbers as decimals (such as {first}), classes or a quantity; {_SET_KIND}")


def _label_names(raw: RawTable, kind: Kind, label: tuple[str, ...], given: tuple[str, ...] | None) -> tuple[str, ...]:
    if kind == "regression":
        if given is not None and len(given) != 1:
            raise DataError(f"task.label_names has {len(given)} names, but a regression has one output; leave it out")
        return given or label
    if len(label) > 1:
        if given is not None and set(given) != set(label):
            raise DataError(
                f"task.label_names ({', '.join(given)}) orders the columns in task.label ({', '.join(label)}); the two "
                "need the same names"
            )
        return given or label
    if named := given or raw.class_names.get(label[0]):
        return named
    if kind == "multi-label":
        return _names_in_lists(raw, label[0])
    strings = label_strings(raw, label[0])
    names, bare = _sorted_names(strings), _sorted_names(pc.replace_substring_regex(strings, WHOLE, r"\1"))
    return bare if len(bare) < len(names) else names  # 1 and 1.0 are one label


def _refuse_other_lists(raw: RawTable, column: str, kind: pa.DataType) -> None:
    if not is_list(kind):
        raise DataError(
            f"{raw.source}: the task is multi-label, but the column {column!r} holds {kind!s:.80}; expected a list of "
            "label names or of 0 and 1, or several columns of 0 and 1 (task.label: [A, B, ...])"
        )
    if pa.types.is_nested(inner := kind.value_type):
        hint = "; spans in a text are a task of their own: set task.kind to tokens" if pa.types.is_struct(inner) else ""
        raise DataError(
            f"{raw.source}: the lists in {column!r} hold {inner!s:.80}; expected label names, or 0 and 1, one per "
            f"label{hint}"
        )


def _names_in_lists(raw: RawTable, column: str) -> tuple[str, ...]:
    values = raw.table[column]
    _refuse_other_lists(raw, column, values.type)
    if is_text(values.type.value_type):
        names = _sorted_names(pc.list_flatten(values))
        if names and {name.lower() for name in names} <= {"0", "1", "true", "false"}:
            raise _holds(raw, column, "lists of 0 and 1 as text; write label names, or 0 and 1 as numbers")
        return names
    lengths = pc.unique(pc.drop_null(pc.list_value_length(values)))
    if len(lengths) != 1:
        raise _holds(raw, column, "lists that differ in length; expected 0 and 1, one per label, or label names")
    if lengths[0].as_py() == 1:
        raise _holds(raw, column, "lists of one number; write the class as a plain value, or lists of label names")
    return tuple(str(position) for position in range(lengths[0].as_py()))


def _sorted_names(strings: pa.ChunkedArray) -> tuple[str, ...]:
    strings = strings.cast(pa.string())
    names = sorted(pc.unique(strings.filter(pc.invert(is_blank(strings)))).to_pylist())
    return tuple(sorted(names, key=float) if all(re.match(INTEGER, name) for name in names) else names)
