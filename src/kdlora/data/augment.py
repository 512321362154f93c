"""Texts for a teacher to label: which may teach, and copies made from the training texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock

from kdlora.data.spool import (
    TEXTS,
    hash_columns,
    label_array,
    make_dataset,
    read_column,
    slice_rows,
    spool,
    text_columns,
)
from kdlora.data.tags import NO_SPACES, Integers
from kdlora.data.tasks import Task
from kdlora.data.word_tokens import WORDS, word_columns
from kdlora.system.integrity import hash_file, hash_json
from kdlora.system.storage import atomic_file, write_text_atomic

LOST = 0.15
"""Share of the words that are deleted or replaced, each with the same chance."""
SPLICED = 0.25
"""Share of the copies whose second half is another text's."""
ECHOED = 0.2
"""Share of the pairs whose second text is made from the first, so that a teacher sees close pairs too."""
MOST = 10
"""A row of a rare class has so many times the copies of an average one at most."""
BEGINNING = 20_000
"""Characters by which a text is known: a collection that `kdlora label` wrote surely holds so many of a longer one."""
_PLACES = pa.list_(pa.int32())
_NO_SPACE = re.compile(f"[{NO_SPACES}]")


def row_classes(task: Task, rows: Dataset) -> Integers | None:
    """Give each row's class, of several labels or types of entities the rarest, or that of none; None: no classes."""
    if task.kind == "regression" or (task.kind == "tokens" and not task.label_types):
        return None
    if task.kind == "single-label":
        return label_array(rows)
    if task.kind == "multi-label":
        has = label_array(rows).astype(bool)
    else:
        tags = read_column(rows, "label").combine_chunks()
        row, tag = pc.list_parent_indices(tags).to_numpy(), tags.flatten().to_numpy()
        has = np.zeros((len(rows), len(task.label_types)), bool)
        has[row[tag > 0], (tag[tag > 0] - 1) // 2] = True
    order = np.argsort(has.sum(axis=0), kind="stable")
    return np.where(has.any(axis=1), order[has[:, order].argmax(axis=1)], has.shape[1])


def share_copies(task: Task, rows: Dataset, copies: int) -> int | np.ndarray:
    """Give rows of rare labels more copies, by the roots of their classes' rows, where labels count alike."""
    if task.kind != "multi-label" and task.auto_weights() is None:
        return copies
    classes = row_classes(task, rows)
    assert classes is not None  # both have classes
    counts = np.bincount(classes)
    roots = np.sqrt(counts)
    of_class = copies * len(rows) * roots / roots.sum() / np.maximum(counts, 1)
    return np.clip(np.round(of_class), 1, MOST * copies).astype(np.int64)[classes]


def augment_texts(rows: Dataset, copies: int | np.ndarray, *, seed: int = 0) -> Dataset:
    """Make copies without labels, for a teacher: words deleted or replaced by words of other texts, halves exchanged.

    *Source*: word replacement for distillation, TinyBERT (Jiao et al., arXiv 1909.10351), section 3.3, with words drawn
    by frequency in place of a language model's; deletion, EDA (Wei and Zou, arXiv 1901.11196).
    """
    rows = rows.select_columns(["id", *text_columns(rows), *word_columns(rows)])
    batches = _copies(rows, np.broadcast_to(copies, len(rows)), np.random.default_rng(seed))
    return make_dataset(spool(batches, "copies"), rows.features)


def stored_copies(
    rows: Dataset, copies: int | np.ndarray, *, seed: int, scored: Sequence[Dataset], folder: Path | None
) -> Dataset:
    """Make the copies of the training texts that no row is scored on, or map those that were made before."""
    if folder is None:
        return keep_unscored(augment_texts(rows, copies, seed=seed), scored)
    made_of = [
        hash_columns(rows, ["id", *TEXTS, *word_columns(rows)]),
        np.asarray(copies).tolist(),
        seed,
        *(hash_columns(part, TEXTS) for part in scored),
    ]
    file = folder / f"{hash_json(made_of)[:16]}.arrow"
    digest = file.with_suffix(".sha256")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (file.is_file() and digest.is_file() and digest.read_text(encoding="utf-8") == hash_file(file)):
            made = keep_unscored(augment_texts(rows, copies, seed=seed), scored)
            schema = made.features.arrow_schema
            # Given a path, the writer closes the file some time later, and Windows renames no open file.
            with atomic_file(file) as part, part.open("wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for table in slice_rows(made, made.column_names):
                    writer.write_table(table.cast(schema))
            write_text_atomic(digest, hash_file(file))
    stored = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    return make_dataset(stored, rows.select_columns(stored.column_names).features)


def _words_in_a_row(rows: Dataset) -> tuple[list[Any], dict[str, list[int]]]:
    """Give the words text after text, equal ones as one object, as strings take fifty bytes, and where texts end.

    A word that the data has marked in a text comes in a pair, after whether white space stands before it.
    """
    known: dict[Any, Any] = {}
    words: list[Any] = []
    ends = {}
    for name in text_columns(rows):
        ends[name] = [len(words)]
        for table in slice_rows(rows, [name, *word_columns(rows)]):
            for text, *marked in zip(*(column.to_pylist() for column in table.columns), strict=True):
                found = _marked_words(text, *marked) if marked else _words(text)
                words.extend(known.setdefault(word, word) for word in found)
                ends[name].append(len(words))
    return words, ends


def _copies(rows: Dataset, of_row: np.ndarray, draw: np.random.Generator) -> Iterator[pa.RecordBatch]:
    every, ends = _words_in_a_row(rows)

    def words_of(name: str, row: int) -> list[Any]:
        start, end = ends[name][row : row + 2]
        return every[start:end]

    def perturb(words: Sequence[Any], other: Sequence[Any]) -> tuple[Sequence[Any], str]:
        """Perturb the words of one text, of which something always remains; give them and what joins them."""
        if draw.random() < SPLICED:
            words = [*words[: (len(words) + 1) // 2], *other[len(other) // 2 :]]
        chances = draw.random(len(words))
        kept = [
            word if chance >= LOST else every[int(draw.integers(len(every)))]
            for word, chance in zip(words, chances, strict=True)
            if chance >= LOST / 2  # below, the word is deleted
        ]
        return kept or words, "" if words and all(len(word) == 1 for word in words) else " "

    schema = pa.schema([(name, _PLACES if name in WORDS else pa.string()) for name in rows.column_names])
    for copy in range(1, int(of_row.max(initial=0)) + 1):
        start = 0
        for table in slice_rows(rows, ["id"]):
            made: dict[str, list[Any]] = {name: [] for name in rows.column_names}
            wanted = np.flatnonzero(of_row[start : start + len(table)] >= copy)
            for row, identity in zip((wanted + start).tolist(), table["id"].take(wanted).to_pylist(), strict=True):
                made["id"].append(f"{identity}~{copy}")
                for name in ends:
                    echo = name == "text_pair" and draw.random() < ECHOED
                    own = words_of("text" if echo else name, row)
                    other = words_of(name, int(draw.integers(len(rows))))
                    kept, glue = perturb(own, other)
                    found = _join(kept) if "starts" in made else {name: glue.join(kept)}
                    for column, value in found.items():
                        made[column].append(value)
            start += len(table)
            yield pa.RecordBatch.from_pydict(made, schema)


def _words(text: str) -> list[str]:
    """Split at spaces; a text without any is split into its characters."""
    words = text.split()
    return words if len(words) > 1 else list(text.strip())


def _marked_words(text: str, starts: Sequence[int], ends: Sequence[int]) -> list[tuple[bool, str]]:
    """Give the words that the data has marked in a text; a first word counts as one with white space before it."""
    before = zip((-1, *ends), starts, ends, strict=False)
    return [(end < start, text[start:stop]) for end, start, stop in before]


def _join(words: Sequence[tuple[bool, str]]) -> dict[str, Any]:
    """Put marked words together, and say where they are; letters that meet get a space where their script has one."""
    text, starts, ends = "", list[int](), list[int]()
    for is_apart, word in words:
        meet = text[-1:].isalnum() and word[:1].isalnum() and not _NO_SPACE.search(text[-1:] + word[:1])
        text += " " if text and (is_apart or meet) else ""
        starts.append(len(text))
        text += word
        ends.append(len(text))
    return {"text": text, "starts": starts, "ends": ends}


def keep_unscored(rows: Dataset, scored: Sequence[Dataset]) -> Dataset:
    """Leave out the rows whose text, or pair of texts, a score is measured on: it must stay one on new texts."""
    names = text_columns(rows)
    known = {texts for part in scored for texts in beginnings(part, names)}
    is_new = np.fromiter((texts not in known for texts in beginnings(rows, names)), bool, len(rows))
    return rows if is_new.all() else rows.select(np.flatnonzero(is_new))


def beginnings(rows: Dataset, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Give how texts begin; those of words whole and without spaces, which joined words have where a text has none."""
    has_words = "starts" in rows.column_names
    for part in slice_rows(rows, names):
        for texts in zip(*(column.to_pylist() for column in part.columns), strict=True):
            yield tuple("".join(text.split()) if has_words else text[:BEGINNING] for text in texts)
