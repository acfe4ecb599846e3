"""A row for an item from its content alone: ridge regression from whitened features to the rows of a trained model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crane_core.storage.matrix import blocks

_FOLDS = 5
_PENALTY = 10.0
"""Penalty of the regression, in mean eigenvalues of the features' moments."""


@dataclass(frozen=True)
class Generator:
    """A linear map from whitened features to a row of a model.

    Attributes:
        matrix: float64 [k, d].
        constant: float64 [d].
    """

    matrix: np.ndarray
    constant: np.ndarray

    def rows(self, white: Tensor) -> Tensor:
        """Return float32 [n, d] for float32 [n, k]; zero rows, items without features, stay zero."""
        found = white.double() @ torch.from_numpy(self.matrix) + torch.from_numpy(self.constant)
        return torch.where(white.any(dim=1)[:, None], found, 0.0).float()


@dataclass(frozen=True)
class _Sums:
    """Moments of pairs of features x and rows y: number, sums, and sums of products."""

    count: float
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def without(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    def fit(self) -> Generator:
        count = max(self.count, 1.0)
        mean_x, mean_y = self.x / count, self.y / count
        spread = self.xx - count * np.outer(mean_x, mean_x)
        spread += (_PENALTY * np.trace(spread) / len(spread) + 1e-9) * np.eye(len(spread))
        matrix = np.linalg.solve(spread, self.xy - count * np.outer(mean_x, mean_y))
        return Generator(matrix, mean_y - mean_x @ matrix)


def generate(white: Tensor, rows: Tensor, is_warm: np.ndarray, seed: int) -> tuple[Tensor, Generator]:
    """Return a row for every item with features, and the map for items that come later.

    A warm item is never judged by its own row: its generated row comes from a map that was fitted on four other fifths
    of the warm items.

    Args:
        white: float32 [num_items, k], rows of `Whitening`.
        rows: float32 [num_items, d], rows of the model.
        is_warm: bool [num_items], the items whose rows were learned.
        seed: of the fifths.

    Returns:
        float32 [num_items, d] and the map that all warm items were fitted on.
    """
    used = is_warm & white.any(dim=1).numpy()
    fold = np.random.default_rng(seed).integers(0, _FOLDS, len(used))
    sums = [_sums(white, rows, np.flatnonzero(used & (fold == number))) for number in range(_FOLDS)]
    total = sums[0]
    for others in sums[1:]:
        total = total + others
    generator = total.fit()
    found = generator.rows(white)
    for number, own in enumerate(sums):
        members = torch.from_numpy(np.flatnonzero(used & (fold == number)))
        found[members] = total.without(own).fit().rows(white[members])
    return found, generator


def _sums(white: Tensor, rows: Tensor, members: np.ndarray) -> _Sums:
    k, d = white.shape[1], rows.shape[1]
    found = _Sums(0.0, np.zeros(k), np.zeros(d), np.zeros((k, k)), np.zeros((k, d)))
    for block in blocks(len(members), 8 * (k + d)):
        x, y = (each[torch.from_numpy(members[block])].double().numpy() for each in (white, rows))
        found = found + _Sums(float(len(x)), x.sum(0), y.sum(0), x.T @ x, x.T @ y)
    return found
