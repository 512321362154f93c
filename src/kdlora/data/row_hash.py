"""Hashes of rows, whatever files and chunks they are stored in: of whole columns, and to see whether ids differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

_ROWS = 100_000
_PIECE = 1 << 18
_MOST_BYTES = 4096
_WORD = 8


def hash_columns(dataset: Dataset, columns: Sequence[str]) -> str:
    """Give the SHA-256 of some columns, row by row; how the rows are stored in chunks does not count."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    for column in columns:
        digest.update(f"\n{column} {column in dataset.column_names}\n".encode())
        if column in dataset.column_names:
            for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS):
                if batch.column(0).num_chunks:
                    _update(digest, pa.concat_arrays(batch.column(0).chunks))
    return digest.hexdigest()


def _update(digest: Any, array: pa.Array) -> None:
    """Feed lengths and values of an array to the hash; nulls count as such."""
    digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(pc.fill_null(pc.list_value_length(array), -1).cast(pa.int64()).to_numpy().tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_fixed_size_list(kind):
        digest.update(str(kind.list_size).encode())
        _update(digest, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        offsets, content = _bytes_of(array)
        digest.update(np.diff(offsets).tobytes())
        digest.update(content)
    elif not pa.types.is_null(kind):
        nothing = False if pa.types.is_boolean(kind) else 0
        digest.update(pc.fill_null(array, nothing).to_numpy(zero_copy_only=False).tobytes())


def _bytes_of(texts: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Give where each text begins, and where the last one ends, in the bytes of all; a null is an empty text."""
    binary = pc.fill_null(texts, "").cast(pa.large_binary())
    offsets = np.frombuffer(binary.buffers()[1] or bytes(_WORD), np.int64)
    offsets = offsets[binary.offset : binary.offset + len(binary) + 1]
    content = np.frombuffer(binary.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], content


def are_distinct(ids: pa.Array | pa.ChunkedArray) -> bool:
    """Say whether no id occurs twice.

    Hashes of 64 bits are sorted, in 8 bytes a row where a table of all ids takes many times as much; the ids
    themselves are looked at only where two hashes are equal.
    """
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    pieces = [chunk.slice(start, _PIECE) for chunk in chunks for start in range(0, len(chunk), _PIECE)]
    hashes = np.concatenate([np.empty(0, np.uint64), *map(_hash_each, pieces)])
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return True
    return bool(pc.count_distinct(ids, mode="all").as_py() == len(ids))


def _hash_each(texts: pa.Array) -> npt.NDArray[np.uint64]:
    """Hash the length and the first 4096 bytes of each text, 8 bytes at a time."""
    offsets, content = _bytes_of(texts)
    lengths, starts = np.diff(offsets), offsets[:-1]
    padded = np.concatenate([content, np.zeros(_WORD, np.uint8)])
    words: npt.NDArray[np.uint64] = np.ndarray(len(padded) - _WORD + 1, "<u8", padded, strides=(1,))
    kept = np.array([(1 << 8 * count) - 1 for count in range(_WORD + 1)], np.uint64)
    mixed = _mix(lengths.astype(np.uint64))
    for place in range(0, min(_MOST_BYTES, int(lengths.max(initial=0))), _WORD):
        rows = np.flatnonzero(lengths > place)
        bytes_left = np.minimum(lengths[rows] - place, _WORD)
        mixed[rows] = _mix(mixed[rows] ^ (words[starts[rows] + place] & kept[bytes_left]))
    return mixed


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Let every bit change every other one.

    *Source*: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with a constant added first, since it
    leaves 0 as it is.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
