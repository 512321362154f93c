"""Load a task's splits, checked and in canonical columns; the one entrance to this package."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from kdlora.config import DataConfig, DistilConfig, TaskConfig
from kdlora.data.augment import keep_unscored, row_classes, share_copies, stored_copies
from kdlora.data.canonical import Reading, shared_texts, unread_splits
from kdlora.data.checks import check_labels, check_scored, doubts_of_labels, used_labels
from kdlora.data.labels import DECIMAL, infer_task
from kdlora.data.logit_table import is_collection
from kdlora.data.opening import NEITHER, Groups, infer_columns, open_collection_texts, open_examples, open_splits
from kdlora.data.read import Source, is_text
from kdlora.data.spool import doubles, hash_texts, label_array, read_column, text_columns
from kdlora.data.tags import OUTSIDE, Integers, tag_names
from kdlora.data.tasks import DEFAULT_METRICS, GLUE, UNEVEN, GlueTask, Task, full_metric, with_windows
from kdlora.data.token_rows import holds_tokens, infer_token_columns
from kdlora.data.word_tokens import cut_words
from kdlora.defaults import copies_for
from kdlora.errors import ConfigError, DataError, listed
from kdlora.section import Metric

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """A task and its examples.

    Attributes:
        task: what is learnt.
        train: examples to learn from.
        validation: examples for checkpoints, early stopping and the choice of what is shipped.
        test: examples for the headline, where there are labelled ones.
        notes: plain sentences on what was inferred, dropped or drawn.
        unlabelled: texts that only the teacher labels; no column `label`.
        copies: how many of these are perturbed copies of training texts.
        held_out: training rows that a search took out; an epoch draws as many of the others once more.
        distil: how a teacher teaches whose logits lie in a column `teacher_logits` of `train` and `unlabelled`; None
            where there are none (`attach_teacher` adds them).

    Examples:
        >>> splits.train.column_names
        ['id', 'text', 'label']
    """

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset | None = None
    notes: tuple[str, ...] = ()
    unlabelled: Dataset | None = None
    copies: int = 0
    held_out: int = 0
    distil: DistilConfig | None = None

    def __repr__(self) -> str:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        rows = ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)
        return f"Splits({self.task.kind}, labels {list(self.task.label_names)}, {rows})"


def load_splits(task: TaskConfig, data: DataConfig, *, copies_in: Path | None = None) -> Splits:
    """Load every split of an experiment.

    Args:
        task: a GLUE task by name, or columns and kind of the user's own data as far as they are set.
        data: files, a folder in GLUE's layout, a `save_to_disk` folder or a Hub data set.
        copies_in: folder that keeps the perturbed copies (`data.augment`) for the next call; default: none does.

    Returns:
        The completed task and its splits in canonical columns.

    Raises:
        DataError: something is missing, cannot be read, is ambiguous or does not fit; the message names file, row
            or config key, and the remedy.

    Examples:
        >>> splits = load_splits(TaskConfig(text="review", label="sentiment"), DataConfig(train="reviews.csv"))
    """
    known = GLUE[task.name] if task.name is not None else None
    if known is not None and known.name == "ax":
        raise DataError("task.name: ax has no training data; train on mnli, and predict AX with that model")
    splits = open_splits(known, data)
    reading = _begin(task, known, data, next(iter(splits["train"].values())))
    reading.task = with_windows(reading.task, data)
    train = reading.read(splits["train"], labelled=True)
    if known is None:
        _settle_metric(reading, task.metric, train)
        reading.notes += unread_splits(splits["train"][""])
        if task.kind == "auto" and reading.task.kind == "multi-label" and (label_array(train).sum(axis=1) == 1).all():
            reading.notes.append(
                "Every training row has exactly one label, yet none or several may be predicted (multi-label). Where a "
                'text always has one, write it as a plain name ("a", not ["a"]), in one column.'
            )
    if "validation" in splits:
        validation = reading.read(splits["validation"], labelled=True)
    else:
        train, validation = _draw_validation(reading, data, train)
    train = _first(reading, train, data.max_train_examples, "training", "data.max_train_examples")
    test = _test(reading, data, splits)
    scored = {"validation": validation} | ({} if test is None else {"test": test})
    check_labels(reading.task, data, train, scored)
    check_scored(reading, scored)
    unlabelled = _unlabelled(reading, data, splits, list(scored.values()))
    train = cut_words(train) if reading.task.kind == "tokens" else train
    for note in reading.notes:
        logger.info(note)
    read = Splits(reading.task, train, validation, test, tuple(reading.notes), unlabelled)
    return add_copies(read, data, keep_in=copies_in)


def add_copies(splits: Splits, data: DataConfig, *, keep_in: Path | None = None) -> Splits:
    """Put perturbed copies of the training texts beside the unlabelled rows, where these are fewer."""
    each, texts = copies_for(data.augment, len(splits.train)), splits.unlabelled
    wanted = each * len(splits.train)
    if each == 0 or (data.augment is None and texts is not None and len(texts) >= wanted):
        return splits
    if data.augment is None and texts is not None and is_collection(Path(str(data.unlabelled))):
        note = (
            f"{data.unlabelled}: a labelled collection has no answers for perturbed copies, so {wanted} of them are "
            f"left out beside its {len(texts)} texts. Name the file of the texts in data.unlabelled to have both."
        )
        return replace(splits, notes=(*splits.notes, note))
    scored = [part for part in (splits.validation, splits.test) if part is not None]
    of_rows = share_copies(splits.task, splits.train, each)
    made = stored_copies(splits.train, of_rows, seed=data.split_seed, scored=scored, folder=keep_in)
    both = made if texts is None else concatenate_datasets([texts.select_columns(made.column_names), made])
    if texts is not None and len(twice := doubles(read_column(both, "id"))):
        raise DataError(
            f"{data.unlabelled}: {len(twice)} ids, first {twice[0].as_py()!r}, are those of copies of the training "
            "texts, too. Give the texts other ids (data.id_column), or set data.augment to 0"
        )
    note = f"{len(made):,} perturbed copies of the training texts were made, for a teacher to label (data.augment)."
    return replace(splits, unlabelled=both, copies=len(made), notes=(*splits.notes, note))


def load_examples(path: str, task: Task, *, id_column: str = "id", labelled: bool, ordered: bool = False) -> Dataset:
    """Load one file of examples for a task that is known, to evaluate or predict; say which labels no row has."""
    known = next((entry for name, entry in GLUE.items() if name == task.name), None)
    reading = Reading(task, id_column, ordered=ordered)
    dataset = reading.read({"": open_examples(Path(path), known, plain=not labelled)}, labelled=labelled)
    for note in (*reading.notes, *(doubts_of_labels(task, dataset, path) if labelled else ())):
        logger.warning(note)
    return dataset


def check_columns(text: Sequence[str], label: Sequence[str]) -> None:
    if len(text) > 2:
        raise ConfigError(f"the text is in one column, or in the two of a pair, got {len(text)}: {', '.join(text)}")
    if twice := [column for column in text if (*text, *label).count(column) > 1]:
        told = "no column is both text and label, or both texts of a pair; set task.text and task.label"
        raise DataError(f"the task names the column {twice[0]!r} twice; {told}")


def _begin(task: TaskConfig, known: GlueTask | None, data: DataConfig, train: Source) -> Reading:
    if known is not None:
        return Reading(known.task, data.id_column)
    if task.kind in ("auto", "tokens") and (found := infer_token_columns(train, task)):
        return _begin_tokens(task, data, train, found)
    text = task.text or infer_columns(train, "text", {*(task.label or ()), data.id_column})
    label = task.label or infer_columns(train, "label", {*text, data.id_column})
    check_columns(text, label)
    reading = Reading(Task("single-label", text, label, (), ()), data.id_column)
    raw = train.read(reading.columns(train, labelled=True).all)
    if task.kind == "auto" and len(text) == len(label) == 1 and holds_tokens(raw, text[0], label[0]):
        return _begin_tokens(task, data, train, (text[0], label[0]))
    if task.text is None:
        first = raw.table[text[0]]
        is_plain = is_text(first.type) or pa.types.is_primitive(first.type)
        if is_plain and pc.all(pc.match_substring_regex(first.cast(pa.string()), DECIMAL)).as_py():
            told = "is it the text? Then set task.text (--text) to it, else to the column of the texts"
            raise DataError(f"{train.name}: the column {text[0]!r} holds nothing but numbers; {told}")
        rest = [name for name in train.columns if name.strip().casefold() not in NEITHER]
        rest = [name for name in rest if name not in {*text, *label, data.id_column}]
        unread = f" Not read: {listed(rest)}; name what belongs to the text, too, in --text." if rest else ""
        reading.notes.append(f"Text column inferred: {', '.join(text)}.{unread}")
    if task.label is None:
        reading.notes.append(f"Label column inferred: {', '.join(label)}.")
    reading.task, notes = infer_task(raw, text, label, task)
    reading.ordered = task.label_names is not None or label[0] in raw.class_names
    reading.notes += notes
    return reading


def _begin_tokens(task: TaskConfig, data: DataConfig, train: Source, columns: tuple[str, str]) -> Reading:
    """Complete a task of words and their tags, or of texts and spans; the training rows give its types."""
    given = {*(task.label_names or ())} - {OUTSIDE}
    are_tags = all(name.startswith(("B-", "I-")) for name in given)  # T-cell beside B-cell says that both are types
    types = sorted({name[2:] for name in given} if are_tags else given)
    names = tag_names(types) if types else ()
    text, label = columns
    reading = Reading(Task("tokens", (text,), (label,), names, DEFAULT_METRICS["tokens"]), data.id_column)
    if task.kind == "auto":
        reading.notes.append(f"The kind of task, tokens, was inferred from the columns of {train.name}.")
    if task.text is None or task.label is None:
        reading.notes.append(f"Columns inferred from their names: {text} and {label}.")
    return reading


def _settle_metric(reading: Reading, given: Metric | None, train: Dataset) -> None:
    """Score by what the config names; else, where classes are uneven, by macro F1, which counts them alike."""
    task = reading.task
    if given is not None:
        reading.task = replace(task, metrics=(full_metric(given, task.kind, task.label_names),))
    elif task.kind == "single-label":
        counts = np.bincount(read_column(train, "label").to_numpy())
        most, least = counts.max(), counts[counts > 0].min()
        if most > UNEVEN * least:
            reading.task = replace(task, metrics=("macro_f1",))
            reading.notes.append(
                f"Scored by macro F1: the largest class has {most / least:.1f} times the training rows of the smallest "
                f"(more than {UNEVEN}). Set task.metric to accuracy, or to another metric, where that is what counts."
            )


def _draw_validation(reading: Reading, data: DataConfig, train: Dataset) -> tuple[Dataset, Dataset]:
    if len(train) < 2:
        raise DataError(f"{len(train)} training row cannot be split; give more rows, or a validation file")
    kept, drawn = draw_texts(reading.task, train, data.validation_fraction, data.split_seed)
    if not len(drawn):
        kept, drawn = draw_texts(reading.task, train, data.validation_fraction, data.split_seed, apart=False)
        reading.notes.append(
            "No label has a text to spare, so the validation rows have the texts of training rows: their score says "
            "nothing of new texts. Give more texts, or data.validation."
        )
    if not len(drawn):
        raise DataError("no row can be drawn: each has a label that no other has; give more rows, or a validation file")
    how = {"regression": "at random", "tokens": "stratified by type"}.get(reading.task.kind, "stratified by label")
    is_more = len(drawn) > max(1, round(len(train) * data.validation_fraction))
    why = "; that is more than the share, so that more of the labels have a row there" if is_more else ""
    reading.notes.append(
        f"{len(drawn)} of {len(train)} training rows became the validation split, drawn {how} "
        f"(data.validation_fraction {data.validation_fraction}, data.split_seed {data.split_seed}){why}."
    )
    reading.notes += shared_texts(reading.task, train, kept, drawn)
    return train.select(kept), train.select(drawn)


def draw_texts(
    task: Task, rows: Dataset, fraction: float, seed: int, *, apart: bool = True
) -> tuple[Integers, Integers]:
    """Draw a validation split without labels that no other row has; equal texts stay together where all are `apart`."""
    number = first = np.arange(len(rows))
    if apart:
        columns = [hash_texts(read_column(rows, name).chunks) for name in text_columns(rows)]
        _, first, number = np.unique(columns[0] + 3 * sum(columns[1:]), return_index=True, return_inverse=True)
        number, first = np.argsort(np.argsort(first))[number], np.sort(first)  # by the order of the rows
    if len(first) < 2:
        return number, first[:0]
    classes = row_classes(task, rows)
    is_drawn = np.isin(number, draw_rows(len(first), fraction, seed, None if classes is None else classes[first]))
    if classes is not None:  # equal texts may have different labels
        is_drawn &= ~np.isin(number, number[~np.isin(classes, classes[~is_drawn])])
    is_drawn &= ~np.isin(number, number[_needed_rows(task, rows, is_drawn)])
    return np.flatnonzero(~is_drawn), np.flatnonzero(is_drawn)


def _needed_rows(task: Task, rows: Dataset, is_drawn: npt.NDArray[np.bool_]) -> list[int]:
    """Number the drawn rows that have a label which no kept row has; classes are drawn with that in mind."""
    places, needed = np.flatnonzero(is_drawn), list[int]()
    if task.kind not in ("multi-label", "tokens") or not len(places):
        return needed
    drawn = rows.select(places)
    lacking = used_labels(task, drawn) & ~used_labels(task, rows.select(np.flatnonzero(~is_drawn)))
    for row, label in zip(places.tolist(), read_column(drawn, "label"), strict=True) if lacking.any() else ():
        values = np.array(label.as_py())
        own = (values[values > 0] - 1) // 2 if task.kind == "tokens" else np.flatnonzero(values)
        if lacking[own].any():
            lacking[own] = False
            needed.append(row)
    return needed


def _first(reading: Reading, rows: Dataset, limit: int | None, what: str, key: str) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    reading.notes.append(f"Only the first {limit} of {len(rows)} {what} rows are used ({key}).")
    return rows.select(range(limit))


def _test(reading: Reading, data: DataConfig, splits: Mapping[str, Groups]) -> Dataset | None:
    groups = splits.get("test")
    if groups is None:
        return None
    if data.test is None and not all(reading.has_labels(source) for source in groups.values()):
        names = ", ".join(source.name for source in groups.values())
        reading.notes.append(f"{names} has no labels and is not used for scoring.")
        return None
    return reading.read(groups, labelled=True)


def _unlabelled(
    reading: Reading, data: DataConfig, splits: Mapping[str, Groups], scored: list[Dataset]
) -> Dataset | None:
    """Read the texts without labels; those that a score is measured on are left out."""
    if data.unlabelled is None:
        return None
    if "unlabelled" in splits:
        rows = reading.read(splits["unlabelled"], labelled=False)
    else:
        rows = open_collection_texts(Path(data.unlabelled), reading.task)
    rows = cut_words(rows) if reading.task.kind == "tokens" else rows
    kept = keep_unscored(rows, scored)
    if dropped := len(rows) - len(kept):
        reading.notes.append(
            f"{data.unlabelled}: {dropped} of {len(rows)} unlabelled rows hold the text of a validation or test row; "
            "they are left out, so that every scored text is new to the student."
        )
    if not len(kept):
        raise DataError(f"{data.unlabelled} (data.unlabelled): no rows are left that are not scored on; give others")
    kept = _first(reading, kept, data.max_unlabelled_examples, "unlabelled", "data.max_unlabelled_examples")
    return kept.remove_columns("group") if "group" in kept.column_names else kept


def draw_rows(rows: int, fraction: float, seed: int, classes: Integers | None = None) -> Integers:
    """Draw the rows of a validation split.

    With classes, each gives its share (largest remainders first) and keeps a row to train on; a class with two rows or
    more gives one at least. Where that would take more than a fifth of all rows, chance says which classes give none.
    """
    draw = np.random.default_rng(seed)
    total = min(rows - 1, max(1, round(rows * fraction)))
    if classes is None:
        return draw.permutation(rows)[:total]
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    by_class = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    shares = _shares(counts, total, fraction, draw)
    return np.concatenate([draw.permutation(own)[:share] for own, share in zip(by_class, shares, strict=True)])


def _shares(counts: Integers, total: int, fraction: float, draw: np.random.Generator) -> Integers:
    """Divide `total` validation rows among classes of these sizes."""
    exact = counts * fraction
    least, order = np.minimum(1, counts - 1), np.arange(len(counts))
    fifth = max(total, -(-int(counts.sum()) // 5))
    if least.sum() > fifth:
        least, total, order = np.zeros_like(least), fifth, draw.permutation(order)
    most = np.minimum(np.maximum(1, np.ceil(exact)), counts - 1)
    shares = np.clip(np.floor(exact), least, most).astype(np.int64)
    for index in order[np.argsort((shares - exact)[order], kind="stable")]:  # largest remainder first
        if shares.sum() >= total:
            break
        shares[index] += shares[index] < most[index]
    return shares
