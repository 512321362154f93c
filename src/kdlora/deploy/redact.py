"""Replace entities in a text or in a column of a file, in bounded memory; what cannot be read is not passed on."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from kdlora.data.lines import FORMATS, Format
from kdlora.deploy.network import BATCH_SIZE
from kdlora.deploy.rows import Row, RowReader
from kdlora.deploy.stream import Progress, csv_bytes, read_answers, refuse_replacing, standard_output, text_columns
from kdlora.deploy.tagger import Entity, Tagger, load_for_many
from kdlora.errors import ConfigError, DataError, did_you_mean, harmless_json
from kdlora.system.storage import atomic_file

_REFUSAL = ". Nothing is passed on unread: correct the row, or remove it."
"""Of a row that cannot be read, for it may hold anything."""


@dataclass(frozen=True)
class RedactionSummary:
    """What a redaction did."""

    to: str  # the output file, or "-"
    rows: int  # in the output
    replaced: dict[str, int]  # how many spans of each type were replaced
    seconds: float  # wall-clock time


def redact(text: str, entities: Sequence[Entity], placeholders: Mapping[str, str] | None = None) -> str:
    """Put placeholders in the place of entities.

    Args:
        text: the text that the entities are of.
        entities: as from `Tagger.predict`, or of several models; of one within another nothing is told.
        placeholders: what stands for each type; other types stay. By default `[TYPE]` for every type.

    Returns:
        The text without these entities.

    Examples:
        >>> redact("Ada met Alan", [Entity("Ada", 0, 3, "PER", 0.99)])
        '[PER] met Alan'
    """
    parts, place = [], 0
    for entity in sorted(entities, key=lambda one: (one.start, -one.end)):
        if placeholders is None or entity.label in placeholders:
            written = f"[{entity.label}]" if placeholders is None else placeholders[entity.label]
            if entity.start >= place:
                parts += [text[place : entity.start], written]
            place = max(place, entity.end)
    return "".join([*parts, text[place:]])


def redact_file(
    model: Tagger | str | Path,
    source: str | Path,
    to: str | Path = "-",
    *,
    text: str | None = None,
    placeholders: Mapping[str, str] | None = None,
    input_format: Format | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> RedactionSummary:
    """Replace the entities of every row of a file or of standard input; the output has the form of the input.

    A row that cannot be read ends it, for nothing may pass unseen; the output file appears when it is whole. CSV is
    written with commas.

    Args:
        model: a tagger, or the folder of one; of an experiment its export is taken where it has one.
        source: CSV, TSV, JSON Lines or text file (one text a line), or "-" for standard input.
        to: the file to write, or "-" for standard output.
        text: text column; by default that of the training data, or `text`. Other columns stay as they are.
        placeholders: what stands for each type; other types stay. By default `[TYPE]` for every type.
        input_format: by default from the extension; standard input is one text a line.
        batch_size: most windows of texts in one forward pass.
        progress: called with the rows done and the share of the input read, after some rows each.

    Returns:
        Counts and time.

    Raises:
        DataError: no such file or column, an unknown format, a row that cannot be read.
        ConfigError: an unknown type; the output would replace the input.
        ModelError: not a folder of a tagger.

    Examples:
        >>> summary = redact_file("runs/names/student", "reviews.csv", "redacted.csv", text="review")
    """
    start, tagger = time.perf_counter(), model if isinstance(model, Tagger) else load_for_many(model, Tagger.load)
    wanted = _check_placeholders(tagger, placeholders)
    columns = replace(text_columns(tagger, text), words=False, keep=True)
    reader, counts, rows = RowReader(source, columns, form=input_format), Counter[str](), 0
    if reader.form in ("parquet", "conll"):
        raise DataError(f"{source}: a {reader.form} file is not redacted; write the rows as JSON Lines or CSV first.")
    if str(to) != "-" and FORMATS.get(Path(to).suffix.lower(), reader.form) != reader.form:
        raise DataError(f"{to}: what is redacted stays {reader.form}, as {reader.name} is; name such a file.")
    answered = read_answers(tagger, reader, batch_size, refusal=_REFUSAL)
    with _open(source, to) as file, contextlib.closing(answered):
        for answers in chain(answered, [[]]):  # the last one for a header alone
            if not rows and reader.form in ("csv", "tsv"):
                file.write(_delimited(reader.header, reader.form))
            for row, found in answers:
                entities = cast("list[Entity]", found)
                file.write(_encode(reader, row, redact(str(row.text), entities, wanted)))
                counts.update(entity.label for entity in entities if entity.label in wanted)
            rows += len(answers)
            file.flush()
            if progress is not None:
                progress(rows, reader.fraction())
    return RedactionSummary(str(to), rows, {name: counts[name] for name in wanted}, time.perf_counter() - start)


def _check_placeholders(tagger: Tagger, given: Mapping[str, str] | None) -> Mapping[str, str]:
    """Give what stands for each type; a type of which the model knows nothing would be left in the text."""
    if given is None:
        return {name: f"[{name}]" for name in tagger.types}
    for name, written in given.items():
        if name not in tagger.types:
            known = ", ".join(tagger.types)
            raise ConfigError(f"the model knows no type {name!r}; it has {known}.{did_you_mean(name, tagger.types)}")
        if set("\t\r\n") & set(written):
            raise ConfigError(f"{written!r} cannot stand for {name}: a line break or tab would make another row of it.")
    return given


@contextlib.contextmanager
def _open(source: str | Path, to: str | Path) -> Iterator[BinaryIO]:
    if str(to) == "-":
        yield standard_output()
        return
    refuse_replacing(source, Path(to))
    with atomic_file(Path(to)) as temporary, temporary.open("wb") as file:
        yield file


def _encode(reader: RowReader, row: Row, text: str) -> bytes:
    """Write a row with another text in the form of the input; a value of no text stays."""
    values = dict(row.values or {})
    if row.text:
        values[reader.text_columns[0]] = text
    if reader.form == "text":
        return f"{text}\n".encode()
    if reader.form == "jsonl":  # half of a pair of surrogates stays the number that it was
        return (harmless_json(_spell(values)) + "\n").encode(errors="backslashreplace")
    return _delimited(list(values.values()), reader.form)


def _spell(value: object) -> str:
    """Write JSON with every digit of its numbers, which float64 would round."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_spell(name)}: {_spell(item)}' for name, item in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def _delimited(values: Sequence[str], form: Format) -> bytes:
    return ("\t".join(values) + "\n").encode(errors="surrogateescape") if form == "tsv" else csv_bytes([values])
