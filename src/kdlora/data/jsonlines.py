"""JSON Lines, or a JSON array of objects; a broken line or a change of type is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdlora.data.faults import encoding_error
from kdlora.data.lines import Lines, LongLineError
from kdlora.errors import DataError

_CHUNK_ROWS = 10_000


def json_columns(file: Path) -> tuple[str, ...]:
    """Collect the keys of the first rows, in order of appearance."""
    columns: dict[str, None] = {}
    for row in islice(_rows(file), _CHUNK_ROWS):
        columns.update(dict.fromkeys(row))
    if not columns:
        raise DataError(f"{file} holds no JSON objects; expected one example per line")
    return tuple(columns)


def json_batches(file: Path, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read some keys of every row; a missing key is null."""
    rows, first = _rows(file), 0
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        arrays = [_to_array([row.get(key) for row in chunk], key, file, first) for key in wanted]
        yield pa.RecordBatch.from_arrays(arrays, names=list(wanted))
        first += len(chunk)


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            start = stream.read(1)
            while start.isspace():
                start = stream.read(1)
            stream.seek(0)
            yield from _array_rows(file, stream.read()) if start == "[" else _line_rows(file, Lines(stream))
    except UnicodeDecodeError as error:
        raise encoding_error(file) or DataError(f"{file} is not UTF-8 ({error})") from None
    except LongLineError as error:
        raise DataError(f"{file}: {error}; expected one object per line") from None


def _array_rows(file: Path, text: str) -> Iterator[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{file}: {_unreadable(error)}") from None
    for number, row in enumerate(rows, 1):
        yield _as_object(row, f"{file}, row {number}")


def _line_rows(file: Path, lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {number}: not JSON ({error.msg}, column {error.colno}); expected one object per line"
            ) from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{file}, line {number}: {_unreadable(error)}") from None
        yield _as_object(row, f"{file}, line {number}")


def _unreadable(error: Exception) -> str:
    """Say why Python's reader gives up on what may well be JSON."""
    if isinstance(error, RecursionError):
        return 'nested too deep; expected an object such as {"text": ..., "label": ...}'
    return f"cannot be read ({error})"


def _as_object(row: object, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: {type(row).__name__} found; expected an object such as {{"text": ..., "label": ...}}'
        )
    return row


def _to_array(values: list[Any], key: str, file: Path, first_row: int) -> pa.Array:
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        row = next(row for row, value in enumerate(values) if _is_broken(value))
        raise DataError(
            f"{file}, row {first_row + row + 1}: {key!r} holds half a character (a lone surrogate, such as \\ud800); "
            "write the text again"
        ) from None
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        expected = type(known[0][1])
        for row, value in known:
            if type(value) is not expected and {type(value), expected} != {int, float}:
                raise DataError(
                    f"{file}, row {first_row + row + 1}: {key!r} is {type(value).__name__} ({str(value)[:40]!r}), but "
                    f"{expected.__name__} in the rows before; make it one type"
                ) from None
        raise DataError(f"{file}: {key!r} cannot be read ({error}); make it one type") from None


def _is_broken(value: Any) -> bool:
    """Say whether text, however deep, cannot be written as UTF-8."""
    return any(0xD800 <= ord(character) <= 0xDFFF for character in json.dumps(value, ensure_ascii=False))
