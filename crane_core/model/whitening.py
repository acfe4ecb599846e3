"""Softly whitened content: the features of all modalities as one row, in which no few axes dominate.

Every modality is centred and scaled to rows of mean squared length 1, so that wide ones do not outweigh narrow ones.
Side by side, they are turned to the principal axes of the warm items, and each axis is divided by the root of its
variance and a share of the mean variance. Rows have length 1; an item without any modality has a zero row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crane_core.storage.matrix import blocks

_SOFTNESS = 0.3
"""Share of the mean variance that is added to the variance of each axis; noisy axes are then not blown up."""

Features = tuple[np.ndarray, np.ndarray]
"""One modality: features float [num_items, dim], and whether an item has them, bool [num_items]."""


@dataclass(frozen=True)
class Whitening:
    """A linear map from the features of all modalities to a row.

    Attributes:
        means: of each modality, float64 [dim].
        scales: of each modality, what its centred rows are divided by.
        axes: float64 [sum of the widths, k].
    """

    means: tuple[np.ndarray, ...]
    scales: tuple[float, ...]
    axes: np.ndarray

    def rows(self, modalities: Sequence[Features]) -> Tensor:
        """Return the rows of items: float32 [num_items, k], of length 1, or 0 where every modality is missing.

        Args:
            modalities: the same ones in the same order as at the fit, of these or other items.
        """
        found = np.zeros((len(modalities[0][0]), self.axes.shape[1]), dtype=np.float32)
        for block in blocks(len(found), 8 * sum(self.axes.shape)):
            rows = _side_by_side(modalities, self.means, self.scales, block) @ self.axes
            found[block] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return torch.from_numpy(found)


def fit_whitening(modalities: Sequence[Features], is_warm: np.ndarray, most_axes: int) -> Whitening | None:
    """Fit the map on the warm items, in bounded memory.

    Args:
        modalities: at least one.
        is_warm: bool [num_items], the items that are used.
        most_axes: number of axes at most.

    Returns:
        None where no warm item has features, or all have the same.
    """
    means, scales = [], []
    for items, present in modalities:
        mean, variance = _moments(items, present & is_warm)
        means.append(mean)
        # Features that are the same for all items say nothing; rounding must not be blown up.
        scales.append(variance**0.5 if variance > 1e-12 * max(1.0, float(mean @ mean)) else 1.0)
    width = sum(map(len, means))
    moments = np.zeros((width, width))
    for block in blocks(len(is_warm), 8 * width):
        rows = _side_by_side(modalities, means, scales, block)[is_warm[block]]
        moments += rows.T @ rows
    variances, axes = np.linalg.eigh(moments / max(int(is_warm.sum()), 1))
    largest = np.argsort(-variances)[:most_axes]
    variances, axes = variances[largest], axes[:, largest]
    kept = variances > 1e-9
    if not kept.any():
        return None
    variances, axes = variances[kept], axes[:, kept]
    return Whitening(tuple(means), tuple(scales), axes / np.sqrt(variances + _SOFTNESS * variances.mean()))


def _moments(items: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean of the used rows, float64 [dim], and the mean squared distance from it."""
    total, squares, count = np.zeros(items.shape[1]), 0.0, max(int(used.sum()), 1)
    cuts = list(blocks(len(items), 8 * items.shape[1]))
    for block in cuts:
        total += items[block][used[block]].sum(axis=0, dtype=np.float64)
    mean = total / count
    for block in cuts:
        squares += float(((items[block][used[block]] - mean) ** 2).sum())
    return mean, squares / count


def _side_by_side(
    modalities: Sequence[Features], means: Sequence[np.ndarray], scales: Sequence[float], block: slice
) -> np.ndarray:
    """Return the centred and scaled features of a block of items, float64; a missing modality counts as the mean."""
    parts = [
        np.where(present[block][:, None], (items[block] - mean) / scale, 0.0)
        for (items, present), mean, scale in zip(modalities, means, scales, strict=True)
    ]
    return np.concatenate(parts, axis=1)
