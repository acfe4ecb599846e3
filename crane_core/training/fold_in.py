"""Make a fold-in for rows of any model: what a history makes of a user, fitted to the users that the model knows.

The sum over the history is one step of the model's own propagation over the rows of known items,
`p_u = sum_i w_ui z_i / sqrt(d_u d_i)`. What propagation alone cannot tell is fitted: a linear map from `p_u` to the
user's trained row (what a user's own embedding and a gate add on average), then for every item a correction, which
counts little for items that few users have met.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from crane_core.dataset.interactions import Interactions
from crane_core.model.fold_in import Block, FoldIn
from crane_core.model.views import Rows
from crane_core.numerics.ridge import ridge, sparse_ridge

_MOST_USERS = 200_000
"""Users that the fit reads at most: more of them change a map of some thousand numbers little."""
_MAP_PENALTY = 1e-3
_ITEM_PENALTY = 1.0
"""Squared length of a correction against the squared error: an item met once keeps about half of its correction."""
_ITERATIONS = 10


def fit_fold_in(model: Rows, interactions: Interactions, seed: int = 0) -> FoldIn:
    """Return a fold-in that nearly gives the users' rows of a model from their training interactions.

    Args:
        model: users float32 [num_users, d] and items float32 [num_items, d]; the rows of users with training
            interactions are fitted.
        interactions: training interactions and their weights.
        seed: of the sample of users, where there are many.
    """
    users, items = (rows.detach().numpy() for rows in model)
    known = np.flatnonzero(interactions.train.counts() > 0)
    if len(known) > _MOST_USERS:
        known = np.sort(np.random.default_rng(seed).choice(known, _MOST_USERS, replace=False))
    propagated = items / np.sqrt(_degrees(interactions))[:, None].astype(np.float32)
    histories = _histories(interactions)[known]
    sums, targets = histories @ propagated, users[known]
    centre, mean = sums.mean(0), targets.mean(0)
    onto = ridge(sums - centre, targets - mean, _MAP_PENALTY).astype(np.float32)
    constant = mean - centre @ onto
    rows = propagated @ onto
    rows += sparse_ridge(histories, targets - constant - histories @ rows, _ITEM_PENALTY, _ITERATIONS)
    return FoldIn(rows, constant, (Block(rows.shape[1], None, 0.5),))


def _degrees(interactions: Interactions) -> np.ndarray:
    """Return the summed weights of each item, float64 [num_items]; a cold item has the smallest of a warm one."""
    degrees = interactions.popularity()
    return np.where(degrees > 0, degrees, degrees[degrees > 0].min(initial=np.inf))


def _histories(interactions: Interactions) -> sp.csr_array:
    """Return `w_ui / sqrt(d_u)` of the training interactions: float32 CSR [num_users, num_items]."""
    train, weights = interactions.train, interactions.decayed(None)
    users = train.users()
    degrees = np.bincount(users, weights=weights, minlength=train.num_users)
    values = (weights / np.sqrt(degrees[users])).astype(np.float32)
    return sp.csr_array((values, train.items, train.indptr), shape=(train.num_users, interactions.num_items))
