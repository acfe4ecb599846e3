"""The item-item graph: merged from kNN shards, symmetric, normalised, and certified."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from crane_core.dataset.interactions import ItemLists
from crane_core.errors import ArtifactError
from crane_core.evaluation.metrics import bootstrap
from crane_core.model.sharding import Shards

_BLOCK_EDGES = 1 << 20
"""Edges that are drawn, or get their values, at a time."""


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


def user_item_graph(users: np.ndarray, items: np.ndarray, shards: Shards) -> sp.csr_array:
    """Normalised bipartite graph of LightGCN, the rows of one rank: float32 CSR, users first, sorted int32 columns.

    Both halves are laid out directly: beside the result, memory holds about its size once more.

    Args:
        users, items: int [n], no pair twice.
        shards: of the users and the items.

    Returns:
        [shards.num_local, shards.num_rows].
    """
    return _lay_out(users, items, _inverse_roots(users, items, shards), shards)


def sampled_user_item_graph(
    users: np.ndarray, items: np.ndarray, shards: Shards, num_neighbours: int, generator: np.random.Generator
) -> sp.csr_array:
    """A random part of the user-item graph of `num_neighbours` edges a node, whose products are right on average.

    The edge sampler of GraphSAINT (Zeng et al., ICLR 2020): an edge between nodes of degrees d and e is kept with the
    chance `p = min(1, num_neighbours (1 / d + 1 / e))` and weighs `1 / (p sqrt(d e))`, at most
    `1 / (2 num_neighbours)` where p < 1.

    Args:
        users, items, shards: as of `user_item_graph`.
        num_neighbours: edges that a node keeps by its own degree, on average; those its neighbours keep come on top.
        generator: of the draw.
    """
    roots = _inverse_roots(users, items, shards)
    kept = np.empty(len(users), dtype=bool)
    for start in range(0, len(users), _BLOCK_EDGES):
        edges = slice(start, start + _BLOCK_EDGES)
        chances = _chances(roots[users[edges]], roots[items[edges] + shards.sizes[0]], num_neighbours)
        kept[edges] = generator.random(len(chances)) < chances
    return _lay_out(users[kept], items[kept], roots, shards, num_neighbours)


def _inverse_roots(users: np.ndarray, items: np.ndarray, shards: Shards) -> np.ndarray:
    """float64 [num_rows], `degree^-1/2` of every node; 0 without edges."""
    counts = [np.bincount(nodes, minlength=size) for nodes, size in zip((users, items), shards.sizes, strict=True)]
    degrees = np.concatenate(counts)
    inverse = np.zeros(len(degrees))
    np.power(degrees, -0.5, out=inverse, where=degrees > 0)
    return inverse


def _chances(left: np.ndarray, right: np.ndarray, num_neighbours: int) -> np.ndarray:
    """That edges are kept, by the inverse roots of the degrees of their ends."""
    return np.minimum(1, num_neighbours * (left**2 + right**2))


def _lay_out(
    users: np.ndarray, items: np.ndarray, roots: np.ndarray, shards: Shards, num_neighbours: int | None = None
) -> sp.csr_array:
    """The rows of one rank of the edges, with values of the whole graph's `roots`."""
    num_users, num_items = shards.sizes
    own_users, own_items = shards.parts()
    met = _rows_of(users, items, own_users, shards.sizes)
    own = slice(own_items.start - num_users, own_items.stop - num_users)
    met_by = _rows_of(items, users, own, (num_items, num_users))
    width = np.int32 if met.nnz + met_by.nnz < 2**31 else np.int64
    indptr = np.concatenate([met.indptr, np.add(met_by.indptr[1:], met.nnz, dtype=np.int64)], dtype=width)
    indices = np.concatenate([met.indices + num_users, met_by.indices], dtype=width)
    del met, met_by
    counts, own_roots = np.diff(indptr), np.concatenate([roots[own_users], roots[own_items]])
    values = np.empty(len(indices), dtype=np.float32)
    cuts = np.searchsorted(indptr, np.arange(0, len(indices) + _BLOCK_EDGES, _BLOCK_EDGES)).clip(max=len(counts))
    for start, stop in pairwise(np.unique(cuts)):
        entries = slice(indptr[start], indptr[stop])
        left = np.repeat(own_roots[start:stop], counts[start:stop])
        right = roots[indices[entries]]
        values[entries] = left * right
        if num_neighbours is not None:
            values[entries] /= _chances(left, right, num_neighbours)
    return sp.csr_array((values, indices, indptr), shape=(len(counts), shards.num_rows))


def _rows_of(rows: np.ndarray, columns: np.ndarray, part: slice, shape: tuple[int, ...]) -> sp.csr_array:
    """Some rows of a matrix that has ones at the given places: int8 CSR, sorted int32 columns."""
    if part != slice(0, shape[0]):
        inside = (rows >= part.start) & (rows < part.stop)
        rows, columns = rows[inside] - part.start, columns[inside]
    rows, columns = (places.astype(np.int32, copy=False) for places in (rows, columns))
    matrix = sp.csr_array(
        (np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(part.stop - part.start, shape[1])
    )
    matrix.sort_indices()
    return matrix


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
