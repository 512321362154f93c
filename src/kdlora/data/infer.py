"""Infer columns, kind and label names of a user's data where that is safe; ask where it is not."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from kdlora.config import Kind, TaskConfig
from kdlora.data.labels import DECIMAL, INTEGER, as_doubles, label_strings, refuse_missing
from kdlora.data.read import RawTable, Source, is_text
from kdlora.data.tasks import DEFAULT_METRICS, Task
from kdlora.errors import DataError

TEXT_COLUMNS = ("text", "sentence", "review", "content", "comment", "tweet", "document", "body", "message", "utterance")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("query", "passage"),
)
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment", "intent")

MOST_CLASSES = 20
"""So many distinct integers are still taken for classes."""
MOST_NAMES = 1000
"""So many distinct names are still taken for classes; short files allow fewer."""


def infer_text_columns(source: Source) -> tuple[str, ...]:
    """Choose the text columns by well-known names."""
    folded = {column.casefold(): column for column in source.columns}
    pairs = [pair for pair in TEXT_PAIRS if all(name in folded for name in pair)]
    in_pairs = {name for pair in pairs for name in pair}
    singles = [(name,) for name in TEXT_COLUMNS if name in folded and name not in in_pairs]
    return tuple(folded[name] for name in _only([*pairs, *singles], source, "text", "task.text"))


def infer_label_column(source: Source) -> tuple[str, ...]:
    """Choose the label column by a well-known name."""
    folded = {column.casefold(): column for column in source.columns}
    found = [(name,) for name in LABEL_COLUMNS if name in folded]
    return (folded[_only(found, source, "label", "task.label")[0]],)


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
        raise DataError(f"{raw.source}: the lists in the label column {label[0]!r} are all empty; expected labels")
    if kind == "single-label" and len(names) < 2:
        raise DataError(
            f"{raw.source}: the label column {label[0]!r} holds one class only ({', '.join(names)}); a classifier "
            "needs two or more. Check the file, or task.label"
        )
    notes = []
    if config.kind == "auto":
        notes.append(f"The kind of task, {kind}, was inferred from the labels in {raw.source} ({', '.join(label)}).")
    if config.label_names is None and kind != "regression":
        shown = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
        notes.append(f"The {len(names)} label names and their order were taken from the data: {shown}.")
    return Task(kind, text, label, names, DEFAULT_METRICS[kind]), notes


def _only(found: Sequence[tuple[str, ...]], source: Source, what: str, key: str) -> tuple[str, ...]:
    if len(found) == 1:
        return found[0]
    columns = ", ".join(map(repr, source.columns))
    if not found:
        raise DataError(f"{source.name}: which column is the {what}? Set {key}; the columns are {columns}")
    candidates = " or ".join("+".join(names) for names in found)
    raise DataError(f"{source.name}: the {what} may be {candidates}; set {key}. The columns are {columns}")


def _infer_kind(raw: RawTable, label: Sequence[str]) -> Kind:
    if len(label) > 1:
        return "multi-label"
    column = label[0]
    values = raw.table[column]
    if _is_list(values.type):
        return "multi-label"
    if column in raw.class_names or pa.types.is_boolean(values.type):
        return "single-label"
    if pa.types.is_floating(values.type):
        refuse_missing(raw, column, pc.is_null(values, nan_is_null=True))
        return _kind_of_decimals(raw, column)
    refuse_missing(raw, column, pc.is_null(label_strings(raw, column)))
    distinct = pc.unique(values.cast(pa.string()))
    if pc.all(pc.match_substring_regex(distinct, INTEGER)).as_py():
        if len(distinct) <= MOST_CLASSES:
            return "single-label"
        raise DataError(
            f"{raw.source}: the label column {column!r} holds {len(distinct)} different integers, which may be classes "
            "or a quantity; set task.kind to single-label or regression"
        )
    decimal = pc.match_substring_regex(distinct, DECIMAL)
    if pc.all(decimal).as_py():
        return _kind_of_decimals(raw, column)
    return _kind_of_names(raw, column, distinct, decimal)


def _kind_of_decimals(raw: RawTable, column: str) -> Kind:
    numbers = as_doubles(raw, column)
    if pc.any(pc.not_equal(pc.floor(numbers), numbers)).as_py():
        return "regression"
    raise DataError(
        f"{raw.source}: the label column {column!r} holds decimals that are all whole numbers (such as "
        f"{raw.table[column][0].as_py()}), classes or a quantity; set task.kind to single-label or regression"
    )


def _kind_of_names(raw: RawTable, column: str, distinct: pa.Array, decimal: pa.Array) -> Kind:
    if 2 * pc.sum(decimal).as_py() > len(distinct):
        strange = distinct.filter(pc.invert(decimal))[0].as_py()
        position = pc.index(raw.table[column].cast(pa.string()), strange).as_py()
        raise DataError(
            f"{raw.where(position)}: the label {column!r} is {strange!r} among numbers; correct it, or set task.kind: "
            "single-label if these are names"
        )
    most = min(MOST_NAMES, max(MOST_CLASSES, raw.table.num_rows // 5))
    if len(distinct) > most:
        raise DataError(
            f"{raw.source}: the label column {column!r} holds {len(distinct)} texts in {raw.table.num_rows} rows. "
            "Is it the label? Set task.label to another column, or task.kind: single-label if these are classes"
        )
    return "single-label"


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
    column, values = label[0], raw.table[label[0]]
    if kind == "single-label" and _is_list(values.type):
        raise DataError(f"{raw.source}: the label column {column!r} holds lists; set task.kind: multi-label")
    if named := given or raw.class_names.get(column):
        return named
    return _sorted_names(label_strings(raw, column)) if kind == "single-label" else _names_in_lists(raw, column, values)


def _names_in_lists(raw: RawTable, column: str, values: pa.ChunkedArray) -> tuple[str, ...]:
    if not _is_list(values.type):
        raise DataError(
            f"{raw.source}: the task is multi-label, but the column {column!r} holds {values.type}; expected a list of "
            "label names or of 0 and 1, or several columns of 0 and 1 (task.label: [A, B, ...])"
        )
    if is_text(values.type.value_type):
        return _sorted_names(pc.list_flatten(values))
    lengths = pc.unique(pc.drop_null(pc.list_value_length(values)))
    if len(lengths) != 1:
        raise DataError(
            f"{raw.source}: the lists in {column!r} differ in length; expected lists of 0 and 1, one per label, "
            "or lists of label names"
        )
    return tuple(str(position) for position in range(lengths[0].as_py()))


def _sorted_names(strings: pa.ChunkedArray) -> tuple[str, ...]:
    names = sorted(pc.unique(pc.drop_null(strings)).to_pylist())
    return tuple(sorted(names, key=int) if all(name.lstrip("+-").isdecimal() for name in names) else names)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
