"""The item-item graph: merged from kNN shards, symmetric, normalised, and certified."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from crane_core.dataset import ItemLists
from crane_core.errors import ArtifactError
from crane_core.evaluation import bootstrap

_BLOCK_ROWS = 1 << 16
"""Nodes whose edges get their values at a time."""


def merge_shards(
    shards: list[tuple[int, int, np.ndarray, np.ndarray]], num_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put the rows of kNN shards together, in any order.

    Args:
        shards: start and stop row, int32 [rows, k] neighbours, float32 [rows, k] similarities of each.
        num_items: rows expected.

    Returns:
        int32 [num_items, k] neighbours and float32 [num_items, k] similarities.

    Raises:
        ArtifactError: rows are missing, doubled or of another width.
    """
    shards = sorted(shards, key=lambda shard: shard[0])
    expected = 0
    for start, stop, neighbours, similarities in shards:
        if start != expected or len(neighbours) != stop - start or neighbours.shape != similarities.shape:
            raise ArtifactError(
                f"kNN shard of rows {start}..{stop} has shape {neighbours.shape} where row {expected} is due.",
                "Run every part of ml.knn for this run again.",
            )
        expected = stop
    widths = {neighbours.shape[1] for _, _, neighbours, _ in shards}
    if expected != num_items or len(widths) != 1:
        raise ArtifactError(
            f"kNN shards hold {expected} rows of widths {sorted(widths)}, expected {num_items} rows of one width.",
            "Run every part of ml.knn for this run again.",
        )
    return np.concatenate([shard[2] for shard in shards]), np.concatenate([shard[3] for shard in shards])


def build_graph(neighbours: np.ndarray) -> sp.csr_array:
    """`D^-1/2 A D^-1/2` of the neighbour relation made symmetric: an edge where either is the other's neighbour.

    Args:
        neighbours: int32 [num_items, k].

    Returns:
        float32 CSR [num_items, num_items], int32 sorted columns; a row without neighbours is empty.
    """
    num_items, k = neighbours.shape
    rows = np.repeat(np.arange(num_items, dtype=np.int32), k)
    directed = sp.csr_array(
        (np.ones(rows.size, dtype=np.float32), (rows, neighbours.ravel())), shape=(num_items, num_items)
    )
    return normalise(directed.maximum(directed.T))


def normalise(adjacency: sp.csr_array) -> sp.csr_array:
    """`D^-1/2 A D^-1/2` of a symmetric matrix, float32 CSR with sorted int32 columns; empty rows stay empty."""
    degrees = np.asarray(adjacency.sum(axis=1), dtype=np.float64).ravel()
    inverse = np.zeros_like(degrees)
    np.power(degrees, -0.5, out=inverse, where=degrees > 0)
    result = sp.csr_array(adjacency, dtype=np.float32)
    rows = np.repeat(np.arange(result.shape[0]), np.diff(result.indptr))
    result.data = (result.data * inverse[rows] * inverse[result.indices]).astype(np.float32)
    result.sort_indices()
    return result


def user_item_graph(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> sp.csr_array:
    """Normalised bipartite graph of LightGCN: float32 CSR [U + I, U + I], users first, sorted int32 columns.

    Both halves are laid out directly: beside the result, memory holds about its size once more.

    Args:
        users, items: int [n], no pair twice.
        num_users, num_items: sizes of the id maps.
    """
    users, items = (column.astype(np.int32, copy=False) for column in (users, items))
    met = sp.csr_array((np.ones(len(users), dtype=np.int8), (users, items)), shape=(num_users, num_items))
    met.sort_indices()
    met_by = met.T.tocsr()
    width = np.int32 if 2 * met.nnz < 2**31 else np.int64
    indptr = np.concatenate([met.indptr, np.add(met_by.indptr[1:], met.nnz, dtype=np.int64)], dtype=width)
    indices = np.concatenate([met.indices + num_users, met_by.indices], dtype=width)
    counts = np.diff(indptr)
    inverse = np.zeros(len(counts))
    np.power(counts, -0.5, out=inverse, where=counts > 0)
    values = np.empty(len(indices), dtype=np.float32)
    for start in range(0, len(counts), _BLOCK_ROWS):
        rows = slice(indptr[start], indptr[min(start + _BLOCK_ROWS, len(counts))])
        own = np.repeat(inverse[start : start + _BLOCK_ROWS], counts[start : start + _BLOCK_ROWS])
        values[rows] = own * inverse[indices[rows]]
    return sp.csr_array((values, indices, indptr), shape=(num_users + num_items,) * 2)


def stratified_sample(train_counts: np.ndarray, size: int, seed: int) -> dict[str, np.ndarray]:
    """Random items of the head (a fifth of the warm catalog), the tail and the cold items, equal shares of each.

    Args:
        train_counts: int [num_items].
        size: items in all; fewer where a stratum is smaller than its share.
        seed: of the choice.
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
    """Give every stratum its lines of the true neighbours [n, k] of all sampled rows in ascending order."""
    every = np.unique(np.concatenate(list(sample.values())))
    return {name: (rows, truth[np.searchsorted(every, rows)]) for name, rows in sample.items()}


def certify(neighbours: np.ndarray, exact: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> dict[str, Any]:
    """Recall of the graph's neighbours against brute force.

    Args:
        neighbours: int32 [num_items, k] to be judged.
        exact: stratum to sampled rows int [n] and their true neighbours int32 [n, k].
        seed: of the bootstrap.

    Returns:
        `recall` with its interval over all sampled rows, and the mean of every stratum.
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
    """How much likelier two neighbours share a user than two random items with interactions.

    Near 1 the graph is built on features that say nothing about behaviour.

    Returns:
        `neighbours` and `random`, shares of sampled pairs with a common training user, and their ratio `lift`.
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
