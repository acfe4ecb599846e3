"""Attention kernels with gradients that never hold all scores, rows x items, in memory.

Softmax is PyTorch's fused kernel, on a CPU and, without a gradient, on a GPU. Tanh runs in tiles on a CPU. On a GPU,
tanh, softmax with a gradient and the softmax over inverted lists are the Triton kernels of
`crane_core.refine.attention_triton`. `tests/bench/gpu.sh` times both kinds on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from crane_core.numerics.kmeans import row_chunks

DensePhi = Literal["softmax", "tanh"]
_TILE = (512, 256)
"""Largest block of scores per thread, queries x keys: 512 KiB in float32, so that two fit in an L2 cache."""


GPU_TYPES = {"cuda"}
"""Types of device whose tensors take the kernels for GPUs. `tests/bench/gpu.sh --rehearse` adds `cpu`, where Triton's
interpreter runs them."""
MOST_DIMS = 128
"""Largest width of a row for the Triton kernels: a block of rows must fit in the registers of a program."""
_ALIGNED = 8
"""Widths that PyTorch's fused kernels for GPUs take are multiples of this: float32 of 4, bfloat16 of 8."""


def on_gpu(rows: Tensor) -> bool:
    """Return whether the rows take the kernels for GPUs."""
    return rows.device.type in GPU_TYPES


def attend_all(queries: Tensor, keys: Tensor, phi: DensePhi, chunk_size: int) -> Tensor:
    """Attend to every key.

    On a GPU, softmax without a gradient is PyTorch's fused attention, and so is that of rows wider than `MOST_DIMS`.
    With a gradient it is a Triton kernel. Under `torch.use_deterministic_algorithms`, the backward pass of PyTorch's
    kernel runs on a single multiprocessor for one head in float32. In bfloat16 it holds the gradient of the queries
    once for each multiprocessor.

    Args:
        queries: float32 [n, d], n >= 1; on a GPU also bfloat16.
        keys: like the queries, [m, d]; also the values.
        phi: `softmax` or `tanh`.
        chunk_size: as in `crane_core.refine.attention.attend`, for tanh on a CPU.

    Raises:
        ConfigError: on a GPU the rows of tanh are wider than `MOST_DIMS`.
    """
    if not on_gpu(queries):
        return fused_softmax(queries, keys) if phi == "softmax" else TiledTanh.apply(queries, keys, chunk_size)
    learns = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    if phi == "softmax" and not (learns and queries.shape[1] <= MOST_DIMS):
        return fused_softmax(queries, keys)
    return FusedAttention.apply(queries, keys, phi)


def fused_softmax(queries: Tensor, keys: Tensor) -> Tensor:
    """Run PyTorch's fused attention, or raise RuntimeError where no fused kernel takes the inputs.

    Its memory depends on neither the number of queries nor the number of keys.
    """
    dim, fused, scale = queries.shape[1], [SDPBackend.FLASH_ATTENTION], None
    learns = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    if queries.device.type == "cuda":
        fused = [SDPBackend.CUDNN_ATTENTION, *fused, SDPBackend.EFFICIENT_ATTENTION]
    if on_gpu(queries) and dim % _ALIGNED:
        # Columns of zeros change no product.
        queries, keys = (F.pad(rows, (0, -dim % _ALIGNED)) for rows in (queries, keys))
        scale = dim**-0.5
    # The forward pass of every kernel gives the same bits in every run; cuDNN's is refused for its backward pass.
    with sdpa_kernel(fused, set_priority=True), nullcontext() if learns else any_algorithm():
        heads = F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None], scale=scale)
    return heads[0, 0, :, :dim]


@contextmanager
def any_algorithm() -> Iterator[None]:
    """Allow algorithms that PyTorch does not take for deterministic."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


class FusedAttention(torch.autograd.Function):
    """Softmax or tanh attention on a GPU by Triton kernels, forward and backward; the same bits in every run."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, phi: DensePhi) -> Tensor:
        from crane_core.refine import attention_triton

        everything = np.array([[0, len(queries), 0, len(keys)]])
        output, mass = attention_triton.attend(queries, keys, everything, phi)
        if phi == "tanh":
            output.div_(len(keys))
        ctx.save_for_backward(queries, keys, *((output, mass) if phi == "softmax" else ()))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        from crane_core.refine import attention_triton

        queries, keys, *saved = ctx.saved_tensors
        everything = np.array([[0, len(queries), 0, len(keys)]])
        if saved:
            output, mass = saved
            statistics = mass, _delta(gradients[0], output)
            given = attention_triton.attend_backward(queries, keys, gradients[0], statistics, everything, "softmax")
        else:
            given = attention_triton.attend_backward(queries, keys, gradients[0] / len(keys), None, everything, "tanh")
        return *given, None


class TiledTanh(torch.autograd.Function):
    """Tanh attention on a CPU, in tiles of scores held in two buffers. Backward computes each tile again."""

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
    """Blocks of scores between queries and keys, in two buffers that are allocated once.

    Attributes:
        rows, columns: slices of the queries and of the keys; every pair of slices is a tile.
        doubled: twice the scale of the scores. Queries times it are the input of `tanh`.
    """

    def __init__(self, queries: Tensor, keys: Tensor, chunk_size: int) -> None:
        num_rows = min(_TILE[0] * torch.get_num_threads(), chunk_size, len(queries))
        num_columns = min(_TILE[1], chunk_size, len(keys))
        self.rows = row_chunks(len(queries), num_rows)
        self.columns = row_chunks(len(keys), num_columns)
        self.doubled = 2 * queries.shape[1] ** -0.5
        self._buffers = queries.new_empty((2, num_rows * num_columns))

    def tanh(self, doubled: Tensor, keys: Tensor) -> Tensor:
        """Return `tanh(x)` from 2x as `e / (e + 2)` with `e = exp(2x) - 1`: as exact as torch.tanh in half its time."""
        scores = torch.mm(doubled, keys.T, out=self._buffer(0, len(doubled), len(keys)))
        grown = scores.clamp_max_(60).expm1_()
        return grown.div_(torch.add(grown, 2, out=self._buffer(1, *grown.shape)))

    def products(self, rows: Tensor, keys: Tensor) -> Tensor:
        return torch.mm(rows, keys.T, out=self._buffer(1, len(rows), len(keys)))

    def _buffer(self, number: int, num_rows: int, num_columns: int) -> Tensor:
        return self._buffers[number, : num_rows * num_columns].view(num_rows, num_columns)


Groups = np.ndarray
"""int64 [g, 4]: of each group the first query and the one behind the last, and likewise keys. These queries attend to
these keys; every query is in one group."""


class ListedSoftmax(torch.autograd.Function):
    """Softmax over the keys in the lists of a query.

    The queries are sorted by list, so that all queries of a list are multiplied with its keys at once. The results for
    the lists of a query are averaged, weighted by the sum of the exponentials of each list.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, nearest: Tensor, bounds: list[int]) -> Tensor:
        num_probes = nearest.shape[1]
        probes = nearest.flatten()
        order = torch.argsort(probes, stable=True)
        counts = torch.bincount(probes, minlength=len(bounds) - 1).cpu().numpy()
        stops, edges = counts.cumsum(), np.asarray(bounds)
        groups = np.stack([stops - counts, stops, edges[:-1], edges[1:]], axis=1)[counts > 0]
        partial, mass = attend_groups(queries.index_select(0, order // num_probes), keys, groups)
        # Back to the order of the queries: num_probes results for each.
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        mass = mass.index_select(0, position).view_as(nearest)
        normaliser = mass.logsumexp(1)
        shares = torch.exp(mass - normaliser[:, None])[:, None].to(partial.dtype)
        output = torch.bmm(shares, partial.index_select(0, position).view(*nearest.shape, -1))[:, 0]
        ctx.save_for_backward(queries, keys, output, normaliser, order // num_probes, position)
        ctx.groups = groups
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        queries, keys, output, normaliser, rows, position = ctx.saved_tensors
        # With the normaliser over all lists of a query, the gradients of its lists can be added.
        own, incoming, attended, masses = (
            source.index_select(0, rows) for source in (queries, gradients[0], output, normaliser)
        )
        partial, key_gradient = attend_groups_backward(own, incoming, attended, masses, keys, ctx.groups)
        query_gradient = partial.index_select(0, position).view(len(queries), -1, queries.shape[1]).sum(1)
        return query_gradient, key_gradient, None, None


def attend_groups(queries: Tensor, keys: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return the softmax attention of each group, [n, d], and the logarithm of the sum of its exponentials, [n]."""
    if on_gpu(queries):
        from crane_core.refine import attention_triton

        return attention_triton.attend(queries, keys, groups, "softmax")
    output, mass = torch.empty_like(queries), queries.new_empty(len(queries))
    for start, stop, first, last in groups.tolist():
        heads, part = queries[None, None, start:stop], keys[None, None, first:last]
        # scaled_dot_product_attention calls this operator, but does not return the sum of the exponentials.
        attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, part, part)
        output[start:stop], mass[start:stop] = attended[0, 0], logsumexp.flatten()
    return output, mass


def attend_groups_backward(
    queries: Tensor, incoming: Tensor, output: Tensor, normaliser: Tensor, keys: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `attend_groups`: of the queries [n, d] and of the keys [m, d].

    Args:
        queries, keys, groups: the inputs of `attend_groups`.
        incoming: gradient of the attention, [n, d].
        output: attention of each query over all its groups, [n, d].
        normaliser: logarithm of the sum of the exponentials over all its groups, [n].
    """
    if on_gpu(queries):
        from crane_core.refine import attention_triton

        statistics = normaliser, _delta(incoming, output)
        return attention_triton.attend_backward(queries, keys, incoming, statistics, groups, "softmax")
    query_gradient, key_gradient = torch.empty_like(queries), torch.zeros_like(keys)
    for start, stop, first, last in groups.tolist():
        rows, part = slice(start, stop), keys[None, None, first:last]
        own, as_keys, as_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            incoming[None, None, rows], queries[None, None, rows], part, part, output[None, None, rows],
            normaliser[None, rows, None], 0.0, False,
        )  # fmt: skip
        query_gradient[rows] = own[0, 0]
        key_gradient[first:last] += as_keys[0, 0] + as_values[0, 0]
    return query_gradient, key_gradient


def _delta(incoming: Tensor, output: Tensor) -> Tensor:
    """Return the product of the gradient and the output of each row, float32 [n]."""
    return (incoming.float() * output.float()).sum(1)
