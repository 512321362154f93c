"""Faults of Parquet files: damaged, or larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from kdlora.errors import DataError

UNREADABLE = (pa.ArrowException, UnicodeDecodeError, OSError)
"""What pyarrow raises for a damaged Parquet file; a column's name that is not UTF-8 comes as Python's own error."""
REMEDY = "write it again, with all text in UTF-8"


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
