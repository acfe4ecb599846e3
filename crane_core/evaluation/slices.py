"""Split the test interactions by kinds of items and users."""

from __future__ import annotations

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.numerics.kmeans import cluster

_NUM_CLUSTERS = 20


def interest_entropy(rows: np.ndarray, train: ItemLists, seed: int = 0) -> np.ndarray:
    """Measure how diverse the interests of each user are: the entropy of the training items over clusters of items.

    It is at most the logarithm of the number of the user's items, so active users reach higher values.

    Args:
        rows: float32 [num_items, d], near each other for similar items.
        train: training items of each user.
        seed: seed of k-means. It makes 20 clusters; with fewer than 100 items, one per 5 items, but two at least.

    Returns:
        float64 [num_users], nats; NaN for users without a training item.
    """
    num_clusters = min(len(rows), max(2, min(_NUM_CLUSTERS, len(rows) // 5)))
    clusters = cluster(torch.from_numpy(np.asarray(rows, dtype=np.float32)), num_clusters, seed).numpy()
    user_clusters = train.users().astype(np.int64) * num_clusters + clusters[train.items]
    counts = np.bincount(user_clusters, minlength=train.num_users * num_clusters).reshape(train.num_users, num_clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = counts / counts.sum(axis=1, keepdims=True)
        entropy = -np.where(shares > 0, shares * np.log(shares), 0).sum(axis=1)
    return np.where(train.counts() > 0, entropy, np.nan)


def slices_of_test(interactions: Interactions, entropy: np.ndarray | None = None) -> dict[str, ItemLists]:
    """Split the test interactions into slices that are reported separately.

    By item: `cold_items` (no training interaction), `head_items` (the most popular fifth of the warm items) and
    `tail_items` (the other warm items). By user: `cold_users` (no training interaction), `active_users` (the most
    active quarter of the others) and `quiet_users` (the least active quarter). By `interest_entropy`, if given:
    `diverse_users` (the highest quarter) and `focused_users` (the lowest quarter).

    Args:
        interactions: training and test items.
        entropy: float64 [num_users], NaN without a training interaction; None for no slices by entropy.
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
