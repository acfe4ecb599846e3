"""Baselines for learned models: popularity, recent popularity, item kNN over interactions, similarity of content.

Each is a `Scorer` that is computed from the training interactions in one pass, without epochs or random numbers. BPR-MF
is not here, since it is `LightGCN` with `num_layers=0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import Scorer, dot_product

BLOCK_ENTRIES = 4_000_000
"""Co-occurrence counts that are held at a time, unless a single item has more."""


def popularity(interactions: Interactions) -> Scorer:
    """Score the items by training interactions, the same for every user; equal ones by row number.

    Args:
        interactions: with fewer than 2**24 items, so that a position in the list is exact in float32.
    """
    return _by_order(falling(interactions.popularity()))


def recent_popularity(interactions: Interactions, half_life: float | None, factors: np.ndarray | float = 1.0) -> Scorer:
    """Score the items by training interactions that lose half of their weight every `half_life` days; None: by all.

    Args:
        factors: float [num_items], what the popularity of each item is multiplied by.
    """
    return _by_order(falling(interactions.popularity(half_life) * factors))


def falling(counts: np.ndarray) -> np.ndarray:
    """Return the items by falling counts, int64 [num_items]; equal ones by row number."""
    return np.argsort(-counts, kind="stable")


def _by_order(order: np.ndarray) -> Scorer:
    positions = np.empty(len(order), dtype=np.float32)
    positions[order] = np.arange(len(order))
    scores = torch.from_numpy(-positions)

    def score(users: np.ndarray) -> torch.Tensor:
        return scores.repeat(len(users), 1)

    return score


def choose_half_life(interactions: Interactions, half_lives: Sequence[float | None]) -> float | None:
    """Return the half-life of popularity by which the validation items are found best.

    The measure is Recall@20 of the popular items that the user has not met, then NDCG@20; of equal half-lives the last
    is taken. Without times there is no decay.

    Args:
        interactions: training items are counted and masked, validation items are looked for.
        half_lives: days, to choose from; None is no decay.
    """
    users = np.flatnonzero(interactions.validation.counts() > 0)
    if interactions.ages is None or len(users) == 0:
        return None

    def quality(half_life: float | None) -> tuple[float, float]:
        order = popular_items(interactions, interactions.popularity(half_life))
        ranked = first_unseen(order, interactions.train, users, 20)
        metrics = user_metrics(ranked, interactions.validation, users, (20,))
        return float(metrics["recall@20"].mean()), float(metrics["ndcg@20"].mean())

    return max(reversed(half_lives), key=quality)


def popular_items(interactions: Interactions, counts: np.ndarray) -> np.ndarray:
    """Return the items but for tombstones by falling counts, int64; equal ones by row number."""
    shown = np.setdiff1d(np.arange(interactions.num_items), interactions.tombstones)
    return shown[falling(counts[shown])]


def first_unseen(order: np.ndarray, seen: ItemLists, users: np.ndarray, k: int) -> np.ndarray:
    """Return the first k items of one order that each user has not met: int32 [n, k], -1 where fewer are left.

    Args:
        order: int [m], distinct items.
        seen: items that a user has met.
        users: int [n].
        k: list length.
    """
    ranked = np.full((len(users), k), -1, dtype=np.int32)
    found = np.zeros(len(users), dtype=np.int64)
    for start in range(0, len(order), 2 * k):
        open_rows = np.flatnonzero(found < k)
        if not len(open_rows):
            break
        items = order[start : start + 2 * k]
        pairs = np.repeat(users[open_rows], len(items)), np.tile(items, len(open_rows))
        is_new = ~seen.holds(*pairs).reshape(len(open_rows), len(items))
        places = found[open_rows, None] + np.cumsum(is_new, axis=1) - 1
        rows, columns = np.nonzero(is_new & (places < k))
        ranked[open_rows[rows], places[rows, columns]] = items[columns]
        found[open_rows] += is_new.sum(axis=1)
    return ranked


def popular_for_strangers(
    score: Scorer, interactions: Interactions, half_life: float | None, factors: np.ndarray | float = 1.0
) -> Scorer:
    """Score users without training items by `recent_popularity`, as a served model does; the others by `score`."""
    is_stranger = interactions.train.counts() == 0
    if not is_stranger.any():
        return score
    popular = recent_popularity(interactions, half_life, factors)

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
