"""One shape for every source: `id`, `text`, `text_pair` or words, `label`; what does not fit is named by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from kdlora.data.labels import encode_labels, encode_tags
from kdlora.data.read import RawTable, Source, first_true, is_blank, is_list, is_text
from kdlora.data.spool import doubles, hash_texts, make_dataset, read_column, spool, text_columns
from kdlora.data.tags import WORD_COLUMNS, Integers, tag_names
from kdlora.data.tasks import Task, refuse_names
from kdlora.data.token_rows import TEXTS, language_of, read_token_rows
from kdlora.errors import DataError, counted, listed

_ROWS = 65_536
_NEED = (
    " Training, validation and test files need labels, by people or by a model; texts without any are for "
    "data.unlabelled"
)
_SPLITS = ("split", "set", "subset", "partition")
_SCORED = frozenset(("test", "dev", "eval", "val", "valid", "validation"))


@dataclass(frozen=True)
class Columns:
    """Which columns of one source play which part; without an id column the row's number is the id."""

    text: tuple[str, ...]
    label: tuple[str, ...]
    id: str | None

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*([self.id] if self.id else []), *self.text, *self.label)))


@dataclass
class Reading:
    """What is needed to read every split of one experiment alike, and what is said about it."""

    task: Task
    id_column: str
    notes: list[str] = field(default_factory=list)
    ordered: bool = False  # somebody gave the label names their order, so that codes mean positions

    def read(self, groups: Mapping[str, Source], *, labelled: bool) -> Dataset:
        """Read a split; several groups become one data set with a `group` column."""
        parts = {group: self._source(source, group, labelled=labelled) for group, source in groups.items()}
        if list(parts) == [""]:
            return parts[""]
        return concatenate_datasets([part.add_column("group", [group] * len(part)) for group, part in parts.items()])

    def _source(self, source: Source, group: str, *, labelled: bool) -> Dataset:
        columns = self.columns(source, labelled=labelled)
        raw = source.read(columns.all)
        if source.benchmark:
            # GLUE's own files and Hub splits contain rows without text or label.
            hidden, texts = pa.array(["", "-", "-1", "-1.0", None]), raw.table.select(columns.text).columns
            corrupt = [is_blank(text.cast(pa.string())) for text in texts]
            corrupt += [pc.is_in(raw.table[label].cast(pa.string()), hidden) for label in columns.label]
            total, raw = raw.table.num_rows, raw.drop(reduce(pc.or_, corrupt))
            if not raw.table.num_rows:
                raise DataError(f"{source.name}: none of its {total} rows has both text and label")
            if dropped := total - raw.table.num_rows:
                self.notes.append(
                    f"{source.name}: {dropped} of {total} corrupt rows (ragged, or without text or label) were dropped."
                )
        if self.task.kind == "tokens":
            return self._words(raw, columns)
        arrays = {"id": _ids(raw, columns.id, f"{group}-" if group else "")}
        arrays |= {name: _texts(raw, column) for name, column in zip(("text", "text_pair"), columns.text, strict=False)}
        if columns.label:
            labels = pa.table({"label": encode_labels(raw, columns.label, self.task, self.notes, ordered=self.ordered)})
            arrays["label"] = spool(iter(labels.to_batches(_ROWS)), raw.source)["label"]
        return make_dataset(pa.table(arrays))

    def _words(self, raw: RawTable, columns: Columns) -> Dataset:
        """Read texts and their words; the first source that has tags, the training rows, gives the types."""
        label = columns.label[0] if columns.label else None
        rows = read_token_rows(raw, columns.text[0], label, self.notes)
        arrays = {"id": _ids(raw, columns.id, "")} | {name: rows[name] for name in ("text", "starts", "ends")}
        if label is not None:
            if not self.task.label_names:
                found = pc.unique(pc.list_flatten(rows["tags"])).to_pylist()
                types = sorted({tag[2:] for tag in found if tag and tag[2:]})
                self.task = replace(
                    self.task, label_names=tag_names(types), coded=language_of(raw, columns.text[0]) != ""
                )
                self.notes.append(f"{counted(len(types), 'type')} of entities taken from the data: {listed(types)}.")
            refuse_names(raw.source, self.task.label, self.task.label_types)
            arrays["label"] = encode_tags(raw, rows, label, self.task)
        return make_dataset(pa.table(arrays))

    def columns(self, source: Source, *, labelled: bool) -> Columns:
        if source.plain:
            if self.task.is_pair:
                raise DataError(
                    f"{source.name} holds one text a line, but the task has pairs "
                    f"({', '.join(self.task.text)}); give CSV, JSON Lines or Parquet with these columns"
                )
            return Columns(source.columns, (), None)
        text = self.task.text
        if self.task.kind == "tokens" and not labelled and text[0] not in source.columns:
            # Texts, where the labelled rows are words.
            text = tuple(name for name in (*WORD_COLUMNS, *TEXTS) if name in source.columns)[:1] or text
        for column in text:
            source.require(column, "task.text")
        label = self.task.label if labelled else ()
        for column in label:
            source.require(column, "task.label", _NEED)
        return Columns(text, label, self._id(source))

    def _id(self, source: Source) -> str | None:
        if self.id_column != "id" or ("id" in source.columns and not source.benchmark):
            return source.require(self.id_column, "data.id_column")
        # QQP has a column `id` that is not the Hub's.
        return "idx" if source.benchmark and "idx" in source.columns else None

    def has_labels(self, source: Source) -> bool:
        """Whether a split carries labels at all; the Hub's test splits of GLUE hold only -1."""
        name = self.task.label[0]
        if name not in source.columns:
            return False
        values = source.read((name,)).table[name]
        if is_list(values.type):
            values = pc.list_flatten(values)
        values = values.drop_null()
        if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
            hidden = pc.is_in(values.cast(pa.float64(), safe=False), pa.array([-1.0, -100.0]))
            return not pc.all(hidden, min_count=0).as_py()
        return not pc.all(is_blank(values), min_count=0).as_py() if is_text(values.type) else len(values) > 0


def unread_splits(train: Source) -> list[str]:
    """Say that a column of splits is not followed, or test rows are learnt from without a word."""
    for name in (column for column in train.columns if column.casefold() in _SPLITS):
        try:
            values = train.read((name,)).table[name]
        except DataError:  # of a column that nobody asked for
            continue
        parts = pc.unique(values.cast(pa.string())).drop_null().to_pylist() if is_text(values.type) else []
        if not _SCORED.isdisjoint(part.strip().casefold() for part in parts):
            return [
                f"{train.name}: its column {name!r} ({listed(parts)}) is not followed, and every row is a training "
                "row. Write each split to a file of its own (data.train, data.validation, data.test)."
            ]
    return []


def shared_texts(task: Task, rows: Dataset, kept: Integers, drawn: Integers) -> list[str]:
    """Say that rows drawn for validation have one text of their pair from a row that was kept, as answers share one."""
    notes = []
    for name, column in zip(text_columns(rows), task.text, strict=True) if task.is_pair else ():
        hashes = hash_texts(read_column(rows, name).chunks)
        if (known := int(np.isin(hashes[drawn], hashes[kept]).sum())) > len(drawn) / 10:
            notes.append(
                f"{known} of {len(drawn)} validation rows have the {column!r} of a training row: their score is of "
                "known ones. Where new ones count, give data.validation (and data.test) with others."
            )
    return notes


def _texts(raw: RawTable, column: str) -> pa.ChunkedArray:
    values = raw.table[column]
    if not (is_text(values.type) or pa.types.is_null(values.type)):
        raise DataError(
            f"{raw.source}: the text column {column!r} holds {values.type!s:.80}, not text; check task.text"
        )
    values = values.cast(pa.string())
    blank = is_blank(values)
    if (position := first_true(blank)) is not None:
        more = pc.sum(blank).as_py() - 1
        others = f" ({more} more such rows)" if more else ""
        raise DataError(f"{raw.where(position)}: the text {column!r} is empty{others}; remove the row or fill it in")
    return values


def _ids(raw: RawTable, column: str | None, prefix: str) -> pa.ChunkedArray:
    table = pa.table({"id": raw.numbers if column is None else _given_ids(raw, column)})
    parts = (batch.column(0).cast(pa.string()) for batch in table.to_batches(_ROWS))
    named = (pa.record_batch({"id": pc.binary_join_element_wise(prefix, ids, "")}) for ids in parts)
    return spool(named, raw.source)["id"]


def _given_ids(raw: RawTable, column: str) -> pa.ChunkedArray:
    kind = raw.table[column].type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):  # others are spelt in several ways
        raise DataError(f"{raw.source}: the id column {column!r} holds {kind!s:.80}; expected text or integers")
    ids = raw.table[column].cast(pa.string())
    if (position := first_true(pc.fill_null(pc.equal(ids, ""), True))) is not None:
        raise DataError(f"{raw.where(position)}: the id ({column!r}) is empty; every example needs one")
    if len(found := doubles(ids)):
        repeated = found[0]
        first = pc.index(ids, repeated).as_py()
        second = pc.index(ids, repeated, first + 1).as_py()
        others = f" ({len(found) - 1} more such ids)" if len(found) > 1 else ""
        raise DataError(
            f"{raw.where(second)}: the id {repeated.as_py()!r} ({column!r}) is also that of row {first + 1}{others}; "
            "ids must be unique within a file. Remove rows that are there twice, or set data.id_column to another "
            "column; without it, and without a column 'id', the id is the row's number"
        )
    return ids
