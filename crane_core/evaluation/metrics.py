"""Recall, NDCG, coverage and popularity bias of ranked lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crane_core.dataset.interactions import ItemLists


def user_metrics(
    ranked: np.ndarray, relevant: ItemLists, users: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Compute recall and NDCG of each user.

    `recall@k` is the share of the user's held-out items in the top k. `ndcg@k` has gain 1 and discount
    `1 / log2(rank + 1)`, and is divided by that of the best list of `min(k, held-out items)`.

    Args:
        ranked: int32 [n, >= max(ks)], items by falling score, -1 for no item.
        relevant: held-out items; every user of `users` has at least one.
        users: int [n].
        ks: cut-offs.

    Returns:
        `recall@k` and `ndcg@k`, each float64 [n].
    """
    rows, items = relevant.rows(users)
    stride = int(max(ranked.max(initial=0), items.max(initial=0))) + 2
    hits = np.isin(np.arange(len(users))[:, None] * stride + ranked, rows * stride + items) & (ranked >= 0)
    counts = np.bincount(rows, minlength=len(users))
    discounts = 1.0 / np.log2(np.arange(2, ranked.shape[1] + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    metrics = {}
    for k in ks:
        metrics[f"recall@{k}"] = hits[:, :k].sum(1) / counts
        metrics[f"ndcg@{k}"] = (hits[:, :k] * discounts[:k]).sum(1) / ideal[np.minimum(counts, min(k, len(discounts)))]
    return metrics


def coverage(ranked: np.ndarray, num_items: int, k: int = 20) -> float:
    """Return the share of the catalog that appears in at least one top-k list."""
    top = ranked[:, :k]
    return len(np.unique(top[top >= 0])) / num_items


def popularity_bias(ranked: np.ndarray, users: np.ndarray, train: ItemLists, num_items: int, k: int = 20) -> float:
    """Compare the popularity of recommended items with that of the items their users chose.

    The result is a ratio of two means over users: the training interactions of the items in the top k, and of the items
    in the user's training list. Above 1, the model favours popular items.
    """
    counts = np.bincount(train.items, minlength=num_items)
    rows, items = train.rows(users)
    lengths = np.bincount(rows, minlength=len(users))
    known = lengths > 0
    own = np.bincount(rows, weights=counts[items], minlength=len(users))[known] / lengths[known]
    top = ranked[:, :k]
    recommended = np.where(top >= 0, counts[top], 0).sum(1) / np.maximum((top >= 0).sum(1), 1)
    return float(recommended.mean() / own.mean()) if known.any() and own.mean() > 0 else float("nan")
