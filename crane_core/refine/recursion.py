"""Recursive cross-modal attention (arXiv 2601.11151, section 3.3): never rows x items in memory.

Softmax is PyTorch's fused kernel, on a CPU and on CUDA. Tanh runs in tiles on a CPU; on CUDA it, and the softmax over
inverted lists, are the Triton kernels of `crane_core.refine.attention_triton`. No CUDA path has been measured on a GPU
yet.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from crane_core.config import Phi, Precision

_TILE = (512, 256)
"""Largest block of scores per thread, queries x keys: 512 KiB in float32, so that two stay in an L2 cache."""
_KEYS_SEEN = 8
"""Multiple of sqrt(m) keys that a query of the sparse forms attends to by default: O(n sqrt(m)) instead of O(n m)."""
_CLUSTER_SAMPLE = 64
"""Keys per list that the centres are fitted on, at most."""
_CLUSTER_STEPS = 10
_CHUNK_ROWS = 512
"""Rows compared with all centres at a time."""


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
        """See `crane_core.refine.recursion.attend`."""


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
            attended = _fused_softmax(rounded, self.keys)
        else:
            form = _FusedTanh if queries.device.type == "cuda" else _TiledTanh
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
        for rows in slices(len(keys), _CHUNK_ROWS):
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
        for rows in slices(len(queries), _CHUNK_ROWS):
            scores = queries.detach()[rows].double() @ self.means.T
            nearest[rows] = scores.float().topk(self.num_probes, sorted=False).indices
        return nearest

    def attend(self, queries: Tensor, chunk_size: int = 4096) -> Tensor:
        if len(queries) == 0:
            return queries.clone()
        # Every row is held num_probes times, sorted by list, so the rows go in chunks.
        parts = [_rounded(part, self.precision) for part in queries.split(chunk_size)]
        attended = [_ListedSoftmax.apply(part, self.keys, self.nearest(part), self.bounds) for part in parts]
        return torch.cat(attended).to(queries.dtype)


def _rounded(rows: Tensor, precision: Precision) -> Tensor:
    """Rows in a precision; where no fused kernel takes it, rounded and back."""
    if precision == "float32":
        return rows
    rounded = rows.to(torch.bfloat16)
    return rounded if rows.device.type == "cuda" else rounded.to(rows.dtype)


def _fused_softmax(queries: Tensor, keys: Tensor) -> Tensor:
    """PyTorch's fused attention, whose memory depends on neither the rows nor the keys; refused, it raises."""
    fused = [SDPBackend.FLASH_ATTENTION]
    if queries.device.type == "cuda":
        fused += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):
        heads = F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None])
    return heads[0, 0]


class _FusedTanh(torch.autograd.Function):
    """Tanh attention in one Triton kernel each way."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, chunk_size: int) -> Tensor:
        from crane_core.refine import attention_triton as rca_triton

        ctx.save_for_backward(queries, keys)
        everything = [(0, len(queries), 0, len(keys))]
        return rca_triton.attend(queries, keys, everything, "tanh")[0].div_(len(keys))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        from crane_core.refine import attention_triton as rca_triton

        queries, keys = ctx.saved_tensors
        everything = [(0, len(queries), 0, len(keys))]
        incoming = gradients[0] / len(keys)
        return *rca_triton.attend_backward(queries, keys, incoming, None, everything, "tanh"), None


class _TiledTanh(torch.autograd.Function):
    """Tanh attention in tiles of scores, in two buffers that stay in the cache; backward computes each tile again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, chunk_size: int) -> Tensor:
        ctx.save_for_backward(queries, keys)
        ctx.chunk_size = chunk_size
        output = torch.zeros_like(queries)
        tiles = _Tiles(queries, keys, chunk_size)
        for rows in tiles.rows:
            block, total = queries[rows] * tiles.doubled, output[rows]
            for columns in tiles.columns:
                total.addmm_(tiles.tanh(block, keys[columns]), keys[columns])
        return output.div_(len(keys))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, keys = ctx.saved_tensors
        scale = queries.shape[1] ** -0.5
        incoming = gradients[0] / len(keys)
        query_gradient, key_gradient = torch.zeros_like(queries), torch.zeros_like(keys)
        tiles = _Tiles(queries, keys, ctx.chunk_size)
        for rows in tiles.rows:
            block, own = queries[rows] * tiles.doubled, queries[rows] * scale
            for columns in tiles.columns:
                weights = tiles.tanh(block, keys[columns])
                key_gradient[columns].addmm_(weights.T, incoming[rows])
                slope = weights.square_().neg_().add_(1)
                score_gradient = slope.mul_(tiles.products(incoming[rows], keys[columns]))
                query_gradient[rows].addmm_(score_gradient, keys[columns], alpha=scale)
                key_gradient[columns].addmm_(score_gradient.T, own)
        return query_gradient, key_gradient, None


class _Tiles:
    """The blocks of scores of some queries with some keys, in two buffers that are allocated once.

    Attributes:
        rows, columns: slices of the queries and of the keys; every pair of them is a tile.
        doubled: twice the scale of the scores, what `tanh` takes.
    """

    def __init__(self, queries: Tensor, keys: Tensor, chunk_size: int) -> None:
        num_rows = min(_TILE[0] * torch.get_num_threads(), chunk_size, len(queries))
        num_columns = min(_TILE[1], chunk_size, len(keys))
        self.rows = slices(len(queries), num_rows)
        self.columns = slices(len(keys), num_columns)
        self.doubled = 2 * queries.shape[1] ** -0.5
        self._buffers = queries.new_empty((2, num_rows * num_columns))

    def tanh(self, doubled: Tensor, keys: Tensor) -> Tensor:
        """`tanh(x)` of 2x, as `e / (e + 2)` with `e = exp(2x) - 1`: half the time of torch's, as exact."""
        scores = torch.mm(doubled, keys.T, out=self._buffer(0, len(doubled), len(keys)))
        grown = scores.clamp_max_(60).expm1_()
        return grown.div_(torch.add(grown, 2, out=self._buffer(1, *grown.shape)))

    def products(self, rows: Tensor, keys: Tensor) -> Tensor:
        return torch.mm(rows, keys.T, out=self._buffer(1, len(rows), len(keys)))

    def _buffer(self, number: int, num_rows: int, num_columns: int) -> Tensor:
        return self._buffers[number, : num_rows * num_columns].view(num_rows, num_columns)


Group = tuple[int, int, int, int]
"""Queries [start, stop) that attend to keys [start, stop)."""


class _ListedSoftmax(torch.autograd.Function):
    """Softmax over the keys of a query's lists: fused attention to each list, merged by the mass of each.

    Sorted by list, the queries of a list are one dense product with its keys.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, nearest: Tensor, bounds: list[int]) -> Tensor:
        num_probes = nearest.shape[1]
        probes = nearest.flatten()
        order = torch.argsort(probes, stable=True)
        ends = [0, *torch.bincount(probes, minlength=len(bounds) - 1).cumsum(0).tolist()]
        edges = zip(ends, ends[1:], bounds, bounds[1:], strict=False)
        groups = [(start, stop, first, last) for start, stop, first, last in edges if start < stop]
        partial, mass = _attend_groups(queries.index_select(0, order // num_probes), keys, groups)
        # Back into the order of the queries, a row of num_probes results for each.
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        mass = mass.index_select(0, place).view_as(nearest)
        normaliser = mass.logsumexp(1)
        shares = torch.exp(mass - normaliser[:, None])[:, None].to(partial.dtype)
        output = torch.bmm(shares, partial.index_select(0, place).view(*nearest.shape, -1))[:, 0]
        ctx.save_for_backward(queries, keys, output, normaliser, order // num_probes, place)
        ctx.groups = groups
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        queries, keys, output, normaliser, rows, place = ctx.saved_tensors
        # With the normaliser of the whole row, each list's share of the gradient stands for itself.
        own, incoming, attended, masses = (
            source.index_select(0, rows) for source in (queries, gradients[0], output, normaliser)
        )
        partial, key_gradient = _attend_groups_backward(own, incoming, attended, masses, keys, ctx.groups)
        query_gradient = partial.index_select(0, place).view(len(queries), -1, queries.shape[1]).sum(1)
        return query_gradient, key_gradient, None, None


def _attend_groups(queries: Tensor, keys: Tensor, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Softmax attention of each group: [n, d], and the logarithm of the sum of the exponentials, [n]."""
    if queries.device.type == "cuda":
        from crane_core.refine import attention_triton as rca_triton

        return rca_triton.attend(queries, keys, groups, "softmax")
    output, mass = torch.empty_like(queries), queries.new_empty(len(queries))
    for start, stop, first, last in groups:
        heads, part = queries[None, None, start:stop], keys[None, None, first:last]
        # What scaled_dot_product_attention calls; it alone would keep the mass to itself.
        attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, part, part)
        output[start:stop], mass[start:stop] = attended[0, 0], logsumexp.flatten()
    return output, mass


def _attend_groups_backward(
    queries: Tensor, incoming: Tensor, output: Tensor, normaliser: Tensor, keys: Tensor, groups: list[Group]
) -> tuple[Tensor, Tensor]:
    if queries.device.type == "cuda":
        from crane_core.refine import attention_triton as rca_triton

        delta = (incoming.float() * output.float()).sum(1)
        return rca_triton.attend_backward(queries, keys, incoming, (normaliser, delta), groups, "softmax")
    query_gradient, key_gradient = torch.empty_like(queries), torch.zeros_like(keys)
    for start, stop, first, last in groups:
        rows, part = slice(start, stop), keys[None, None, first:last]
        own, as_keys, as_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            incoming[None, None, rows], queries[None, None, rows], part, part, output[None, None, rows],
            normaliser[None, rows, None], 0.0, False,
        )  # fmt: skip
        query_gradient[rows] = own[0, 0]
        key_gradient[first:last] += as_keys[0, 0] + as_values[0, 0]
    return query_gradient, key_gradient


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
        [torch.addmm(lengths, rows[part], centres.T, alpha=-1).argmin(1) for part in slices(len(rows), _CHUNK_ROWS)]
    )


def slices(stop: int, size: int, start: int = 0) -> list[slice]:
    """Rows from `start` to `stop`, `size` at a time."""
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
