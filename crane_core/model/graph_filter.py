"""A linear low-pass filter of the user-item graph: what users met lately, carried over to similar items.

The axes are the leading singular vectors of the normalised matrix of users and items, the ideal low-pass filter of
GF-CF (Shen et al., CIKM 2021). A user's row is a sum over the history, so nothing of a user is learned: a history of
any length and age has a row. Degrees are enlarged by a constant. Otherwise a user and an item that met each other alone
would be an axis of their own.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.model.views import Rows

_SHRINKAGE = 10
"""Interactions added to every degree."""
_OVERSAMPLING = 16
_ITERATIONS = 4


def item_axes(interactions: Interactions, dim: int, seed: int) -> Tensor:
    """Return the leading right singular vectors of `D_u^-1/2 R D_i^-1/2`, where R marks the training interactions.

    By randomised subspace iteration (Halko, Martinsson and Tropp, 2011). A cold item has a zero row.

    Args:
        interactions: training interactions, without decay: the axes are what items have in common at all times.
        dim: number of axes; at most as many as there are users and items.
        seed: of the start.

    Returns:
        float32 [num_items, dim].
    """
    train = interactions.train
    left = np.repeat((train.counts() + _SHRINKAGE) ** -0.5, train.counts())
    matrix = _history(interactions, left / _roots(interactions)[train.items])
    transposed = matrix.T.tocsr()
    width = min(dim + _OVERSAMPLING, *matrix.shape)
    basis = np.random.default_rng(seed).standard_normal((interactions.num_items, width)).astype(np.float32)
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(transposed @ (matrix @ basis))[0]
    small = matrix @ basis
    _, vectors = np.linalg.eigh(small.T.astype(np.float64) @ small)
    axes = (basis @ vectors[:, ::-1][:, :dim]).astype(np.float32)
    return torch.from_numpy(axes)


def filtered(axes: Tensor, interactions: Interactions, half_life: float | None) -> Rows:
    """Return an item's row, its axes over the root of its degree, and a user's, the sum over what the user met.

    Popular items get short rows: how popular an item is, the score says elsewhere.

    Args:
        axes: float32 [num_items, d].
        interactions: training interactions with their weights and ages.
        half_life: days in which an interaction of the user loses half of its weight; None for no decay.

    Returns:
        users float32 [num_users, d] and items float32 [num_items, d].
    """
    items = axes / torch.from_numpy(_roots(interactions)).float()[:, None]
    history = _history(interactions, interactions.decayed(half_life))
    return torch.from_numpy(history @ items.numpy()), items


def _roots(interactions: Interactions) -> np.ndarray:
    return (interactions.item_counts() + _SHRINKAGE) ** 0.5


def _history(interactions: Interactions, values: np.ndarray) -> sp.csr_array:
    train = interactions.train
    shape = train.num_users, interactions.num_items
    return sp.csr_array((values.astype(np.float32), train.items, train.indptr), shape=shape)
