"""The bipartite graph of users and items: whole, or a random part of it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from crane_core.model.sharding import Shards

_BLOCK_EDGES = 1 << 20
"""Edges that are sampled, or whose values are computed, at a time."""


class Edges(NamedTuple):
    """Pairs of users and items, none twice.

    Attributes:
        users, items: int [n].
        weights: float32 [n], above 0; None where all weigh 1.
    """

    users: np.ndarray
    items: np.ndarray
    weights: np.ndarray | None = None

    def where(self, kept: np.ndarray | slice) -> Edges:
        """Return some of the edges: by a mask, positions or a slice."""
        return Edges(self.users[kept], self.items[kept], None if self.weights is None else self.weights[kept])


def user_item_graph(edges: Edges, shards: Shards) -> sp.csr_array:
    """Return the normalised bipartite graph of LightGCN, the rows of one rank.

    float32 CSR, users first, sorted int32 columns. An edge of weight w between nodes of degrees d and e has the value
    `w / sqrt(d e)`; the degree of a node is the sum of its weights. Peak memory is about twice the size of the result.

    Args:
        edges: all of them, on every rank.
        shards: of the users and the items.

    Returns:
        [shards.num_local, shards.num_rows].
    """
    return _lay_out(edges, _inverse_roots(edges, shards), shards)


def sampled_user_item_graph(
    edges: Edges, shards: Shards, num_neighbours: int, generator: np.random.Generator
) -> sp.csr_array:
    """Return a random part of the user-item graph, about `num_neighbours` edges for every node.

    Its products equal those of the whole graph on average.

    The edge sampler of GraphSAINT (Zeng et al., ICLR 2020): an edge between nodes of degrees d and e is kept with the
    chance `p = min(1, num_neighbours (1 / d + 1 / e))` and its value is divided by p. Without weights that is at most
    `1 / (2 num_neighbours)` where p < 1.

    Args:
        edges, shards: as of `user_item_graph`.
        num_neighbours: edges that a node keeps on average by its own degree; edges kept by its neighbours are added.
        generator: of the sample.
    """
    roots = _inverse_roots(edges, shards)
    kept = np.empty(len(edges.users), dtype=bool)
    for start in range(0, len(kept), _BLOCK_EDGES):
        block = slice(start, start + _BLOCK_EDGES)
        chances = _chances(roots[edges.users[block]], roots[edges.items[block] + shards.sizes[0]], num_neighbours)
        kept[block] = generator.random(len(chances)) < chances
    return _lay_out(edges.where(kept), roots, shards, num_neighbours)


def _inverse_roots(edges: Edges, shards: Shards) -> np.ndarray:
    """Return `degree^-1/2` of every node, 0 for a node without edges: float64 [num_rows]."""
    degrees = np.concatenate(
        [
            np.bincount(nodes, weights=edges.weights, minlength=size)
            for nodes, size in zip((edges.users, edges.items), shards.sizes, strict=True)
        ]
    )
    inverse = np.zeros(len(degrees))
    np.power(degrees, -0.5, out=inverse, where=degrees > 0)
    return inverse


def _chances(left: np.ndarray, right: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Return the chances that edges are kept, from the inverse roots of the degrees of their ends."""
    return np.minimum(1, num_neighbours * (left**2 + right**2))


def _lay_out(edges: Edges, roots: np.ndarray, shards: Shards, num_neighbours: int | None = None) -> sp.csr_array:
    """Return the rows of one rank of some edges, with values by the degrees of the whole graph."""
    num_users, num_items = shards.sizes
    own_users, own_items = shards.parts()
    met = _rows_of(edges, own_users, shards.sizes)
    own = slice(own_items.start - num_users, own_items.stop - num_users)
    turned = Edges(edges.items, edges.users, edges.weights)
    met_by = _rows_of(turned, own, (num_items, num_users))
    width = np.int32 if met.nnz + met_by.nnz < 2**31 else np.int64
    indptr = np.concatenate([met.indptr, np.add(met_by.indptr[1:], met.nnz, dtype=np.int64)], dtype=width)
    indices = np.concatenate([met.indices + num_users, met_by.indices], dtype=width)
    values = np.concatenate([met.data, met_by.data], dtype=np.float32)
    del met, met_by
    counts, own_roots = np.diff(indptr), np.concatenate([roots[own_users], roots[own_items]])
    cuts = np.searchsorted(indptr, np.arange(0, len(indices) + _BLOCK_EDGES, _BLOCK_EDGES)).clip(max=len(counts))
    for start, stop in pairwise(np.unique(cuts)):
        entries = slice(indptr[start], indptr[stop])
        left = np.repeat(own_roots[start:stop], counts[start:stop])
        right = roots[indices[entries]]
        values[entries] *= left * right
        if num_neighbours is not None:
            values[entries] /= _chances(left, right, num_neighbours)
    return sp.csr_array((values, indices, indptr), shape=(len(counts), shards.num_rows))


def _rows_of(edges: Edges, part: slice, shape: tuple[int, ...]) -> sp.csr_array:
    """Return some rows of the matrix of the weights: float32 CSR, int8 where all are 1, sorted int32 columns."""
    if part != slice(0, shape[0]):
        edges = edges.where((edges.users >= part.start) & (edges.users < part.stop))
    rows, columns = (places.astype(np.int32, copy=False) for places in (edges.users - part.start, edges.items))
    values = np.ones(len(rows), dtype=np.int8) if edges.weights is None else edges.weights
    matrix = sp.csr_array((values, (rows, columns)), shape=(part.stop - part.start, shape[1]))
    matrix.sort_indices()
    return matrix
