"""Standardise feature matrices and project wide ones, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crane_core.storage.matrix import blocks


def fit_standardisation(
    raw: NDArray[np.float32], present: NDArray[np.bool_], is_train: NDArray[np.bool_], kind: str
) -> dict[str, NDArray]:
    """Fit what `standardised` needs: for `zscore` the `mean` and `scale` of each column, else nothing.

    Args:
        raw: float32 [num_items, dim].
        present: bool [num_items], rows that hold features.
        is_train: bool [num_items], items with training interactions; only these are used.
        kind: `features.standardise`.

    Returns:
        `mean` and `scale`, float64 [dim]; the scale of a constant column is 1.
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


def fit_projection(
    rows: Iterable[tuple[slice, NDArray[np.float64]]], used: NDArray[np.bool_], width: int, kind: str
) -> dict[str, NDArray]:
    """Fit the principal axes of some rows.

    Args:
        rows: blocks of rows of one width, from `standardised`.
        used: bool [num_items], the rows that are used.
        width: number of axes, at most the width of the rows.
        kind: `features.projection`.

    Returns:
        `axes`, float64 [width, dim], by falling variance, with the largest entry of each axis positive; `centre`,
        float64 [dim], zero for `svd`; `explained`, the share of the variance (for `svd` of the squared norm) that the
        axes keep.
    """
    products: Any = 0.0
    total: Any = 0.0
    count = 0
    for block, values in rows:
        chosen = values[used[block]]
        products = products + chosen.T @ chosen
        total = total + chosen.sum(axis=0)
        count += len(chosen)
    moments = products / max(1, count)
    centre = total / max(1, count)
    if kind == "pca":
        moments = moments - np.outer(centre, centre)
    else:
        centre = np.zeros_like(centre)
    variances, axes = np.linalg.eigh(moments)
    order = np.argsort(variances)[::-1][:width]
    chosen_axes = axes[:, order].T
    largest = np.abs(chosen_axes).argmax(axis=1)
    chosen_axes *= np.where(chosen_axes[np.arange(width), largest] < 0, -1, 1)[:, None]
    kept = np.maximum(variances, 0)
    return {"axes": chosen_axes, "centre": centre, "explained": np.array(kept[order].sum() / max(kept.sum(), 1e-300))}


def projected(
    rows: Iterable[tuple[slice, NDArray[np.float64]]], present: NDArray[np.bool_], fitted: dict[str, NDArray]
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield blocks of rows projected on the axes of `fit_projection`; rows without features are zero."""
    for block, values in rows:
        narrow = (values - fitted["centre"]) @ fitted["axes"].T
        narrow[~present[block]] = 0
        yield block, narrow
