"""Recursive cross-modal attention (arXiv 2601.11151, section 3.3): in tiles, never rows x items in memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from crane_core.config import Phi

_CPU_TILE = (512, 256)
"""Largest block of scores per thread, queries x keys: 512 KiB in float32, so that two stay in an L2 cache."""
_GPU_TILE = (8192, 8192)
_KEYS_SEEN = 8
"""Multiple of sqrt(m) keys that a query of the sparse forms attends to by default: O(n sqrt(m)) instead of O(n m)."""
_SAFE_SCORE = 40
"""Scores below this need no shift in softmax: exp(40) = 2e17 is far from the end of float32 for any catalog."""
_CLUSTER_SAMPLE = 256
"""Keys per list that the centres are fitted on, at most."""
_CLUSTER_STEPS = 10


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
    """

    phi: Phi = "softmax"
    num_lists: int | None = None
    num_probes: int = _KEYS_SEEN
    num_landmarks: int | None = None
    seed: int = 0

    def prepare(self, keys: Tensor) -> Keys:
        """What the attention to these keys needs whoever asks: computed once per recursion.

        Args:
            keys: float [m, d], m >= 1; also the values. Gradients reach them through `Keys.attend`.
        """
        if self.phi == "linear":
            return GramKeys(keys)
        if self.phi == "block":
            return ListedKeys(keys, self.num_lists or math.ceil(len(keys) ** 0.5), self.num_probes, self.seed)
        if self.phi == "landmark":
            num_landmarks = min(self.num_landmarks or math.ceil(_KEYS_SEEN * len(keys) ** 0.5), len(keys))
            generator = torch.Generator().manual_seed(self.seed)
            picked = torch.randperm(len(keys), generator=generator)[:num_landmarks].sort().values
            return DenseKeys(keys[picked.to(keys.device)], "softmax")
        return DenseKeys(keys, self.phi)


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
    """Keys prepared for attention; made by `Correlation.prepare`."""

    @abstractmethod
    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        """See `crane_core.rca.attend`."""


class GramKeys(Keys):
    """`linear`: `(Q E^T) E = Q (E^T E)`, exact through a d x d matrix."""

    def __init__(self, keys: Tensor) -> None:
        self.gram = keys.T @ keys * (keys.shape[1] ** -0.5 / len(keys))

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        return queries @ self.gram


class DenseKeys(Keys):
    """`softmax` and `tanh`: every query attends to every key."""

    def __init__(self, keys: Tensor, phi: Phi) -> None:
        self.keys = keys
        self.phi: Phi = phi

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        if self.phi == "softmax" and queries.device.type == "cpu" and len(queries):
            # The fused kernel; its memory depends on neither the rows nor the keys. Were it refused, torch raises.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                heads = F.scaled_dot_product_attention(
                    queries[None, None], self.keys[None, None], self.keys[None, None]
                )
            return heads[0, 0]
        everything = [(slice(0, len(queries)), slice(0, len(self.keys)))]
        return _TiledAttention.apply(queries, self.keys, everything, self.phi, chunk_size)


class ListedKeys(Keys):
    """`block`: keys in inverted lists, each query attends by softmax to the lists nearest to it.

    The lists are the cells of k-means on the keys; empty ones are left out. Nearest are the lists whose mean key
    has the largest product with the query, that is, the largest mean score. Neither choice has a gradient.

    Args:
        keys: float [m, d].
        num_lists: k-means centres, m when that is less.
        num_probes: lists per query.
        seed: of the clustering.

    Attributes:
        order: int64 [m], the keys list by list.
        bounds: first position of every list in `order`, and m; [num_lists + 1].
        means: float64 [num_lists, d], mean key of every list.
    """

    def __init__(self, keys: Tensor, num_lists: int, num_probes: int, seed: int) -> None:
        cells = cluster(keys.detach(), min(num_lists, len(keys)), seed)
        self.order = torch.argsort(cells, stable=True)
        sizes = torch.bincount(cells)
        self.keys = keys[self.order]
        sums = torch.zeros(len(sizes), keys.shape[1], dtype=torch.float64, device=keys.device)
        for rows in _slices(len(keys), _CPU_TILE[0]):
            sums.index_add_(0, cells[rows], keys.detach()[rows].double())
        filled = sizes > 0
        self.means = sums[filled] / sizes[filled, None]
        self.bounds: list[int] = [0, *sizes[filled].cumsum(0).tolist()]
        self.num_probes = min(num_probes, len(self.means))

    def nearest(self, queries: Tensor) -> Tensor:
        """int64 [n, num_probes], the lists each query attends to, nearest first.

        In float64, so that how the queries are cut into chunks decides nothing.
        """
        nearest = torch.empty(len(queries), self.num_probes, dtype=torch.int64, device=queries.device)
        for rows in _slices(len(queries), _CPU_TILE[0]):
            scores = queries.detach()[rows].double() @ self.means.T
            nearest[rows] = scores.float().topk(self.num_probes).indices
        return nearest

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        # Queries by list, so that every list is one dense product with those that look at it.
        probes = self.nearest(queries).flatten()
        rows = torch.argsort(probes, stable=True) // self.num_probes
        ends = [0, *torch.bincount(probes, minlength=len(self.means)).cumsum(0).tolist()]
        groups = [
            (rows[ends[cell] : ends[cell + 1]], slice(self.bounds[cell], self.bounds[cell + 1]))
            for cell in range(len(self.means))
            if ends[cell] < ends[cell + 1]
        ]
        return _TiledAttention.apply(queries, self.keys, groups, "softmax", chunk_size)


Groups = list[tuple[slice, slice]] | list[tuple[Tensor, slice]]
"""Which rows attend to which keys; rows are distinct within a group, and a row's groups share no key."""


class _TiledAttention(torch.autograd.Function):
    """Softmax and tanh attention in tiles of scores; the backward pass computes each tile again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, groups: Groups, phi: Phi, chunk_size: int) -> Tensor:
        output = torch.zeros_like(queries)
        tiles = _Tiles(queries, keys, phi, chunk_size)
        # Where no score can leave the range of exp, the largest of each row need not be known.
        bounded = _largest_norm(queries) * _largest_norm(keys) * tiles.scale < _SAFE_SCORE
        top = queries.new_full((len(queries), 1), 0 if bounded else -torch.inf)
        mass = queries.new_zeros((len(queries), 1))
        for rows, columns in tiles.of(groups):
            block, total, row_top, row_mass = (_take(source, rows) for source in (queries, output, top, mass))
            block = block * tiles.scale
            for part in columns:
                scores = tiles.scores(block, keys[part])
                if phi == "tanh":
                    total.addmm_(tiles.tanh_(scores), keys[part])
                    continue
                if not bounded:
                    new_top = torch.maximum(row_top, scores.amax(1, keepdim=True))
                    shrink = torch.exp(row_top - new_top)
                    scores, row_mass, total = scores.sub_(new_top), row_mass * shrink, total * shrink
                    row_top = new_top
                weights = scores.exp_()
                row_mass = row_mass + weights.sum(1, keepdim=True)
                total.addmm_(weights, keys[part])
            for target, source in ((output, total), (top, row_top), (mass, row_mass)):
                _put(target, rows, source)
        if phi == "tanh":
            output /= len(keys)
        else:
            output /= mass
        ctx.save_for_backward(queries, keys, output, top + mass.log())
        ctx.groups, ctx.phi, ctx.chunk_size = groups, phi, chunk_size
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        queries, keys, output, normaliser = ctx.saved_tensors
        scale = queries.shape[1] ** -0.5
        if ctx.phi == "tanh":
            gradient = gradient / len(keys)
        dot = (gradient * output).sum(1, keepdim=True)
        query_gradient, key_gradient = torch.zeros_like(queries), torch.zeros_like(keys)
        tiles = _Tiles(queries, keys, ctx.phi, ctx.chunk_size)
        for rows, columns in tiles.of(ctx.groups):
            own, incoming, row_gradient = (_take(source, rows) for source in (queries, gradient, query_gradient))
            row_normaliser, row_dot = _take(normaliser, rows), _take(dot, rows)
            block, own = own * tiles.scale, own * scale
            for part in columns:
                scores = tiles.scores(block, keys[part])
                if ctx.phi == "tanh":
                    weights = tiles.tanh_(scores)
                    key_gradient[part].addmm_(weights.T, incoming)
                    score_gradient = weights.square_().neg_().add_(1).mul_(incoming @ keys[part].T)
                else:
                    weights = scores.sub_(row_normaliser).exp_()
                    key_gradient[part].addmm_(weights.T, incoming)
                    score_gradient = weights.mul_((incoming @ keys[part].T).sub_(row_dot))
                row_gradient.addmm_(score_gradient, keys[part], alpha=scale)
                key_gradient[part].addmm_(score_gradient.T, own)
            _put(query_gradient, rows, row_gradient)
        return query_gradient, key_gradient, None, None, None


class _Tiles:
    """Tiles of scores in two buffers that are allocated once."""

    def __init__(self, queries: Tensor, keys: Tensor, phi: Phi, chunk_size: int) -> None:
        largest = _GPU_TILE
        if queries.device.type == "cpu":
            largest = (_CPU_TILE[0] * torch.get_num_threads(), _CPU_TILE[1])
        self.num_rows, self.num_columns = (min(edge, chunk_size) for edge in largest)
        size = min(self.num_rows, len(queries)) * min(self.num_columns, len(keys))
        self.buffers = queries.new_empty((2 if phi == "tanh" else 1, size))
        self.scale = queries.shape[1] ** -0.5 * (2 if phi == "tanh" else 1)

    def of(self, groups: Groups) -> Any:
        """Rows of a tile, and the slices of keys they meet."""
        for rows, columns in groups:
            parts = _slices(columns.stop, self.num_columns, columns.start)
            if isinstance(rows, slice):
                for part in _slices(rows.stop, self.num_rows, rows.start):
                    yield part, parts
            else:
                for part in rows.split(self.num_rows):
                    yield part, parts

    def scores(self, block: Tensor, keys: Tensor) -> Tensor:
        return torch.mm(block, keys.T, out=self._buffer(0, len(block), len(keys)))

    def tanh_(self, doubled: Tensor) -> Tensor:
        """`tanh(x)` of 2x in place, as `e / (e + 2)` with `e = exp(2x) - 1`: half the time of torch's, as exact."""
        grown = doubled.clamp_max_(60).expm1_()
        return grown.div_(torch.add(grown, 2, out=self._buffer(1, *grown.shape)))

    def _buffer(self, number: int, num_rows: int, num_columns: int) -> Tensor:
        return self.buffers[number, : num_rows * num_columns].view(num_rows, num_columns)


def _take(source: Tensor, rows: slice | Tensor) -> Tensor:
    """The rows of a group; several times faster than indexing when they are listed."""
    return source[rows] if isinstance(rows, slice) else source.index_select(0, rows)


def _put(target: Tensor, rows: slice | Tensor, source: Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] = source
    else:
        target.index_copy_(0, rows, source)


def _largest_norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).max()) if len(rows) else 0.0


def cluster(keys: Tensor, num_lists: int, seed: int) -> Tensor:
    """k-means by Lloyd's steps on a sample of the keys: the cell of each key, int64 [m].

    A centre without keys stays where it is.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(keys), generator=generator).to(keys.device)
    sample = keys[shuffled[: num_lists * _CLUSTER_SAMPLE]]
    centres = sample[:num_lists].clone()
    for _ in range(_CLUSTER_STEPS):
        cells = _assign(sample, centres)
        sizes = torch.bincount(cells, minlength=num_lists)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, cells, sample)
        centres = torch.where(sizes > 0, sums / sizes, centres)
    return _assign(keys, centres)


def _assign(rows: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each row: int64 [n]."""
    lengths = centres.square().sum(1) / 2
    return torch.cat(
        [torch.addmm(lengths, rows[part], centres.T, alpha=-1).argmin(1) for part in _slices(len(rows), _CPU_TILE[0])]
    )


def _slices(stop: int, size: int, start: int = 0) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


class Recursion(nn.Module):
    """The weights of one RCA pass, `W_E, b_E, W_C,m, W_H,m`."""

    def __init__(self, num_modalities: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.joint = nn.Parameter(_xavier((num_modalities * dim, dim), generator))
        self.joint_bias = nn.Parameter(torch.zeros(dim))
        self.correlation = nn.Parameter(_xavier((num_modalities, dim, dim), generator))
        self.hidden = nn.Parameter(_xavier((num_modalities, dim, dim), generator))

    def joint_rows(self, rows: Tensor) -> Tensor:
        """`E = [X_1 ; ... ; X_M] W_E + b_E`: float [n, M, d] -> [n, d]."""
        return torch.addmm(self.joint_bias, rows.flatten(1), self.joint)

    def refine(self, rows: Tensor, keys: Keys, chunk_size: int) -> Tensor:
        """`X_m + ReLU(C_m E W_H,m)` for every modality at once: float [n, M, d] -> [n, M, d]."""
        by_modality = rows.transpose(0, 1)
        queries = by_modality @ self.correlation
        attended = keys.attend(queries.flatten(0, 1), chunk_size).view_as(queries)
        return (by_modality + torch.relu(attended @ self.hidden)).transpose(0, 1).contiguous()


class RecursiveCrossModalAttention(nn.Module):
    """R passes of cross-modal refinement with one set of weights each.

    Keys and values are the joint rows of the items; item rows and user rows are queries through the same
    weights. The paper leaves both open.

    Args:
        num_modalities: M >= 1.
        dim: d.
        num_recursions: R >= 0; with 0 the rows pass unchanged.
        correlation: phi.
        generator: of the initial weights.
    """

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        num_recursions: int,
        correlation: Correlation,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.correlation = correlation
        self.recursions = nn.ModuleList(Recursion(num_modalities, dim, generator) for _ in range(num_recursions))

    def forward(self, items: Tensor, queries: Tensor, chunk_size: int = 4096) -> tuple[Tensor, Tensor]:
        """Refine item rows, and other rows that look at them.

        Args:
            items: float [num_items, M, d]; the keys of every pass are made from them.
            queries: float [n, M, d], users or further items.
            chunk_size: upper bound of the rows and of the keys in a block of scores.

        Returns:
            refined items [num_items, M, d] and refined queries [n, M, d].
        """
        for recursion in self.recursions:
            assert isinstance(recursion, Recursion)
            keys = self.correlation.prepare(recursion.joint_rows(items))
            queries = recursion.refine(queries, keys, chunk_size)
            items = recursion.refine(items, keys, chunk_size)
        return items, queries


def _xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
