"""Rows of words with tags, or of texts with spans, in one shape: `text`, `starts`, `ends`, and `tags` in IOB2."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdlora.config import TaskConfig
from kdlora.data.lines import LINES
from kdlora.data.logit_table import as_lists, as_offsets
from kdlora.data.opening import KNOWN_COLUMNS
from kdlora.data.read import RawTable, Source, first_true, is_list, is_text, named_codes
from kdlora.data.spool import SLICE_ROWS, spool
from kdlora.data.tags import (
    LANGUAGE,
    OUTSIDE,
    SPAN_KEYS,
    WORD_COLUMNS,
    Integers,
    check_spans,
    cuts_word,
    normalise,
    parse_tags,
    rows_with,
    tag_names,
    tags_from_spans,
    text_of,
)
from kdlora.errors import DataError

TEXTS = ("text", "sentence", "content")
TAGS = ("tags", "ner_tags", "labels", "label", "ner")
SPANS = ("spans", "entities", "labels", "label")
_PLACES = pa.list_(pa.int32())
_MANY = 10
"""Fewer rows that break their scheme are repaired, and fewer spans that cut a word taken, however few there are."""
_EXPECTED = (
    "expected a list of words and a list of tags (words and tags, or tokens and ner_tags), or a text and a list of "
    'spans such as {"start": 0, "end": 5, "label": "PER"}'
)


def infer_token_columns(source: Source, config: TaskConfig) -> tuple[str, str] | None:
    """Choose the columns of input and labels; None where `task.kind` is not given and the source holds no tokens."""
    for given, key in ((config.text, "task.text"), (config.label, "task.label")):
        if given is None or config.kind != "tokens":
            continue
        if len(given) > 1:
            raise DataError(f"{key} names {len(given)} columns ({', '.join(given)}), but task.kind is tokens; name one")
        source.require(given[0], key)
    pairs: list[tuple[str, str]] = []
    for inputs, labels in ((WORD_COLUMNS, TAGS), (TEXTS, SPANS)):
        text = next((name for name in config.text or inputs if name in source.columns), None)
        label = next((name for name in config.label or labels if name in source.columns), None)
        if text in WORD_COLUMNS and label is None and config.label is not None:
            source.require(config.label[0], "task.label")
        if text is None or label is None:
            continue
        if config.kind == "tokens" or text in WORD_COLUMNS or label in (*TAGS[:2], *SPANS[:2]):
            if holds_tokens(source.read((text, label)), text, label):
                if config.kind == "auto":
                    _refuse_two_tasks(source, config, label)
                return text, label
            pairs.append((text, label))
    if config.kind == "tokens" and not pairs:
        raise DataError(
            f"{source.name}: which columns hold words and tags? {_EXPECTED}. Set task.text and task.label; the columns "
            f"are {', '.join(map(repr, source.columns))}"
        )
    return pairs[0] if config.kind == "tokens" else None


def _refuse_two_tasks(source: Source, config: TaskConfig, label: str) -> None:
    """Refuse a source that has a label of the whole text, too, where the config does not say which is learnt."""
    if config.label is not None or not any(name in source.columns for name in TEXTS):
        return
    known = [name for name in KNOWN_COLUMNS["label"] if name in source.columns]
    kinds = {name: source.read((name,)).table[name].type for name in known}
    if plain := [name for name, kind in kinds.items() if not (is_list(kind) or pa.types.is_null(kind))]:
        raise DataError(
            f"{source.name}: both {label!r} (of words or spans) and {plain[0]!r} (of texts) may be the label; set "
            f"task.kind to tokens, or task.label to {plain[0]}"
        )


def holds_tokens(raw: RawTable, text: str, label: str) -> bool:
    words, labels = raw.table[text].type, raw.table[label].type
    if not is_list(labels) or is_list(words):
        return is_list(labels)
    keys = [field.name for field in labels.value_type] if pa.types.is_struct(labels.value_type) else []
    return all(not set(names).isdisjoint(keys) for names in SPAN_KEYS[:2])


def read_token_rows(raw: RawTable, text: str, label: str | None, notes: list[str]) -> pa.Table:
    """Bring every row into one shape, on disk; what cannot be is named. Without a label column there are no tags."""
    input_type = raw.table[text].type
    if is_text(input_type):
        cut: list[bool] = []
        rows = spool(_batches_of_texts(raw, text, label, cut), raw.source)
        note = f"{raw.source}: {sum(cut)} of {len(cut)} spans begin or end inside a word; are offsets characters, and "
        note += "ends exclusive?"
        if sum(cut) >= _MANY and 2 * sum(cut) > len(cut):
            raise DataError(
                f"{note} Those of JavaScript count an emoji twice, and those in bytes an é. Correct them, or, where "
                "entities are parts of words, give lists of words and tags"
            )
        notes += [note] * any(cut)
        return rows
    if not is_list(input_type) or not (is_text(input_type.value_type) or pa.types.is_null(input_type.value_type)):
        raise DataError(f"{raw.source}: the column {text!r} holds {input_type!s:.80}; {_EXPECTED}")
    words, offsets = _flatten(raw, text, "words")
    words = pc.utf8_trim_whitespace(words.cast(pa.string()))
    if language := language_of(raw, text):
        notes.append(f"{raw.source}: every word begins with {language!r}, which was left out.")
    columns = {"words": pc.utf8_slice_codeunits(words, len(language))}
    if label is not None:
        columns["tags"] = _flat_tags(raw, label, offsets)
    if LINES in raw.table.column_names:
        columns[LINES] = pc.list_flatten(raw.table[LINES])
    flat, offsets = _without_blanks(raw, pa.table(columns), offsets, notes)
    if label is not None:
        flat = flat.drop_columns("tags").append_column("tags", _in_iob2(raw, flat, offsets, label, notes))
    return spool(_batches_of_words(flat, offsets), raw.source)


def _flatten(raw: RawTable, column: str, what: str) -> tuple[pa.ChunkedArray, Integers]:
    lists = raw.table[column]
    if (position := first_true(pc.is_null(lists))) is not None:
        raise DataError(f"{raw.where(position)}: no {what} in column {column!r}; remove the row, or give it some")
    return pc.list_flatten(lists), as_offsets(pc.list_value_length(lists))


def language_of(raw: RawTable, column: str) -> str:
    """Find the language that stands before every word of WikiANN's files: `en:` of `en:Oslo`."""
    if not is_list(raw.table[column].type):
        return ""
    words = pc.utf8_trim_whitespace(pc.list_flatten(raw.table[column]).cast(pa.string()))
    prefix = LANGUAGE.match(words[0].as_py() or "") if len(words) else None
    is_coded = prefix and pc.all(pc.fill_null(pc.starts_with(words, prefix[0]), False)).as_py()
    return prefix[0] if prefix and is_coded else ""


def _flat_tags(raw: RawTable, label: str, offsets: Integers) -> pa.ChunkedArray:
    """Give the tags of all words as text, those of codes by name, null where a word has none."""
    kind = raw.table[label].type
    if not is_list(kind):
        raise DataError(
            f"{raw.source}: the column {label!r} holds {kind!s:.80}, where a list of tags is expected, one a word"
        )
    if pa.types.is_struct(kind.value_type):
        raise DataError(
            f"{raw.source}: {label!r} holds spans, whose offsets are those of a text, but the input is a list of "
            "words; set task.text to a column of texts"
        )
    tags, own = _flatten(raw, label, "tags")
    for row in np.flatnonzero(np.diff(own) != np.diff(offsets))[:1].tolist():
        raise DataError(
            f"{raw.where(row)}: {offsets[row + 1] - offsets[row]} words, but {own[row + 1] - own[row]} tags in "
            f"{label!r}; every word needs one"
        )
    if label in raw.class_names:
        return named_codes(tags, raw.class_names[label])
    if not (is_text(kind.value_type) or pa.types.is_null(kind.value_type)):
        raise DataError(
            f"{raw.source}: the tags in {label!r} are {kind.value_type!s:.80}, and nothing says which is which; write "
            "them by name (B-PER), or as ClassLabels of a data set"
        )
    return tags.cast(pa.string())


def _without_blanks(raw: RawTable, flat: pa.Table, offsets: Integers, notes: list[str]) -> tuple[pa.Table, Integers]:
    """Leave words of white space alone out, which real files hold; a row without any word is refused."""
    blank = pc.fill_null(pc.equal(flat["words"], ""), True)
    if found := pc.sum(blank).as_py():
        flat, offsets = flat.filter(pc.invert(blank)), as_offsets(pc.invert(blank))[offsets]
        notes.append(f"{raw.source}: {found} words of white space alone were left out.")
    for row in np.flatnonzero(np.diff(offsets) == 0)[:1].tolist():
        raise DataError(f"{raw.where(row)}: no words; remove the row")
    return flat, offsets


def _in_iob2(raw: RawTable, flat: pa.Table, offsets: Integers, label: str, notes: list[str]) -> pa.Array:
    """Bring the tags of a file into IOB2; another scheme, and what was repaired, is noted."""
    encoded = flat["tags"].dictionary_encode().combine_chunks()
    distinct, codes = encoded.dictionary.to_pylist(), pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
    parsed = parse_tags(distinct)
    if strange := [code for code, tag in enumerate(distinct) if tag not in parsed]:
        _refuse_tag(raw, flat, offsets, int(np.argmax(codes == strange[0])), label)
    types = sorted({name for _, name in parsed.values() if name})
    tags, scheme, broken = normalise(codes, [parsed[tag] for tag in distinct], types, offsets)
    note = f"{raw.source}: tags in {scheme}"
    if len(broken) >= _MANY and 2 * len(broken) > (marked := len(rows_with(tags > 0, offsets))):
        raise DataError(
            f"{note}, but {len(broken)} of the {marked} rows with entities break this scheme, the first at "
            f"{raw.where(int(broken[0]))}; write the tags in one scheme throughout. Is {label!r} the column of tags?"
        )
    if len(broken):
        note += (
            f"; {len(broken)} of {len(offsets) - 1} rows broke this scheme and were repaired, so that an entity begins "
            "wherever a type does"
        )
    if scheme != "IOB2" or len(broken):
        notes.append(f"{note}.")
    return pc.take(pa.array(tag_names(types)), pa.array(tags, mask=tags < 0))


def _refuse_tag(raw: RawTable, flat: pa.Table, offsets: Integers, word: int, label: str) -> NoReturn:
    row = int(np.searchsorted(offsets, word, side="right")) - 1
    where = f"{raw.where(row)}, word {word - offsets[row] + 1}"
    if LINES in flat.column_names:
        where = f"{raw.source}, line {flat[LINES][word].as_py()}"
    tags = pc.unique(flat["tags"]).to_pylist()
    hint = "" if OUTSIDE in tags else f" No tag in {label!r} is O: is it the column of tags? task.label names another."
    raise DataError(
        f"{where}: the tag {flat['tags'][word].as_py()!r} ({label!r}) is of no scheme; expected O, B-TYPE and I-TYPE "
        f"(also with L and U, or E and S), or O and plain types throughout.{hint}"
    )


def _batches_of_words(flat: pa.Table, offsets: Integers) -> Iterator[pa.RecordBatch]:
    """Join the words of each row; they lie in its text where they were put."""
    for start in range(0, len(offsets) - 1, SLICE_ROWS):
        edges = offsets[start : start + SLICE_ROWS + 1]
        words = flat.slice(edges[0], edges[-1] - edges[0])
        part = {name: as_lists(words[name].combine_chunks(), edges - edges[0]) for name in flat.column_names}
        texts, *places = zip(*map(text_of, part.pop("words").to_pylist()), strict=True)
        part |= {name: pa.array(values, _PLACES) for name, values in zip(("starts", "ends"), places, strict=True)}
        yield pa.record_batch({"text": pa.array(texts), **part})


def _batches_of_texts(raw: RawTable, text: str, label: str | None, cut: list[bool]) -> Iterator[pa.RecordBatch]:
    """Split texts into words, cut where a span begins or ends; `cut` says of each span whether it is inside a word."""
    kind = raw.table[label].type if label is not None else None
    if kind is not None and not (
        is_list(kind) and (pa.types.is_struct(kind.value_type) or pa.types.is_null(kind.value_type))
    ):
        raise DataError(f"{raw.source}: the column {label!r} holds {kind!s:.80} beside texts; {_EXPECTED}")
    wanted, numbers = [name for name in (text, label) if name is not None], count()
    kinds = {"starts": _PLACES, "ends": _PLACES, "tags": pa.list_(pa.string())}
    for batch in raw.table.select(wanted).to_batches(SLICE_ROWS):
        rows = []
        for values in batch.to_pylist():
            where, given, spans = raw.where(next(numbers)), values[text], [] if label is None else values[label]
            if not isinstance(given, str) or not given.strip():
                raise DataError(f"{where}: the text {text!r} is empty; remove the row or fill it in")
            if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
                raise DataError(
                    f"{where}: no list of spans in column {label!r}; an empty list says that there are none"
                )
            checked = check_spans(spans, len(given), where)
            cut += [cuts_word(given, span) for span in checked]
            rows.append(tags_from_spans(given, checked, where))
        lists = zip(kinds.items(), zip(*rows, strict=True), strict=True)
        parts = {name: pa.array(part, kind) for (name, kind), part in lists if name != "tags" or label is not None}
        yield pa.record_batch({"text": batch.column(0).cast(pa.string()), **parts})
