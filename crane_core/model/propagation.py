"""Propagation over a symmetric sparse graph, with one kernel for forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.model.sharding import Shards

_BLOCK_ENTRIES = 1 << 24
"""Entries of a matrix that are moved to the device at a time: 128 MiB."""
_BLOCK_EDGES = 1 << 16
"""Edges whose keys are computed at a time, in the cache."""
PIECE_ENTRIES = 512
"""On a GPU, one thread sums at most this many entries of a row: an item with 185,526 users took 57 ms as one chain."""


class SymmetricGraph:
    """A symmetric sparse matrix that multiplies dense rows.

    Because the matrix equals its transpose, the gradient is the same product. The kernel is torch's embedding bag, a
    weighted sum of rows for each row, which on a CPU is code that FBGEMM generates for the width at hand: it measured
    2.7 to 7 times the CSR kernels of scipy and MKL and 8 to 13 times `torch.sparse.mm` over COO. A row is summed in the
    order of its entries by one thread, so the bits do not depend on the number of threads. On a GPU a long row is
    summed in pieces, and then the pieces are.

    Of several ranks, each keeps and multiplies the rows of its shard: all ranks' rows are gathered, and by symmetry
    the gradient of a rank's rows is again its rows of the product with the gathered gradients.

    Args:
        matrix: the rows of this rank of a symmetric matrix, float32 CSR [m, n]; its indices are int32 unless there are
            2**31 entries.
        device: where the rows will be.
        shards: who keeps which rows; one rank keeps all when None.
        resident: keep the matrix on the device. Otherwise it stays in the memory of the machine, and a product
            brings it over block by block.
        piece_entries: entries of a piece; rows are not cut when None, the default on a CPU.
    """

    def __init__(
        self,
        matrix: sp.csr_array,
        device: torch.device,
        shards: Shards | None = None,
        resident: bool = True,
        piece_entries: int | None = None,
    ) -> None:
        if piece_entries is None and device.type == "cuda":
            piece_entries = PIECE_ENTRIES
        self.shards = shards or Shards([matrix.shape[0]])
        self.matrix = matrix
        self.device = device
        width = np.int32 if matrix.nnz < 2**31 else np.int64
        arrays = matrix.indptr.astype(width, copy=False), matrix.indices.astype(width, copy=False), matrix.data
        self._pieces: np.ndarray | None = None
        if piece_entries is not None and matrix.nnz and np.diff(matrix.indptr).max() > piece_entries:
            offsets, self._pieces = cut_rows(arrays[0], piece_entries)
            arrays = offsets, *arrays[1:]
            self._bounds = torch.from_numpy(self._pieces).to(device)
        home = device if resident else torch.device("cpu")
        self._offsets, self._indices, self._values = (torch.from_numpy(array).to(home) for array in arrays)
        block = matrix.nnz if resident else _BLOCK_ENTRIES
        inner = np.searchsorted(matrix.indptr, np.arange(block, matrix.nnz, max(1, block)))
        self._cuts = np.unique([0, *inner, matrix.shape[0]]).tolist()

    def __matmul__(self, rows: Tensor) -> Tensor:
        """Multiply, with a gradient: float32 or float64 [m, d] -> [m, d], the rows of this rank."""
        return _SymmetricProduct.apply(rows, self)

    @property
    def num_local(self) -> int:
        """Number of rows that this rank keeps."""
        return self.matrix.shape[0]

    def spread(self, items: Tensor) -> Tensor:
        """Multiply rows of items, with a gradient, and return those of users; of a graph between users and items.

        Half of the product of all nodes, whose rows of users are zero and whose rows of items are not wanted.

        Args:
            items: float32 or float64 [m, d], this rank's.
        """
        return _ItemsToUsers.apply(items, self)

    def degrees(self) -> Tensor:
        """Return the number of entries of each row, of all ranks: int64 [n]."""
        counts = np.diff(self.matrix.indptr).astype(np.int64)
        return self.shards.collect(torch.from_numpy(counts).to(self.device))

    def multiply(self, rows: Tensor, wanted: slice | None = None) -> Tensor:
        """Multiply without a gradient; return only some of this rank's rows where `wanted`, consecutive, is given."""
        gathered = self.shards.collect(rows.detach().contiguous())
        wanted = wanted or slice(0, self.num_local)
        inner = [cut for cut in self._cuts if wanted.start < cut < wanted.stop]
        blocks = []
        for start, stop in pairwise([wanted.start, *inner, wanted.stop]):
            # Read on the CPU: a GPU would first finish all that it was asked before.
            entries = slice(int(self.matrix.indptr[start]), int(self.matrix.indptr[stop]))
            first, last = (start, stop) if self._pieces is None else map(int, self._pieces[[start, stop]])
            arrays = self._offsets[first : last + 1] - entries.start, self._indices[entries], self._values[entries]
            offsets, indices, values = (array.to(self.device) for array in arrays)
            sums = _sum_rows(gathered, offsets, indices, values.to(gathered.dtype))
            if self._pieces is not None:
                bounds = self._bounds[start : stop + 1] - first
                sums = _sum_rows(sums, bounds, torch.arange(len(sums), device=self.device))
            blocks.append(sums)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def cut_rows(indptr: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the rows of a CSR matrix into pieces of consecutive entries.

    Args:
        indptr: int [m + 1].
        most: entries of a piece.

    Returns:
        int [p + 1], the first entry of each piece, then the number of entries; int64 [m + 1], the first piece of each
        row, then p. A row without entries is one piece.
    """
    counts = np.maximum(1, -(-np.diff(indptr) // most))
    firsts = np.concatenate([[0], np.cumsum(counts)])
    inside = np.arange(firsts[-1]) - np.repeat(firsts[:-1], counts)
    return np.append(np.repeat(indptr[:-1], counts) + inside * most, indptr[-1]).astype(indptr.dtype), firsts


def _sum_rows(rows: Tensor, offsets: Tensor, indices: Tensor, values: Tensor | None = None) -> Tensor:
    return F.embedding_bag(
        indices, rows, offsets.to(indices.dtype), mode="sum", per_sample_weights=values, include_last_offset=True
    )


class _SymmetricProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, graph: SymmetricGraph) -> Tensor:
        ctx.graph = graph
        return graph.multiply(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.graph.multiply(gradients[0]), None


class _ItemsToUsers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items: Tensor, graph: SymmetricGraph) -> Tensor:
        ctx.graph, ctx.num_items = graph, len(items)
        num_users = graph.num_local - len(items)
        padded = torch.cat([items.new_zeros(num_users, items.shape[1]), items])
        return graph.multiply(padded, slice(0, num_users))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        users = gradients[0]
        padded = torch.cat([users, users.new_zeros(ctx.num_items, users.shape[1])])
        return ctx.graph.multiply(padded, slice(len(users), len(padded))), None


def propagate(graph: SymmetricGraph, embeddings: Tensor, num_layers: int) -> Tensor:
    """Return the mean of the embeddings over propagation steps 0..num_layers (LightGCN, eq. 7-8).

    Args:
        graph: symmetric-normalised [num_nodes, num_nodes].
        embeddings: float32 [num_nodes, dim]; users first, then items.
        num_layers: steps, >= 0.

    Returns:
        float32 [num_nodes, dim].
    """
    layer = total = embeddings
    for _ in range(num_layers):
        layer = graph @ layer
        total = total + layer
    return total / (num_layers + 1)


def drop_edges(users: np.ndarray, items: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Choose the user-item edges that an epoch keeps: degree-sensitive edge dropout.

    Exactly `round(share * num_edges)` edges are dropped. Edges to keep are drawn without replacement with the weight
    `1 / sqrt(deg_user * deg_item)`, so popular users and items lose more.

    Args:
        users, items: int [num_edges].
        share: of the edges to drop, in [0, 1).
        generator: of the draw.

    Returns:
        Sorted int64 positions of the kept edges.
    """
    num_kept = len(users) - round(share * len(users))
    if num_kept in (0, len(users)):
        return np.arange(num_kept)
    user_roots, item_roots = np.bincount(users) ** 0.5, np.bincount(items) ** 0.5
    # Exponential keys (Efraimidis and Spirakis, 2006) draw without replacement in one pass: the smallest are kept.
    keys = generator.exponential(size=len(users))
    for start in range(0, len(keys), _BLOCK_EDGES):
        block = slice(start, start + _BLOCK_EDGES)
        keys[block] *= user_roots[users[block]] * item_roots[items[block]]
    largest = np.partition(keys, num_kept - 1)[num_kept - 1]
    kept = np.flatnonzero(keys <= largest)
    # Of equal keys the first are kept.
    return (
        kept
        if len(kept) == num_kept
        else np.delete(kept, np.flatnonzero(keys[kept] == largest)[num_kept - len(kept) :])
    )


class DirectedGraph:
    """A sparse matrix that multiplies dense rows; the gradient is the product with its transpose.

    Args:
        matrix: float32 CSR [n, m].
        device: where the rows will be.
    """

    def __init__(self, matrix: sp.csr_array, device: torch.device) -> None:
        # Each direction is a product without a gradient, which needs no symmetry.
        self.onward, self.back = (SymmetricGraph(part, device) for part in (matrix, matrix.T.tocsr()))

    def __matmul__(self, rows: Tensor) -> Tensor:
        """Multiply, with a gradient: float32 [m, d] -> [n, d]."""
        return _DirectedProduct.apply(rows, self)


class _DirectedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, graph: DirectedGraph) -> Tensor:
        ctx.graph = graph
        return graph.onward.multiply(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.graph.back.multiply(gradients[0]), None
