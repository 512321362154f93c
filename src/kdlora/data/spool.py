"""Rows on disk in place of memory: written to temporary Arrow files without a name, mapped, sliced and hashed."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features
from pandas.util import hash_array

from kdlora.errors import DataError

TEXTS = ("text", "text_pair")
"""The columns of an example's text, or pair of texts."""
SLICE_ROWS = 10_000
"""Rows that are in memory at a time where they have to be: some megabytes of short texts, some dozen of long ones."""
_HASHED_ROWS = 100_000
_MOST_BYTES = 1 << 30
"""From more bytes of text at once nothing is taken: pyarrow joins them into one array, which holds 2 GiB."""
_SPREAD = 16
"""So many times its own rows may lie between the first and the last row of a slice, to be taken from there at once."""


def spool(batches: Iterator[pa.RecordBatch], source: str) -> pa.Table:
    """Write batches to temporary Arrow files and map them, so that rows need no memory; new types begin a new file."""
    rows = (batch for batch in batches if batch.num_rows)
    tables = [_map(schema, group) for schema, group in itertools.groupby(rows, key=lambda batch: batch.schema)]
    if not tables:
        raise DataError(f"{source} has no rows; expected one example per row")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{source}: a column changes its type from row to row ({error}); make it one type") from None


def _map(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.Table:
    """Write batches of one schema. The file has no name, so that a kill while it is written leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(prefix="kdlora-rows-") as file:
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
        raise OSError(error.errno, said, tempfile.gettempdir()) from error
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


def make_dataset(table: pa.Table, features: Features | None = None) -> Dataset:
    """Make a data set of a table, whose rows stay where they are."""
    # Without a given fingerprint the constructor hashes a copy of all rows in memory.
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=uuid.uuid4().hex[:16])


def read_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """Take one column in row order, without a Python object per row."""
    column = dataset.data.table[name]
    # A selection keeps all rows beside a list of row numbers; the public ways to apply it go through Python integers.
    if dataset._indices is None:
        return column
    if column.nbytes < _MOST_BYTES:
        return column.take(dataset._indices.column(0).combine_chunks())
    parts = [part.column(0).chunks for part in slice_rows(dataset, [name])]
    return pa.chunked_array(list(itertools.chain.from_iterable(parts)), column.type)


def text_columns(dataset: Dataset) -> list[str]:
    return [name for name in TEXTS if name in dataset.column_names]


def read_texts(dataset: Dataset) -> dict[str, list[str]]:
    return {name: read_column(dataset, name).to_pylist() for name in text_columns(dataset)}


def label_array(examples: Dataset) -> npt.NDArray[Any]:
    """Give the labels of a data set: a value a row, in a multi-label task a row of 0 and 1 a row, or one a word."""
    column = read_column(examples, "label")
    if not pa.types.is_nested(column.type):
        return np.asarray(column.to_numpy())
    values = np.asarray(pc.list_flatten(column).to_numpy())
    return values if pa.types.is_integer(column.type.value_type) else values.reshape(len(column), -1)


def slice_rows(dataset: Dataset, names: Sequence[str], rows: int = SLICE_ROWS) -> Iterator[pa.Table]:
    """Take some columns in row order, a slice at a time."""
    table, chosen = dataset.data.table.select(list(names)), dataset._indices
    for start in range(0, len(dataset), rows):
        if chosen is None:
            yield table.slice(start, rows)
            continue
        numbers = chosen.column(0).slice(start, rows).to_numpy()
        low, high = int(numbers.min()), int(numbers.max())
        part = table.slice(low, high - low + 1)
        if high - low < _SPREAD * rows and part.nbytes < _MOST_BYTES:  # as where some rows were drawn from all
            yield part.take(pa.array(numbers - low))
        else:  # shuffled: `take` may copy all that it takes from
            chunk = dataset.select_columns(list(names)).with_format("arrow")[start : start + rows]
            yield chunk.select(list(names))


def spread_rows(dataset: Dataset, most: int) -> Dataset:
    """Take one row of each of so many equal parts, by chance, since classes may alternate; of fewer rows all."""
    if len(dataset) <= most:
        return dataset
    edges = np.linspace(0, len(dataset), most + 1).astype(int)
    return dataset.select(np.random.default_rng(0).integers(edges[:-1], edges[1:]))


def settle(dataset: Dataset) -> Dataset:
    """Write a selection's rows one after the other, where it is one."""
    if dataset._indices is None or not len(dataset):
        return dataset
    names = dataset.column_names
    batches = (batch for table in slice_rows(dataset, names) for batch in table.to_batches())
    return make_dataset(spool(batches, "a selection"), dataset.features)


def hash_columns(dataset: Dataset, columns: Sequence[str]) -> str:
    """Give the SHA-256 of some columns, row by row; how the rows are stored in chunks does not count."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    for column in columns:
        digest.update(f"\n{column} {column in dataset.column_names}\n".encode())
        if column in dataset.column_names:
            parts = slice_rows(dataset, [column])  # of a slice, all rows between its first and last are read
            while some := list(itertools.islice(parts, _HASHED_ROWS // SLICE_ROWS)):
                _update(digest, pa.concat_arrays([chunk for part in some for chunk in part.column(0).chunks]))
    return digest.hexdigest()


def _update(digest: Any, array: pa.Array) -> None:
    """Feed lengths and values of an array to the hash; nulls count as such."""
    digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(pc.fill_null(pc.list_value_length(array), -1).cast(pa.int64()).to_numpy().tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        binary = pc.fill_null(array, "").cast(pa.large_binary())
        offsets = np.frombuffer(binary.buffers()[1] or bytes(8), np.int64)
        offsets = offsets[binary.offset : binary.offset + len(binary) + 1]
        digest.update(np.diff(offsets).tobytes())
        digest.update(np.frombuffer(binary.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]])
    elif not pa.types.is_null(kind):
        nothing = False if pa.types.is_boolean(kind) else 0
        digest.update(pc.fill_null(array, nothing).to_numpy(zero_copy_only=False).tobytes())


def hash_texts(chunks: Iterable[pa.Array]) -> npt.NDArray[np.uint64]:
    """Give a hash of each text, 8 bytes, whatever its length."""
    pieces = (chunk.slice(start, _HASHED_ROWS) for chunk in chunks for start in range(0, len(chunk), _HASHED_ROWS))
    hashes = [hash_array(piece.to_numpy(zero_copy_only=False), categorize=False) for piece in pieces]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def doubles(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Give the ids that occur more than once, by sorted hashes: a table of all ids is made only where two are equal."""
    every = np.sort(hash_texts(ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]))
    if not (every[1:] == every[:-1]).any():
        return ids[:0]
    counts = pc.value_counts(ids)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))
