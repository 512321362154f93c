"""A hash of columns of a data set, whatever files and chunks they are stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

_ROWS = 100_000


def hash_columns(dataset: Dataset, columns: Sequence[str]) -> str:
    """Give the SHA-256 of some columns, row by row; how the rows are stored in chunks does not count."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    for column in columns:
        digest.update(f"\n{column} {column in dataset.column_names}\n".encode())
        if column in dataset.column_names:
            for array in _column_arrays(dataset, column):
                _update(digest, array)
    return digest.hexdigest()


def _column_arrays(dataset: Dataset, column: str) -> Iterator[pa.Array]:
    """Yield a column in equal pieces, so that the same rows give the same pieces."""
    table = dataset.select_columns([column]).with_format("arrow")
    for batch in table.iter(batch_size=_ROWS):
        yield from _joined(batch.column(0).chunks)


def _joined(chunks: Sequence[pa.Array]) -> Iterable[pa.Array]:
    return [pa.concat_arrays(chunks)] if chunks else []


def _update(digest: Any, array: pa.Array) -> None:
    """Feed lengths and values of an array to the hash; nulls count as such."""
    digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(pc.fill_null(pc.list_value_length(array), -1).cast(pa.int64()).to_numpy().tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_fixed_size_list(array.type):
        digest.update(str(array.type.list_size).encode())
        _update(digest, array.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        text = pc.fill_null(array, "").cast(pa.large_binary())
        digest.update(pc.binary_length(text).to_numpy().tobytes())
        offsets = np.frombuffer(text.buffers()[1], dtype=np.int64)[text.offset : text.offset + len(text) + 1]
        if len(text):
            digest.update(memoryview(text.buffers()[2])[offsets[0] : offsets[-1]])
    elif not pa.types.is_null(array.type):
        nothing = False if pa.types.is_boolean(array.type) else 0
        digest.update(pc.fill_null(array, nothing).to_numpy(zero_copy_only=False).tobytes())
