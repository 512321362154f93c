"""Split a validation part off the training rows, reproducibly, and check that it can be scored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def split_rows(
    rows: int, fraction: float, seed: int, classes: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw the rows of a validation split.

    With classes, each gives its share (largest remainders first); a class with two rows or more is in both parts,
    a class with a single row stays in training, and nobody makes up for it.
    """
    draw = np.random.default_rng(seed)
    total = min(rows - 1, max(1, round(rows * fraction)))
    if classes is None:
        chosen = draw.permutation(rows)[:total]
    else:
        names, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
        shares = _shares(counts, total, fraction)
        by_class = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
        parts = [draw.permutation(by_class[index])[: shares[index]] for index in range(len(names))]
        chosen = np.concatenate(parts)
    in_validation = np.zeros(rows, dtype=bool)
    in_validation[chosen] = True
    return np.flatnonzero(~in_validation), np.flatnonzero(in_validation)


def _shares(counts: npt.NDArray[np.int64], total: int, fraction: float) -> npt.NDArray[np.int64]:
    """Divide `total` validation rows among classes of these sizes."""
    exact = counts * fraction
    least, most = np.minimum(1, counts - 1), np.minimum(np.maximum(1, np.ceil(exact)), counts - 1)
    shares = np.clip(np.floor(exact), least, most).astype(np.int64)
    for index in np.argsort(shares - exact, kind="stable"):  # largest remainder first
        if shares.sum() >= total:
            break
        shares[index] += shares[index] < most[index]
    return shares
