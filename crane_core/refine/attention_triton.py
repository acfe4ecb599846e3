"""Triton kernels of RCA for GPUs: tanh attention, and softmax over groups of keys; keys are the values.

They do three things that PyTorch's fused attention does not. They compute tanh in place of softmax. They compute many
small attentions in one launch for the inverted lists of `block`, and return the sum of the exponentials of each, so
that the results can be merged. And their backward pass gives the same bits in every run on all multiprocessors. Blocks
of scores stay in registers, forward and backward; products are summed in float32. Inputs are bfloat16, or float32: then
each product is three TF32 products, about as exact as float32.

Tested on a CPU by Triton's interpreter against float64 (`tests/unit/refine/test_attention_triton.py`), and on a GPU by
`tests/bench/gpu.sh`, which also measures speed and block sizes. Imported only where a tensor lies on a GPU.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from crane_core.errors import ConfigError
from crane_core.refine.kernels import MOST_DIMS, Groups

Kernel = Literal["attend", "query_gradient", "key_gradient"]
BLOCKS: dict[tuple[str, int], dict[Kernel, tuple[int, int, int, int]]] = {
    ("bfloat16", 128): {"attend": (128, 64, 8, 3), "query_gradient": (64, 64, 4, 3), "key_gradient": (64, 64, 4, 3)},
    ("float32", 64): {"attend": (128, 32, 8, 2), "query_gradient": (64, 32, 4, 2), "key_gradient": (32, 64, 4, 2)},
    ("float32", 128): {"attend": (64, 32, 8, 2), "query_gradient": (32, 32, 8, 2), "key_gradient": (32, 64, 8, 2)},
}
"""By number type and largest width: rows and keys of a block of scores, warps of a program, depth of its pipeline.

Chosen by what the compiler reports for sm_90: the shared memory of a multiprocessor suffices, and rows of up to 64
numbers spill no register. In bfloat16 the forward block is the fastest of six on an H200 (`tests/bench/gpu.sh`)."""

Phi = Literal["softmax", "tanh"]


def attend(queries: Tensor, keys: Tensor, groups: Groups, phi: Phi) -> tuple[Tensor, Tensor]:
    """Return the attention of each group of queries to its keys.

    Args:
        queries: float32 or bfloat16 [n, d], contiguous, d <= 128.
        keys: like the queries, [m, d].
        groups: of queries and their keys.
        phi: `softmax`, or `tanh`; the sum over the keys of `tanh` is not divided.

    Returns:
        output like the queries [n, d], and for `softmax` the logarithm of the sum of the exponentials, float32 [n].

    Raises:
        ConfigError: the rows are too wide.
    """
    queries, keys = queries.contiguous(), keys.contiguous()
    output, mass = torch.empty_like(queries), queries.new_empty(len(queries), dtype=torch.float32)
    settings = constants(queries.dtype, queries.shape[1], phi, "attend")
    tiles = _tiles(groups, settings["ROWS"], queries.device)
    _attend[(len(tiles),)](queries, keys, output, mass, tiles, queries.shape[1] ** -0.5, **settings)
    return output, mass


def attend_backward(
    queries: Tensor,
    keys: Tensor,
    incoming: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    groups: Groups,
    phi: Phi,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `attend`.

    Args:
        queries, keys, groups, phi: as given to `attend`; a key is in one group at most.
        incoming: gradient of the output, [n, d].
        statistics: for `softmax`, two float32 [n]: the logarithm of the sum of the exponentials, and the product of
            the gradient and the output of each row. Both cover all groups of a row whose keys are in several groups.

    Returns:
        gradients like the queries [n, d] and like the keys [m, d].
    """
    queries, keys = queries.contiguous(), keys.contiguous()
    incoming = incoming.to(keys.dtype).contiguous()
    normaliser, delta = statistics or (queries.new_empty(0, dtype=torch.float32),) * 2
    query_gradient, key_gradient = torch.empty_like(queries), torch.zeros_like(keys)
    given = (queries, keys, incoming, normaliser.contiguous(), delta.contiguous())
    scale = queries.shape[1] ** -0.5
    settings = constants(queries.dtype, queries.shape[1], phi, "query_gradient")
    tiles = _tiles(groups, settings["ROWS"], queries.device)
    _query_gradient[(len(tiles),)](*given, query_gradient, tiles, scale, **settings)
    settings = constants(queries.dtype, queries.shape[1], phi, "key_gradient")
    tiles = _tiles(groups[:, [2, 3, 0, 1]], settings["KEYS"], queries.device)
    _key_gradient[(len(tiles),)](*given, key_gradient, tiles, scale, **settings)
    return query_gradient, key_gradient


def constants(dtype: torch.dtype, dim: int, phi: Phi, kernel: Kernel) -> dict[str, Any]:
    """Return the compile-time constants and the launch options of a kernel.

    Raises:
        ConfigError: the rows are too wide.
    """
    if dim > MOST_DIMS:
        raise ConfigError(
            f"The GPU kernels of {phi} over groups take rows of up to {MOST_DIMS} numbers, found {dim}.",
            f"Lower refine.embedding_dim to {MOST_DIMS}, or choose refine.phi softmax, landmark or linear.",
        )
    name = str(dtype).removeprefix("torch.")
    widest = min(widest for known, widest in BLOCKS if known == name and dim <= widest)
    num_rows, num_keys, num_warps, num_stages = BLOCKS[name, widest][kernel]
    return {
        "DIM": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "TANH": phi == "tanh",
        "PRECISION": "interpreted" if triton.knobs.runtime.interpret else "tf32x3",
        "ROWS": num_rows,
        "KEYS": num_keys,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _tiles(groups: Groups, block: int, device: torch.device) -> Tensor:
    """Cut the groups into blocks along their first range: int64 [num_tiles, 4]."""
    counts = -(-(groups[:, 1] - groups[:, 0]) // block)
    tiles = np.repeat(groups, counts, axis=0)
    inside = np.arange(len(tiles)) - np.repeat(counts.cumsum() - counts, counts)
    tiles[:, 0] += inside * block
    tiles[:, 1] = np.minimum(tiles[:, 0] + block, tiles[:, 1])
    return torch.from_numpy(tiles).to(device)


@triton.jit
def _load(source, index, stop, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows of a matrix, and zeros behind the last one."""
    columns = tl.arange(0, WIDTH)
    inside = (index < stop)[:, None] & (columns < DIM)[None, :]
    return tl.load(source + index[:, None] * DIM + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(target, index, stop, values, DIM: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    inside = (index < stop)[:, None] & (columns < DIM)[None, :]
    tl.store(target + index[:, None] * DIM + columns[None, :], values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr):
    """Return the matrix product, summed in float32."""
    if PRECISION == "interpreted":
        # The interpreter would multiply the bit patterns of bfloat16. Products of bfloat16 are exact in float32.
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _products(left, right, PRECISION: tl.constexpr):
    return _dot(left, tl.trans(right), PRECISION)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _attend(
    queries, keys, output, mass, tiles, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    stop, first, last = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rows = tl.load(tile) + tl.arange(0, ROWS)
    block = _load(queries, rows, stop, DIM, WIDTH)
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_mass = tl.zeros([ROWS], dtype=tl.float32)
    for at in range(first, last, KEYS):
        columns = at + tl.arange(0, KEYS)
        part = _load(keys, columns, last, DIM, WIDTH)
        scores = _products(block, part, PRECISION) * scale
        if TANH:
            weights = _tanh(scores)
        else:
            scores = tl.where((columns < last)[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp(top - new_top)
            weights = tl.exp(scores - new_top[:, None])
            row_mass = row_mass * shrink + tl.sum(weights, 1)
            total = total * shrink[:, None]
            top = new_top
        total += _dot(weights.to(part.dtype), part, PRECISION)
    if not TANH:
        total = total / row_mass[:, None]
        tl.store(mass + rows, top + tl.log(row_mass), mask=rows < stop)
    _store(output, rows, stop, total, DIM, WIDTH)


@triton.jit
def _query_gradient(
    queries, keys, incoming, normaliser, delta, gradient, tiles, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    stop, first, last = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rows = tl.load(tile) + tl.arange(0, ROWS)
    block, arrived = _load(queries, rows, stop, DIM, WIDTH), _load(incoming, rows, stop, DIM, WIDTH)
    if not TANH:
        row_normaliser = tl.load(normaliser + rows, mask=rows < stop, other=0.0)
        row_delta = tl.load(delta + rows, mask=rows < stop, other=0.0)
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for at in range(first, last, KEYS):
        columns = at + tl.arange(0, KEYS)
        part = _load(keys, columns, last, DIM, WIDTH)
        scores = _products(block, part, PRECISION) * scale
        slope = _products(arrived, part, PRECISION)
        if TANH:
            weights = _tanh(scores)
            slope = slope * (1.0 - weights * weights)
        else:
            weights = tl.exp(scores - row_normaliser[:, None])
            slope = tl.where((columns < last)[None, :], weights * (slope - row_delta[:, None]), 0.0)
        total += _dot(slope.to(part.dtype), part, PRECISION)
    _store(gradient, rows, stop, total * scale, DIM, WIDTH)


@triton.jit
def _key_gradient(
    queries, keys, incoming, normaliser, delta, gradient, tiles, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    stop, first, last = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    columns = tl.load(tile) + tl.arange(0, KEYS)
    part = _load(keys, columns, stop, DIM, WIDTH)
    as_values = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    as_keys = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    for at in range(first, last, ROWS):
        rows = at + tl.arange(0, ROWS)
        block, arrived = _load(queries, rows, last, DIM, WIDTH), _load(incoming, rows, last, DIM, WIDTH)
        scores = _products(part, block, PRECISION) * scale
        slope = _products(part, arrived, PRECISION)
        if TANH:
            weights = _tanh(scores)
            slope = slope * (1.0 - weights * weights)
        else:
            row_normaliser = tl.load(normaliser + rows, mask=rows < last, other=float("inf"))
            row_delta = tl.load(delta + rows, mask=rows < last, other=0.0)
            weights = tl.exp(scores - row_normaliser[None, :])
            slope = weights * (slope - row_delta[None, :])
        as_values += _dot(weights.to(part.dtype), arrived, PRECISION)
        as_keys += _dot(slope.to(part.dtype), block, PRECISION)
    _store(gradient, columns, stop, as_values + as_keys * scale, DIM, WIDTH)
