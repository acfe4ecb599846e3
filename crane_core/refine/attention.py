"""Correlation functions of RCA and the keys that they attend to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_core.config import Phi, Precision
from crane_core.numerics.kmeans import CHUNK_ROWS, cluster, row_chunks
from crane_core.refine.kernels import FusedTanh, ListedSoftmax, TiledTanh, fused_softmax

_KEYS_SEEN = 8
"""Multiple of sqrt(m) keys that a query of the sparse forms attends to by default: O(n sqrt(m)) instead of O(n m)."""


@dataclass(frozen=True)
class Correlation:
    """phi, and the parameters of its sparse forms.

    Attributes:
        phi: `softmax` over the keys; `tanh` and `linear` divided by the number of keys, so that their scale does
            not depend on the size of the catalog and shards of keys add up; `block`, softmax over the keys of the
            query's nearest lists; `landmark`, softmax over a fixed sample of the keys.
        num_lists: inverted lists of `block`; None is sqrt(m) for m keys.
        num_probes: lists each query of `block` attends to; as many as there are when that is less.
        num_landmarks: keys in the sample of `landmark`; None is 8 sqrt(m), all keys when that is less.
        seed: of the clustering and of the sample.
        precision: what queries and keys are rounded to before their products, which are summed in float32. `linear`
            ignores it. A CPU computes in float32 all the same.
    """

    phi: Phi = "softmax"
    num_lists: int | None = None
    num_probes: int = _KEYS_SEEN
    num_landmarks: int | None = None
    seed: int = 0
    precision: Precision = "float32"

    def prepare(self, keys: Tensor, agree: Callable[[Tensor], object] | None = None) -> Keys:
        """What the attention to these keys needs whoever asks: computed once per recursion.

        Args:
            keys: float [m, d], m >= 1; also the values. Gradients reach them through `Keys.attend`.
            agree: overwrites a tensor by that of rank 0, where several ranks prepare the same keys: rounding cannot
                then make them attend to different lists.
        """
        if self.phi == "linear":
            wide = keys.double()
            return GramKeys.of(wide.T @ wide, len(keys), keys.dtype)
        if self.phi == "block":
            num_lists = min(self.num_lists or math.ceil(len(keys) ** 0.5), len(keys))
            cells = cluster(keys.detach(), num_lists, self.seed)
            if agree:
                agree(cells)
            return ListedKeys(keys, cells, self.num_probes, self.precision)
        if self.phi == "landmark":
            num_landmarks = min(self.num_landmarks or math.ceil(_KEYS_SEEN * len(keys) ** 0.5), len(keys))
            generator = torch.Generator().manual_seed(self.seed)
            picked = torch.randperm(len(keys), generator=generator)[:num_landmarks].sort().values
            return DenseKeys(keys[picked.to(keys.device)], "softmax", self.precision)
        return DenseKeys(keys, self.phi, self.precision)

    def restore(self, source: Tensor) -> Keys:
        """Keys that were prepared before, from their `source`."""
        if self.phi == "linear":
            return GramKeys(source)
        if self.phi == "landmark":
            return DenseKeys(source, "softmax", self.precision)
        return self.prepare(source)


def attend(queries: Tensor, keys: Tensor, correlation: Correlation, chunk_size: int = 4096) -> Tensor:
    """`C E` of the paper: `phi(queries keys^T / sqrt(d)) keys`, with the keys as values.

    Args:
        queries: float [n, d].
        keys: float [m, d], m >= 1.
        correlation: phi.
        chunk_size: upper bound of the rows and of the keys in a block of scores; forward and backward hold a few
            such blocks, and smaller ones where those are faster. The result does not depend on it beyond rounding.

    Returns:
        float [n, d].
    """
    return correlation.prepare(keys).attend(queries, chunk_size)


class Keys(ABC):
    """Keys prepared for attention; made by `Correlation.prepare`.

    Attributes:
        source: float [m, d], what `Correlation.restore` makes them from again.
    """

    source: Tensor

    @abstractmethod
    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        """See `crane_core.refine.attention.attend`."""


class GramKeys(Keys):
    """`linear`: `(Q E^T) E = Q (E^T E)`, exact through a d x d matrix.

    Args:
        source: `E^T E / (sqrt(d) m)`, [d, d].
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source

    @classmethod
    def of(cls, products: Tensor, num_keys: int, dtype: torch.dtype) -> GramKeys:
        """Of `E^T E`, float64 [d, d]: that of shards of the m keys is the sum, and how they were cut does not show."""
        return cls((products * (len(products) ** -0.5 / num_keys)).to(dtype))

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        return queries @ self.source


class DenseKeys(Keys):
    """`softmax` and `tanh`: every query attends to every key."""

    def __init__(self, keys: Tensor, phi: Phi, precision: Precision = "float32") -> None:
        self.source = keys
        self.keys = _rounded(keys, precision)
        self.phi: Phi = phi
        self.precision: Precision = precision

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        if len(queries) == 0:
            return queries.clone()
        rounded = _rounded(queries, self.precision)
        if self.phi == "softmax":
            attended = fused_softmax(rounded, self.keys)
        else:
            form = FusedTanh if queries.device.type == "cuda" else TiledTanh
            attended = form.apply(rounded, self.keys, chunk_size)
        return attended.to(queries.dtype)


class ListedKeys(Keys):
    """`block`: keys in inverted lists, each query attends by softmax to the lists nearest to it.

    The lists are the cells of k-means on the keys; empty ones are left out. Nearest are the lists whose mean key
    has the largest product with the query, that is, the largest mean score. Neither choice has a gradient.

    Args:
        keys: float [m, d].
        cells: int64 [m], the k-means centre of each key.
        num_probes: lists per query.
        precision: as in `Correlation`.

    Attributes:
        order: int64 [m], the keys list by list.
        keys: float [m, d], in that order.
        bounds: first position of every list in `order`, and m; [num_lists + 1].
        means: float64 [num_lists, d], mean key of every list.
    """

    def __init__(self, keys: Tensor, cells: Tensor, num_probes: int, precision: Precision = "float32") -> None:
        self.source = keys
        self.order = torch.argsort(cells, stable=True)
        self.keys = _rounded(keys[self.order], precision)
        self.precision: Precision = precision
        sizes = torch.bincount(cells)
        sums = torch.zeros(len(sizes), keys.shape[1], dtype=torch.float64, device=keys.device)
        for rows in row_chunks(len(keys), CHUNK_ROWS):
            sums.index_add_(0, cells[rows], keys.detach()[rows].double())
        filled = sizes > 0
        self.means = sums[filled] / sizes[filled, None]
        self.bounds: list[int] = [0, *sizes[filled].cumsum(0).tolist()]
        self.num_probes = min(num_probes, len(self.means))

    def nearest(self, queries: Tensor) -> Tensor:
        """int64 [n, num_probes], the lists each query attends to.

        In float64, so that how the queries are cut into chunks decides nothing.
        """
        nearest = torch.empty(len(queries), self.num_probes, dtype=torch.int64, device=queries.device)
        for rows in row_chunks(len(queries), CHUNK_ROWS):
            scores = queries.detach()[rows].double() @ self.means.T
            nearest[rows] = scores.float().topk(self.num_probes, sorted=False).indices
        return nearest

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        if len(queries) == 0:
            return queries.clone()
        # Every row is held num_probes times, sorted by list, so the rows go in chunks.
        parts = [_rounded(part, self.precision) for part in queries.split(chunk_size)]
        attended = [ListedSoftmax.apply(part, self.keys, self.nearest(part), self.bounds) for part in parts]
        return torch.cat(attended).to(queries.dtype)


def _rounded(rows: Tensor, precision: Precision) -> Tensor:
    """Rows in a precision; where no fused kernel takes it, rounded and back."""
    if precision == "float32":
        return rows
    rounded = rows.to(torch.bfloat16)
    return rounded if rows.device.type == "cuda" else rounded.to(rows.dtype)
