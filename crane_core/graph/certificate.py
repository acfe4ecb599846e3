"""The certificate of the item graph: recall against brute force, and lift over random pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from crane_core.dataset.interactions import ItemLists
from crane_core.numerics.bootstrap import bootstrap


def stratified_sample(train_counts: np.ndarray, size: int, seed: int) -> dict[str, np.ndarray]:
    """Draw the same number of random items from head, tail and cold items.

    Warm items have training interactions; the head is the most popular fifth of them, the tail the rest.

    Args:
        train_counts: int [num_items].
        size: number of items in all; fewer if a stratum is smaller than its share.
        seed: seed of the choice.

    Returns:
        stratum to ascending item numbers.
    """
    generator = np.random.default_rng(seed)
    warm = np.flatnonzero(train_counts > 0)
    ranked = warm[np.argsort(-train_counts[warm], kind="stable")]
    cut = -(-len(ranked) // 5)
    strata = {"head": ranked[:cut], "tail": ranked[cut:], "cold": np.flatnonzero(train_counts == 0)}
    strata = {name: rows for name, rows in strata.items() if len(rows)}
    share = -(-size // len(strata))
    return {
        name: np.sort(generator.choice(rows, size=min(share, len(rows)), replace=False))
        for name, rows in strata.items()
    }


def split_sample(sample: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the items of each stratum and the true neighbours of each.

    Args:
        sample: stratum to item numbers.
        truth: [n, k], neighbours of all sampled items, in ascending order of the items.
    """
    every = np.unique(np.concatenate(list(sample.values())))
    return {name: (rows, truth[np.searchsorted(every, rows)]) for name, rows in sample.items()}


def certify(neighbours: np.ndarray, exact: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> dict[str, Any]:
    """Measure the recall of the graph's neighbours against brute force.

    Args:
        neighbours: int32 [num_items, k], the neighbours to measure.
        exact: stratum to sampled items, int [n], and their true neighbours, int32 [n, k].
        seed: seed of the bootstrap.

    Returns:
        `recall` with its interval over all sampled items, and `strata` with the mean of each.
    """
    recalls = {
        stratum: (neighbours[rows][:, :, None] == truth[:, None, :]).any(axis=2).mean(axis=1)
        if truth.shape[1]
        else np.ones(len(rows))
        for stratum, (rows, truth) in exact.items()
    }
    overall = bootstrap({"recall": np.concatenate(list(recalls.values()))}, 1000, seed)["recall"]
    return {
        "recall": overall.as_dict(),
        "strata": {name: {"items": len(values), "recall": float(values.mean())} for name, values in recalls.items()},
    }


def co_interaction_lift(
    neighbours: np.ndarray, train: ItemLists, num_items: int, seed: int, sample: int = 5000
) -> dict[str, float]:
    """Measure how much more often neighbours share a user than two random items with interactions do.

    A lift near 1 means that the features of the graph say nothing about behaviour.

    Returns:
        `neighbours` and `random`, the shares of sampled pairs with a common training user, and their ratio `lift`.
    """
    generator = np.random.default_rng(seed)
    users = sp.csr_array(
        (np.ones(len(train.items), dtype=np.float32), (train.items, train.users())), shape=(num_items, train.num_users)
    )
    warm = np.flatnonzero(np.diff(users.indptr) > 0)
    if len(warm) < 2 or neighbours.shape[1] == 0:
        return {"neighbours": float("nan"), "random": float("nan"), "lift": float("nan")}
    left = generator.choice(warm, size=sample)
    right = neighbours[left, generator.integers(neighbours.shape[1], size=sample)]
    known = np.diff(users.indptr)[right] > 0
    other = generator.choice(warm, size=sample)
    near = _share_with_common_user(users, left[known], right[known])
    random = _share_with_common_user(users, left[left != other], other[left != other])
    return {"neighbours": near, "random": random, "lift": near / random if random > 0 else float("nan")}


def _share_with_common_user(users: sp.csr_array, left: np.ndarray, right: np.ndarray) -> float:
    if len(left) == 0:
        return float("nan")
    return float((users[left].multiply(users[right]).sum(axis=1) > 0).mean())
