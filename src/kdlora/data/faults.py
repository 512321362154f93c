"""Faults of files: text that is not UTF-8, two columns of one name, damaged Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from kdlora.data.lines import LongLineError
from kdlora.errors import DataError

UNREADABLE = (pa.ArrowException, UnicodeDecodeError, OSError)
"""What pyarrow raises for a damaged Parquet file; a column's name that is not UTF-8 comes as Python's own error."""
REMEDY = "write it again, with all text in UTF-8"

_CHUNK_BYTES = 1 << 20


@contextmanager
def parquet_faults(name: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn what pyarrow raises over a Parquet file into an error that says whether it is damaged or too large."""
    try:
        yield
    except (MemoryError, pa.ArrowCapacityError) as error:
        raise DataError(
            f"{name}: a few rows of this Parquet file need more memory than there is ({error}). A small file may hold "
            "one long text many times; write it again with shorter texts, or read it where there is more memory"
        ) from None
    except UNREADABLE as error:
        raise DataError(f"{name} is no readable Parquet file ({error}); {remedy}") from None


@contextmanager
def text_faults(file: Path, expected: str) -> Iterator[None]:
    """Say where a file of lines is not UTF-8, or has a line that is too long."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise encoding_error(file) or DataError(f"{file} is not UTF-8 ({error})") from None
    except LongLineError as error:
        raise DataError(f"{file}: {error}; expected {expected}") from None


def encoding_error(file: Path, limit: int | None = None) -> DataError | None:
    """Describe the first byte that is not UTF-8."""
    offset, line, tail = 0, 1, b""
    with file.open("rb") as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return DataError(f"{file} is UTF-16, but UTF-8 is expected; save it as UTF-8 (iconv -f utf-16 -t utf-8)")
        stream.seek(0)
        while True:
            chunk = stream.read(_CHUNK_BYTES)
            data = tail + chunk
            try:
                data.decode()
                good = len(data)
            except UnicodeDecodeError as error:
                good = error.start
                if error.reason != "unexpected end of data" or not chunk:
                    line += data.count(b"\n", 0, good)
                    return DataError(
                        f"{file}, line {line}: byte 0x{data[good]:02X} at offset {offset + good} is not UTF-8; convert "
                        "the file to UTF-8 (for example: iconv -f windows-1252 -t utf-8)"
                    )
            if not chunk or (limit is not None and offset > limit):
                return None
            line += data.count(b"\n", 0, good)
            offset, tail = offset + good, data[good:]


def refuse_duplicates(name: str, columns: Sequence[str]) -> None:
    """Refuse a file in which a column name leaves open which column is meant."""
    if twice := [column for position, column in enumerate(columns) if column in columns[:position]]:
        raise DataError(f"{name} has two columns named {twice[0]!r}; rename one")
