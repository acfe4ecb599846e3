"""Attention of RCA: the correlation function phi, and keys prepared for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_core.config import Phi, Precision
from crane_core.numerics.kmeans import chunk_rows, cluster, row_chunks
from crane_core.refine.kernels import DensePhi, ListedSoftmax, attend_all, on_gpu

_KEYS_SEEN = 8
"""Default of the sparse forms: a query attends to this many times sqrt(m) of m keys, O(n sqrt(m)) instead of O(n m)."""


@dataclass(frozen=True)
class Correlation:
    """The correlation function phi and the parameters of its sparse forms.

    Attributes:
        phi: one of
            `softmax`: softmax over all keys;
            `tanh`, `linear`: divided by the number of keys, so that the scale does not depend on the size of the
            catalog and results for shards of keys can be added;
            `block`: softmax over the keys in the lists nearest to the query;
            `landmark`: softmax over a fixed sample of the keys.
        num_lists: number of inverted lists of `block`; None stands for sqrt(m) with m keys.
        num_probes: lists that a query of `block` attends to; all lists if there are fewer.
        num_landmarks: keys in the sample of `landmark`; None stands for 8 sqrt(m). All keys if there are fewer.
        seed: seed of the clustering and of the sample.
        precision: type that queries and keys are rounded to before they are multiplied; products are summed in
            float32. `linear` ignores it. On a CPU the rounded values are multiplied in float32.
    """

    phi: Phi = "softmax"
    num_lists: int | None = None
    num_probes: int = _KEYS_SEEN
    num_landmarks: int | None = None
    seed: int = 0
    precision: Precision = "float32"

    def prepare(self, keys: Tensor, agree: Callable[[Tensor], object] | None = None) -> Keys:
        """Prepare keys for any number of queries; done once per recursion.

        Args:
            keys: float [m, d], m >= 1; also the values. Gradients reach them through `Keys.attend`.
            agree: overwrites a tensor with that of rank 0. Several ranks that prepare the same keys need it, so that
                rounding cannot give them different lists.
        """
        if self.phi == "linear":
            wide = keys.double()
            return GramKeys.of(wide.T @ wide, len(keys), keys.dtype)
        if self.phi == "block":
            num_lists = min(self.num_lists or math.ceil(len(keys) ** 0.5), len(keys))
            clusters = cluster(keys.detach(), num_lists, self.seed)
            if agree:
                agree(clusters)
            return ListedKeys(keys, clusters, self.num_probes, self.precision)
        if self.phi == "landmark":
            num_landmarks = min(self.num_landmarks or math.ceil(_KEYS_SEEN * len(keys) ** 0.5), len(keys))
            generator = torch.Generator().manual_seed(self.seed)
            picked = torch.randperm(len(keys), generator=generator)[:num_landmarks].sort().values
            return DenseKeys(keys[picked.to(keys.device)], "softmax", self.precision)
        return DenseKeys(keys, self.phi, self.precision)

    def restore(self, source: Tensor) -> Keys:
        """Make keys again from the `source` of keys that were prepared before."""
        if self.phi == "linear":
            return GramKeys(source)
        if self.phi == "landmark":
            return DenseKeys(source, "softmax", self.precision)
        return self.prepare(source)


def attend(queries: Tensor, keys: Tensor, correlation: Correlation, chunk_size: int = 4096) -> Tensor:
    """Return `C E` of the paper: `phi(queries keys^T / sqrt(d)) keys`, with the keys as values.

    Args:
        queries: float [n, d].
        keys: float [m, d], m >= 1.
        correlation: phi.
        chunk_size: upper bound of the rows and of the keys in a block of scores. Forward and backward hold a few
            such blocks, or smaller ones where those are faster. It changes the result by rounding only.

    Returns:
        float [n, d].
    """
    return correlation.prepare(keys).attend(queries, chunk_size)


class Keys(ABC):
    """Keys prepared for attention; made by `Correlation.prepare`.

    Attributes:
        source: float [m, d], the tensor from which `Correlation.restore` makes these keys again.
    """

    source: Tensor

    @abstractmethod
    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        """Attend to these keys; see `crane_core.refine.attention.attend`."""


class GramKeys(Keys):
    """Keys of `linear`, as one d x d matrix: `(Q E^T) E = Q (E^T E)`, which is exact.

    Args:
        source: `E^T E / (sqrt(d) m)`, [d, d].
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source

    @classmethod
    def of(cls, products: Tensor, num_keys: int, dtype: torch.dtype) -> GramKeys:
        """Make the keys from `E^T E`, float64 [d, d].

        Gram matrices of shards can be added; the split does not change the result.
        """
        return cls((products * (len(products) ** -0.5 / num_keys)).to(dtype))

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        return queries @ self.source


class DenseKeys(Keys):
    """Keys of `softmax` and `tanh`: every query attends to every key."""

    def __init__(self, keys: Tensor, phi: DensePhi, precision: Precision = "float32") -> None:
        self.source = keys
        self.keys = _rounded(keys, precision)
        self.phi: DensePhi = phi
        self.precision: Precision = precision

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        if len(queries) == 0:
            return queries.clone()
        attended = attend_all(_rounded(queries, self.precision), self.keys, self.phi, chunk_size)
        return attended.to(queries.dtype)


class ListedKeys(Keys):
    """Keys of `block`, in inverted lists; each query attends by softmax to the lists nearest to it.

    The lists are clusters of the keys; empty clusters are left out. The nearest lists are those whose mean key has the
    largest product with the query, that is, the largest mean score. Neither choice has a gradient.

    Args:
        keys: float [m, d].
        clusters: int64 [m], the cluster of each key.
        num_probes: lists per query.
        precision: as in `Correlation`.

    Attributes:
        order: int64 [m], the keys list by list.
        keys: float [m, d], in that order.
        bounds: [num_lists + 1], the first position of every list in `order`, then m.
        means: float64 [num_lists, d], mean key of every list.
    """

    def __init__(self, keys: Tensor, clusters: Tensor, num_probes: int, precision: Precision = "float32") -> None:
        self.source = keys
        self.order = torch.argsort(clusters, stable=True)
        self.keys = _rounded(keys[self.order], precision)
        self.precision: Precision = precision
        sizes = torch.bincount(clusters)
        sums = torch.zeros(len(sizes), keys.shape[1], dtype=torch.float64, device=keys.device)
        for rows in row_chunks(len(keys), chunk_rows(keys, len(sizes))):
            sums.index_add_(0, clusters[rows], keys.detach()[rows].double())
        filled = sizes > 0
        self.means = sums[filled] / sizes[filled, None]
        self.bounds: list[int] = [0, *sizes[filled].cumsum(0).tolist()]
        self.num_probes = min(num_probes, len(self.means))

    def nearest(self, queries: Tensor) -> Tensor:
        """Return the lists each query attends to, int64 [n, num_probes].

        The scores are float64, so that the split of the queries into chunks does not change the choice.
        """
        nearest = torch.empty(len(queries), self.num_probes, dtype=torch.int64, device=queries.device)
        for rows in row_chunks(len(queries), chunk_rows(queries, len(self.means))):
            scores = queries.detach()[rows].double() @ self.means.T
            nearest[rows] = scores.float().topk(self.num_probes, sorted=False).indices
        return nearest

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        if len(queries) == 0:
            return queries.clone()
        # Each query is copied num_probes times, once for each of its lists, so the queries go in chunks.
        parts = [_rounded(part, self.precision) for part in queries.split(chunk_size)]
        attended = [ListedSoftmax.apply(part, self.keys, self.nearest(part), self.bounds) for part in parts]
        return torch.cat(attended).to(queries.dtype)


def _rounded(rows: Tensor, precision: Precision) -> Tensor:
    """Round rows to a precision; on a CPU, whose kernels do not take bfloat16, round and convert back."""
    if precision == "float32":
        return rows
    rounded = rows.to(torch.bfloat16)
    return rounded if on_gpu(rows) else rounded.to(rows.dtype)
