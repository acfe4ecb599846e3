"""Baselines for learned models: popularity, item kNN over interactions, and similarity of content.

Each is a `Scorer` that is computed from the training interactions in one pass, without epochs or random numbers. BPR-MF
is not here, since it is `LightGCN` with `num_layers=0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from crane_core.dataset.interactions import Interactions
from crane_core.dataset.modalities import Modality
from crane_core.evaluation.ranking import Scorer, dot_product

BLOCK_ENTRIES = 4_000_000
"""Co-occurrence counts that are held at a time, unless a single item has more."""


def popularity(interactions: Interactions) -> Scorer:
    """Score the items by training interactions, the same for every user; equal ones by row number.

    Args:
        interactions: with fewer than 2**24 items, so that a position in the list is exact in float32.
    """
    counts = interactions.item_counts()
    positions = np.empty(len(counts), dtype=np.float32)
    positions[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    scores = torch.from_numpy(-positions)

    def score(users: np.ndarray) -> torch.Tensor:
        return scores.repeat(len(users), 1)

    return score


def popular_for_strangers(score: Scorer, interactions: Interactions) -> Scorer:
    """Score by popularity for users without training items, as a served model does; by `score` for the others."""
    is_stranger = interactions.train.counts() == 0
    if not is_stranger.any():
        return score
    popular = popularity(interactions)

    def shown(users: np.ndarray) -> torch.Tensor:
        scores = score(users)
        strangers = np.flatnonzero(is_stranger[users])
        if len(strangers):
            scores[torch.from_numpy(strangers)] = popular(users[strangers]).to(scores.device)
        return scores

    return shown


def item_knn(interactions: Interactions, num_neighbours: int = 100, shrinkage: float = 10.0) -> Scorer:
    """Score an item by the sum of its similarities to the user's training items that are among its neighbours.

    Sarwar et al., WWW 2001, section 3, without ratings: `s_ij = n_ij / (sqrt(n_i n_j) + shrinkage)` where `n_ij` users
    have both items. At shrinkage 0 this is the cosine of binary user columns. The neighbours of an item are the
    `num_neighbours` most similar other items, equal ones by row number. An item without users scores 0.

    Args:
        interactions: the training part is used. Time grows with the sum of the squared list lengths.
        num_neighbours: neighbours per item, >= 1.
        shrinkage: number of interactions, >= 0; reduces similarities that rest on few users.
    """
    train = interactions.train
    history = sp.csr_array(
        (np.ones(len(train.items), dtype=np.float32), train.items, train.indptr),
        shape=(train.num_users, interactions.num_items),
    )
    similarity = sp.vstack(list(_neighbours(history, num_neighbours, shrinkage)), format="csr").T.tocsr()

    def score(users: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((history[users] @ similarity).toarray())

    return score


def content(modalities: Sequence[Modality]) -> Scorer:
    """Score by the cosine between the user's profile and the item, with the features of all modalities concatenated.

    The weight of a modality is the length of its rows: equal under `features.standardise=l2`, growing with the width
    under `zscore`. A user or an item without any features scores 0.

    Args:
        modalities: at least one. Profiles of sums and of means give the same ranking if no feature is missing.
    """
    users, items = (
        F.normalize(torch.from_numpy(np.hstack(blocks)), dim=1)
        for blocks in ([m.profiles for m in modalities], [m.items for m in modalities])
    )
    return dot_product(users, items)


def _neighbours(history: sp.csr_array, num_neighbours: int, shrinkage: float) -> Iterator[sp.csr_array]:
    """Yield the rows of the similarity matrix, reduced to their largest entries, a block of items at a time.

    Args:
        history: float32 [num_users, num_items], 1 where the user has the item.
        num_neighbours, shrinkage: see `item_knn`.

    Yields:
        float32 CSR [block, num_items].
    """
    num_items = history.shape[1]
    columns = history.T.tocsr()
    counts = np.diff(columns.indptr)
    # Bound on the items that co-occur with an item: the total length of the lists that contain it.
    widths = np.minimum(columns @ np.diff(history.indptr), num_items)
    blocks = np.cumsum(widths) // BLOCK_ENTRIES
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], num_items), strict=True):
        overlap = (columns[start:stop] @ history).tocoo()
        rows, items = overlap.row, overlap.col
        others = rows + start != items
        rows, items, values = rows[others], items[others], overlap.data[others]
        values = values / (np.sqrt(counts[rows + start] * counts[items]) + shrinkage)
        order = np.lexsort((items, -values, rows))
        rows, items, values = rows[order], items[order], values[order].astype(np.float32)
        firsts = np.searchsorted(rows, np.arange(stop - start))
        kept = np.arange(len(rows)) - firsts[rows] < num_neighbours
        yield sp.csr_array((values[kept], (rows[kept], items[kept])), shape=(stop - start, num_items))
