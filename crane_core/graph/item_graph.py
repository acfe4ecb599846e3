"""Build the item-item graph: merge kNN shards, make the graph symmetric and normalise it."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from crane_core.errors import ArtifactError


def merge_shards(
    shards: list[tuple[int, int, np.ndarray, np.ndarray]], num_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the rows of kNN shards, given in any order.

    Args:
        shards: first row, stop row, neighbours int32 [rows, k] and similarities float32 [rows, k] of each.
        num_items: expected number of rows.

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
                "Run python -m jobs.ml.knn --store STORE --run RUN --part N again for every part N of this run.",
            )
        expected = stop
    widths = {neighbours.shape[1] for _, _, neighbours, _ in shards}
    if expected != num_items or len(widths) != 1:
        raise ArtifactError(
            f"kNN shards hold {expected} rows of widths {sorted(widths)}, expected {num_items} rows of one width.",
            "Run python -m jobs.ml.knn --store STORE --run RUN --part N again for every part N of this run.",
        )
    return np.concatenate([shard[2] for shard in shards]), np.concatenate([shard[3] for shard in shards])


def build_graph(neighbours: np.ndarray) -> sp.csr_array:
    """Return `D^-1/2 A D^-1/2` of the graph with an edge between two items if one is a neighbour of the other.

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
    """Return `D^-1/2 A D^-1/2` of a symmetric matrix, float32 CSR with sorted int32 columns; empty rows stay empty."""
    degrees = np.asarray(adjacency.sum(axis=1), dtype=np.float64).ravel()
    inverse = np.zeros_like(degrees)
    np.power(degrees, -0.5, out=inverse, where=degrees > 0)
    result = sp.csr_array(adjacency, dtype=np.float32)
    rows = np.repeat(np.arange(result.shape[0]), np.diff(result.indptr))
    result.data = (result.data * inverse[rows] * inverse[result.indices]).astype(np.float32)
    result.sort_indices()
    return result
