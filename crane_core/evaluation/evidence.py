"""Items by the evidence there is of them: their number of training interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crane_core.dataset.interactions import Interactions

EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""Smallest number of training interactions in each bucket; the first one holds the cold items."""


def buckets_of(interactions: Interactions, edges: Sequence[int]) -> np.ndarray:
    """Return the bucket of every item, int64 [num_items]."""
    return np.searchsorted(np.asarray(edges), interactions.item_counts(), side="right") - 1


def summarise_evidence(
    interactions: Interactions, users: np.ndarray, ranked: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Compare what models find and show by the evidence of the items.

    Args:
        interactions: training and test items.
        users: int [n], the users that were ranked for.
        ranked: model to int [n, k] items, -1 where fewer are left; the first 20 count.

    Returns:
        JSON values, one number for each bucket: `edges`; `items`, but for tombstones; `rows`, test interactions of
        these users; `models`, each with `found`, the share of those rows that is in the list, None without rows, and
        `share` of the places in the lists.
    """
    buckets, size = buckets_of(interactions, EDGES), len(EDGES)
    shown = np.setdiff1d(np.arange(interactions.num_items), interactions.tombstones)
    positions, items = interactions.test.rows(users)
    rows = np.bincount(buckets[items], minlength=size)
    models = {}
    for name, lists in ranked.items():
        lists = lists[:, :20]
        is_found = (lists[positions] == items[:, None]).any(axis=1)
        found = np.bincount(buckets[items], weights=is_found, minlength=size)
        places = np.bincount(buckets[lists[lists >= 0]], minlength=size)
        models[name] = {
            "found": [float(hits / count) if count else None for hits, count in zip(found, rows, strict=True)],
            "share": (places / max(int(places.sum()), 1)).tolist(),
        }
    counts = np.bincount(buckets[shown], minlength=size)
    return {"edges": list(EDGES), "items": counts.tolist(), "rows": rows.tolist(), "models": models}
