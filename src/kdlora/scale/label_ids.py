"""Ids that occur twice among any number of rows, found in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdlora.errors import DataError

_BATCH_ROWS = 65536
MOST_HASHES = 1 << 22
"""Hashes in memory at a time, 8 bytes each; more rows take more passes over the ids."""


def refuse_double_ids(files: Sequence[Path], most_hashes: int = MOST_HASHES) -> None:
    """Refuse a collection in which an id occurs twice: logits could not be attached to the right row.

    Args:
        files: Parquet files with a column `id`.
        most_hashes: hashes in memory at a time.

    Raises:
        DataError: it does; the message names one.
    """
    rows = sum(int(pq.ParquetFile(file).metadata.num_rows) for file in files)
    parts = -(-max(1, rows) // most_hashes)
    for part in range(parts):
        found = [hashes[hashes % parts == part] for _, hashes in _hashed(files)]
        hashes = np.concatenate(found) if found else np.zeros(0, np.uint64)
        values, counts = np.unique(hashes, return_counts=True)
        suspects = values[counts > 1]
        if len(suspects):
            _refuse_if_equal(files, set(suspects[:1000].tolist()))


def _refuse_if_equal(files: Sequence[Path], suspects: set[int]) -> None:
    """Look at the ids themselves, since two of them may share a hash."""
    seen: dict[str, Path] = {}
    wanted = np.array(sorted(suspects), np.uint64)
    for file, ids, hashes in ((file, ids, hashes) for (file, ids), hashes in _hashed(files)):
        for position in np.flatnonzero(np.isin(hashes, wanted)):
            name = ids[int(position)].as_py()
            if name in seen:
                raise DataError(
                    f"the id {name!r} occurs more than once ({seen[name].name}, {file.name}); ids must be unique over "
                    "the whole collection. Make them so, or name another column with --id-column and another folder "
                    "with --to"
                )
            seen[name] = file


def _hashed(files: Sequence[Path]) -> Iterator[tuple[tuple[Path, pa.Array], npt.NDArray[np.uint64]]]:
    """Give the ids of each file batch by batch, with a hash of 64 bits for each."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=["id"]):
                ids = batch.column(0)
                digests = b"".join(
                    hashlib.blake2b(value, digest_size=8).digest() for value in pc.cast(ids, pa.binary()).to_pylist()
                )
                yield (file, ids), np.frombuffer(digests, dtype=np.uint64)
