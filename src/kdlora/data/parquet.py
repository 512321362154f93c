"""Parquet files batch by batch, and their faults: damaged, or larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdlora.errors import DataError

UNREADABLE = (pa.ArrowException, UnicodeDecodeError, OSError)
"""What pyarrow raises for a damaged file; a column's name that is not UTF-8 comes as Python's own error."""
_REMEDY = "write it again, with all text in UTF-8"
_BATCH_ROWS = 65536


@contextmanager
def parquet_faults(name: str, remedy: str = _REMEDY) -> Iterator[None]:
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


def read_batches(file: Path, columns: Sequence[str], name: str = "", remedy: str = _REMEDY) -> Iterator[pa.RecordBatch]:
    """Read some columns of a file in the order named, some rows at a time; messages call the file by `name`."""
    with parquet_faults(name or str(file), remedy), pq.ParquetFile(file) as parquet:
        if missing := [column for column in columns if column not in parquet.schema_arrow.names]:
            raise DataError(f"{file} has no column {missing[0]!r}; {remedy}")
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            batch.validate(full=True)  # pyarrow itself takes any bytes for text
            yield batch.select(list(columns))  # it gives the file's order
