"""Standardise feature matrices in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from crane_core.matrix import blocks


def fit_standardisation(
    raw: NDArray[np.float32], present: NDArray[np.bool_], is_train: NDArray[np.bool_], kind: str
) -> dict[str, NDArray]:
    """What standardising needs to know: for `zscore` float64 [dim] `mean` and `scale` (1 for constant columns).

    Args:
        raw: float32 [num_items, dim].
        present: bool [num_items], rows that hold features.
        is_train: bool [num_items], items with training interactions; only these are fitted on.
        kind: `features.standardise`.
    """
    if kind != "zscore":
        return {}
    used = present & is_train
    dim, count = raw.shape[1], max(1, int(used.sum()))
    cuts = list(blocks(len(raw), dim * 8))
    total = np.zeros(dim)
    for block in cuts:
        total += raw[block][used[block]].astype(np.float64).sum(axis=0)
    mean = total / count
    squares = np.zeros(dim)
    for block in cuts:
        squares += ((raw[block][used[block]] - mean) ** 2).sum(axis=0)
    scale = np.sqrt(squares / count)
    return {"mean": mean, "scale": np.where(scale > 1e-12 * np.maximum(1, np.abs(mean)), scale, 1)}


def standardised(
    raw: NDArray[np.float32], present: NDArray[np.bool_], kind: str, fitted: dict[str, NDArray]
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield blocks of standardised rows; rows without features are zero.

    Args:
        raw, present: as for `fit_standardisation`.
        kind: `zscore` per column, `l2` per row, `none`.
        fitted: from `fit_standardisation`.
    """
    for block in blocks(len(raw), raw.shape[1] * 8):
        rows = raw[block].astype(np.float64)
        if kind == "zscore":
            rows = (rows - fitted["mean"]) / fitted["scale"]
        elif kind == "l2":
            norms = np.sqrt((rows**2).sum(axis=1, keepdims=True))
            rows = rows / np.where(norms > 0, norms, 1)
        rows[~present[block]] = 0
        yield block, rows
