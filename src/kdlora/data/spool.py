"""Rows on disk in place of memory: written to temporary Arrow files without a name, and mapped."""

from __future__ import annotations

import itertools
import mmap
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features

from kdlora.errors import DataError

SLICE_ROWS = 10_000
"""Rows that are in memory at a time where they have to be: some megabytes of short texts, some dozen of long ones."""
_SPREAD = 16
"""So many times its own rows may lie between the first and the last row of a slice, to be taken from there at once."""


def spool(batches: Iterator[pa.RecordBatch], source: str) -> pa.Table:
    """Write batches to temporary Arrow files and map them, so that rows need no memory.

    A batch whose types differ (JSON that turns from integers to decimals) begins a new file; only the columns
    concerned are converted in memory.
    """
    rows = (batch for batch in batches if batch.num_rows)
    tables = [_map(schema, group) for schema, group in itertools.groupby(rows, key=lambda batch: batch.schema)]
    if not tables:
        raise DataError(f"{source} has a header or columns but no rows; expected one example per row")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{source}: a column changes its type from row to row ({error}); make it one type") from None


def _map(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.Table:
    """Write batches of one schema. The file has no name, so that a kill while it is written leaves nothing behind."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(prefix="kdlora-rows-", dir=folder) as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        # A write does not say where, and nobody knows of this file.
        said = f"{error.strerror} in the folder for temporary files (TMPDIR)"
        raise OSError(error.errno, said, folder) from error
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


def write_file(rows: Dataset, file: Path) -> None:
    """Write rows to an Arrow file, some thousand at a time."""
    with pa.ipc.new_stream(str(file), rows.features.arrow_schema) as writer:
        for table in slice_rows(rows, rows.column_names):
            writer.write_table(table.cast(rows.features.arrow_schema))


def map_file(file: Path) -> pa.Table:
    """Map the rows of a file by `write_file`."""
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def make_dataset(table: pa.Table, features: Features | None = None) -> Dataset:
    """Make a data set of a table, whose rows stay where they are."""
    # Without a given fingerprint the constructor hashes a copy of all rows in memory.
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=uuid.uuid4().hex[:16])


def read_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """Take one column in row order, without a Python object per row."""
    column = dataset.data.table[name]
    # A selection keeps all rows beside a list of row numbers; the public ways to apply it go through Python integers.
    chosen = dataset._indices
    return column if chosen is None else column.take(chosen.column(0).combine_chunks())


def slice_rows(dataset: Dataset, names: Sequence[str], rows: int = SLICE_ROWS) -> Iterator[pa.Table]:
    """Take some columns in row order, a slice at a time."""
    table, chosen = dataset.data.table.select(list(names)), dataset._indices
    for start in range(0, len(dataset), rows):
        if chosen is None:
            yield table.slice(start, rows)
            continue
        numbers = chosen.column(0).slice(start, rows).to_numpy()
        low, high = int(numbers.min()), int(numbers.max())
        if high - low < _SPREAD * rows:  # as where some rows were drawn from all
            yield table.slice(low, high - low + 1).take(pa.array(numbers - low))
        else:  # shuffled: `take` may copy all that it takes from
            chunk = dataset.select_columns(list(names)).with_format("arrow")[start : start + rows]
            yield chunk.select(list(names))


def settle(dataset: Dataset) -> Dataset:
    """Write a selection's rows one after the other, where it is one."""
    if dataset._indices is None or not len(dataset):
        return dataset
    names = dataset.column_names
    batches = (batch for table in slice_rows(dataset, names) for batch in table.to_batches())
    return make_dataset(spool(batches, "a selection"), dataset.features)
