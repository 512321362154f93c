"""Whether ids are all different, without a table of all of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_PIECE = 1 << 18
_MOST_BYTES = 4096
_WORD = 8


def are_distinct(ids: pa.Array | pa.ChunkedArray) -> bool:
    """Say whether no id occurs twice.

    Hashes of 64 bits are sorted, in 8 bytes a row where a table of all ids takes many times as much; the ids
    themselves are looked at only where two hashes are equal.
    """
    hashes = np.empty(len(ids), np.uint64)
    done = 0
    for chunk in ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]:
        for start in range(0, len(chunk), _PIECE):
            piece = chunk.slice(start, _PIECE)
            hashes[done : done + len(piece)] = _hash(piece)
            done += len(piece)
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return True
    return bool(pc.count_distinct(ids, mode="all").as_py() == len(ids))


def _hash(texts: pa.Array) -> npt.NDArray[np.uint64]:
    """Hash the length and the first 4096 bytes of each text, 8 bytes at a time; a null is an empty text."""
    binary = pc.fill_null(texts, "").cast(pa.large_binary())
    offsets = np.frombuffer(binary.buffers()[1], np.int64)[binary.offset : binary.offset + len(binary) + 1]
    lengths, starts = np.diff(offsets), offsets[:-1] - offsets[0]
    content = np.frombuffer(binary.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
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
