"""What a learned model has to beat: popularity, item kNN over interactions, and the nearest content.

Each is a `Scorer` made from the training interactions in one pass, without an epoch or a random number. BPR-MF needs no
code of its own: it is `LightGCN` with `num_layers=0`.
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

_BLOCK_ENTRIES = 4_000_000
"""Co-occurrence counts held at once while neighbours are sought, a single item's excepted."""


def popularity(interactions: Interactions) -> Scorer:
    """The same list for everyone: items by falling number of training interactions, equal ones by row number.

    Args:
        interactions: with fewer than 2**24 items, so that a place in the list is exact in float32.
    """
    counts = interactions.item_counts()
    places = np.empty(len(counts), dtype=np.float32)
    places[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    scores = torch.from_numpy(-places)

    def score(users: np.ndarray) -> torch.Tensor:
        return scores.repeat(len(users), 1)

    return score


def popular_for_strangers(score: Scorer, interactions: Interactions) -> Scorer:
    """The same scores, but what is popular for users without training items: a served model does not know them."""
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
    """An item's similarity to those of the user's training items that are among its neighbours, summed.

    Sarwar et al., WWW 2001, section 3, without ratings: `s_ij = n_ij / (sqrt(n_i n_j) + shrinkage)` where `n_ij` users
    met both items, the cosine of binary user columns at shrinkage 0. An item's neighbours are the `num_neighbours`
    most similar other items, equal ones by row number. An item nobody met scores 0.

    Args:
        interactions: of which the training part is used. Time grows with the sum of the squared list lengths.
        num_neighbours: kept per item, >= 1.
        shrinkage: >= 0, in interactions; damps similarities that few users vouch for.
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
    """Cosine of the user's profile to the items, the features of all modalities side by side.

    A modality counts as much as its rows are long: equally under `features.standardise=l2`, by its width under
    `zscore`. A user or an item without any features scores 0 everywhere.

    Args:
        modalities: at least one; sums and means of features give the same ranking where no feature is missing.
    """
    users, items = (
        F.normalize(torch.from_numpy(np.hstack(blocks)), dim=1)
        for blocks in ([m.profiles for m in modalities], [m.items for m in modalities])
    )
    return dot_product(users, items)


def _neighbours(history: sp.csr_array, num_neighbours: int, shrinkage: float) -> Iterator[sp.csr_array]:
    """Rows of the similarity matrix, a block of items at a time, each reduced to its largest entries.

    Args:
        history: float32 [num_users, num_items], 1 where the user met the item.
        num_neighbours, shrinkage: see `item_knn`.

    Yields:
        float32 CSR [block, num_items].
    """
    num_items = history.shape[1]
    columns = history.T.tocsr()
    counts = np.diff(columns.indptr)
    # An item co-occurs with at most as many others as the lists it is in are long together.
    widths = np.minimum(columns @ np.diff(history.indptr), num_items)
    blocks = np.cumsum(widths) // _BLOCK_ENTRIES
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
