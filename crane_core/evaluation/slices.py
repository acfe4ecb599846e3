"""Split the test by kinds of items and users."""

from __future__ import annotations

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.numerics.kmeans import cluster

_NUM_CLUSTERS = 20


def interest_entropy(rows: np.ndarray, train: ItemLists, seed: int = 0) -> np.ndarray:
    """How diverse the interests of each user are: entropy of the user's training items over clusters of the items.

    It cannot exceed the logarithm of the number of the user's items, so active users reach higher values.

    Args:
        rows: float32 [num_items, d], close where items are alike.
        train: items of each user.
        seed: of k-means, which makes at most 20 clusters, of 5 items on average where there are few.

    Returns:
        float64 [num_users], nats; NaN for users without a training item.
    """
    num_clusters = min(len(rows), max(2, min(_NUM_CLUSTERS, len(rows) // 5)))
    clusters = cluster(torch.from_numpy(np.asarray(rows, dtype=np.float32)), num_clusters, seed).numpy()
    cells = train.users().astype(np.int64) * num_clusters + clusters[train.items]
    counts = np.bincount(cells, minlength=train.num_users * num_clusters).reshape(train.num_users, num_clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = counts / counts.sum(axis=1, keepdims=True)
        entropy = -np.where(shares > 0, shares * np.log(shares), 0).sum(axis=1)
    return np.where(train.counts() > 0, entropy, np.nan)


def slices_of_test(interactions: Interactions, entropy: np.ndarray | None = None) -> dict[str, ItemLists]:
    """Parts of the test split that are worth a look of their own.

    By item: `cold_items` (no training interaction), `head_items` (the most popular fifth of the warm catalog),
    `tail_items` (the rest of it). By user: `cold_users` (no training interaction), `active_users` (the most active
    quarter of the others) and `quiet_users` (the least active quarter). With `interest_entropy`, `diverse_users` and
    `focused_users`: the quarters of the highest and the lowest.

    Args:
        interactions: training and test items.
        entropy: float64 [num_users], NaN where there is no training interaction; None for no slices by it.
    """
    test, users = interactions.test, interactions.test.users()
    counts = interactions.item_counts()
    warm = np.sort(counts[counts > 0])[::-1]
    head = warm[max(0, -(-len(warm) // 5) - 1)] if len(warm) else 0
    item_counts, activity = counts[test.items], interactions.train.counts()
    known = activity[(activity > 0) & (test.counts() > 0)]
    low, high = np.quantile(known, [0.25, 0.75]) if len(known) else (0, 0)
    parts = {
        "cold_items": test.where(item_counts == 0),
        "head_items": test.where((item_counts >= head) & (item_counts > 0)),
        "tail_items": test.where((item_counts < head) & (item_counts > 0)),
        "cold_users": test.where(activity[users] == 0),
        "active_users": test.where(activity[users] >= max(high, 1)),
        "quiet_users": test.where((activity[users] <= low) & (activity[users] > 0)),
    }
    if entropy is not None:
        known = entropy[np.isfinite(entropy) & (test.counts() > 0)]
        low, high = np.quantile(known, [0.25, 0.75]) if len(known) else (0, 0)
        parts |= {
            "diverse_users": test.where(entropy[users] >= high),
            "focused_users": test.where(entropy[users] <= low),
        }
    return parts
