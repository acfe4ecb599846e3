"""Own kernels beside what PyTorch offers for the same: which one is faster on this card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crane_core.model.propagation import SymmetricGraph
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, user_item_graph
from crane_core.refine.attention import Correlation, ListedKeys
from crane_core.refine.kernels import FusedAttention, any_algorithm, attend_groups
from tests.bench.gpu.plan import Plan, Row, distance, median_seconds, skipped, timed
from tests.bench.gpu.speed import world

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
TANH_BLOCKS = [(128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3)]
"""Rows, keys, warps and pipeline depth of the forward kernel; the first is the one in use."""
FLEX_BLOCK = 128


def run(plan: Plan) -> Iterator[Row]:
    """Time the forms in turn; what does not run here is a row with its reason."""
    yield from softmax(plan)
    yield from gradients(plan)
    yield from tanh_blocks(plan)
    yield from lists(plan)
    yield from products(plan)


def attempt(
    plan: Plan, what: str, compute: Callable[[], Tensor], expected: Tensor | None, limit: float, floor: dict[str, Any]
) -> Row:
    """Return the time of a form whose result is right, or why there is none."""
    try:
        found = compute()
        error = 0.0 if expected is None else distance(found, expected)
        if not error <= limit:
            return skipped(what, f"its result is off by {error:.1e}")
        seconds = median_seconds(plan.device, compute, plan.pick(3, 1))
    except Exception as error:  # whatever a kernel or a compiler raises is a result
        return skipped(what, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return timed(what, seconds, floor)


def floor_of(plan: Plan, flop: float, dtype: torch.dtype) -> dict[str, Any]:
    """Return the floor of products; one in float32 is three in TF32 where it is about as exact."""
    return plan.floor(3 * flop, "tf32", 0.0) if dtype == torch.float32 else plan.floor(flop, "bfloat16", 0.0)


def fused(queries: Tensor, keys: Tensor, backend: SDPBackend) -> Tensor:
    """Run PyTorch's fused attention by one of its kernels, as RCA does; with a gradient only by a deterministic one."""
    learns = torch.is_grad_enabled() and queries.requires_grad
    with sdpa_kernel([backend]), nullcontext() if learns else any_algorithm():
        return F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None])[0, 0]


def softmax(plan: Plan) -> Iterator[Row]:
    """Time softmax without a gradient: PyTorch's kernels, and our own."""
    from crane_core.refine import attention_triton

    num_queries, num_keys, dim = plan.pick((32_768, 1_000_000, 64), (60, 90, 8))
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-4)):
        queries, keys = (
            plan.normal(salt, size, dim).to(plan.device, dtype) for salt, size in ((1, num_queries), (2, num_keys))
        )
        everything = np.array([[0, num_queries, 0, num_keys]])
        floor = floor_of(plan, 4.0 * num_queries * num_keys * dim, dtype)
        own = attention_triton.attend(queries, keys, everything, "softmax")[0]
        name = f"{str(dtype)[6:]}, {num_queries:,} x {num_keys:,}"
        yield attempt(
            plan, f"softmax {name}: own kernel",
            lambda q=queries, k=keys, e=everything: attention_triton.attend(q, k, e, "softmax")[0], None, limit, floor,
        )  # fmt: skip
        for backend in BACKENDS:
            yield attempt(
                plan, f"softmax {name}: {backend.name}",
                lambda q=queries, k=keys, b=backend: fused(q, k, b), own, limit, floor,
            )  # fmt: skip


def gradients(plan: Plan) -> Iterator[Row]:
    """Time softmax forward and backward with the same bits in every run."""
    size, dim = plan.pick(16_384, 40), plan.pick(64, 8)
    for dtype, limit in ((torch.bfloat16, 3e-2), (torch.float32, 1e-4)):
        queries, keys, incoming = (plan.normal(salt, size, dim).to(plan.device, dtype) for salt in (1, 2, 3))

        def both(
            form: Callable[[Tensor, Tensor], Tensor], queries: Tensor = queries, keys: Tensor = keys,
            incoming: Tensor = incoming,
        ) -> Tensor:  # fmt: skip
            leaves = [rows.detach().clone().requires_grad_() for rows in (queries, keys)]
            form(*leaves).backward(incoming)
            return torch.cat([leaves[0].grad, leaves[1].grad])

        def by_own(queries: Tensor, keys: Tensor) -> Tensor:
            return FusedAttention.apply(queries, keys, "softmax")

        own, floor = both(by_own), floor_of(plan, 14.0 * size * size * dim, dtype)
        name = f"{str(dtype)[6:]}, {size:,} x {size:,}"
        what = f"softmax and gradients {name}"
        yield attempt(plan, f"{what}: own kernel", lambda both=both, form=by_own: both(form), None, limit, floor)
        for backend in BACKENDS:

            def by_torch(queries: Tensor, keys: Tensor, backend: SDPBackend = backend) -> Tensor:
                return fused(queries, keys, backend)

            compute = lambda both=both, form=by_torch: both(form)  # noqa: E731
            yield attempt(plan, f"{what}: {backend.name}", compute, own, limit, floor)


def tanh_blocks(plan: Plan) -> Iterator[Row]:
    """Time the tanh kernel in bfloat16 with other blocks than those in use."""
    from crane_core.refine import attention_triton

    num_queries, num_keys, dim = plan.pick((32_768, 1_000_000, 64), (60, 90, 8))
    queries, keys = (
        plan.normal(salt, size, dim).to(plan.device).bfloat16() for salt, size in ((1, num_queries), (2, num_keys))
    )
    everything = np.array([[0, num_queries, 0, num_keys]])
    blocks = attention_triton.BLOCKS["bfloat16", 128]
    used, expected = blocks["attend"], None
    for sizes in TANH_BLOCKS[: plan.pick(len(TANH_BLOCKS), 2)]:
        blocks["attend"] = sizes
        what = "tanh bfloat16, {} rows x {} keys, {} warps, depth {}".format(*sizes)
        compute = lambda: attention_triton.attend(queries, keys, everything, "tanh")[0]  # noqa: E731
        floor = floor_of(plan, 4.0 * num_queries * num_keys * dim, torch.bfloat16)
        yield attempt(plan, what, compute, expected, 2e-2, floor)
        expected = compute() if expected is None else expected
    blocks["attend"] = used


def lists(plan: Plan) -> Iterator[Row]:
    """Time the softmax over inverted lists: the own kernel, and FlexAttention with a block mask."""
    num_queries, num_keys, dim = plan.pick((32_768, 1_000_000, 64), (60, 300, 16))
    keys = plan.normal(1, num_keys, dim).to(plan.device)
    keys += 3 * plan.normal(2, plan.pick(1000, 5), dim).to(plan.device)[torch.arange(num_keys) % plan.pick(1000, 5)]
    prepared = Correlation("block", precision="bfloat16").prepare(keys)
    assert isinstance(prepared, ListedKeys)
    queries = keys[torch.randperm(num_keys, generator=plan.generator(3))[:num_queries].to(plan.device)].bfloat16()
    probes, order = prepared.nearest(queries).flatten().sort(stable=True)
    sorted_queries = queries[order // prepared.num_probes]
    counts = torch.bincount(probes, minlength=len(prepared.means)).cpu().numpy()
    stops, edges = counts.cumsum(), np.asarray(prepared.bounds)
    groups = np.stack([stops - counts, stops, edges[:-1], edges[1:]], axis=1)[counts > 0]
    pairs = int((counts * np.diff(edges)).sum())
    floor = floor_of(plan, 4.0 * dim * pairs, torch.bfloat16)
    what = f"softmax over lists bfloat16, {len(sorted_queries):,} queries of {num_keys:,} keys"
    own = attend_groups(sorted_queries, prepared.keys, groups)[0]
    compute = lambda: attend_groups(sorted_queries, prepared.keys, groups)[0]  # noqa: E731
    yield attempt(plan, f"{what}: own kernel", compute, None, 2e-2, floor)
    made: list[Callable[[], Tensor]] = []

    def flexible() -> Tensor:
        made.extend([] if made else [flex(plan, sorted_queries, prepared, probes)])
        return made[0]()

    yield attempt(plan, f"{what}: FlexAttention", flexible, own, 2e-2, floor)


def flex(plan: Plan, queries: Tensor, keys: ListedKeys, lists_of_queries: Tensor) -> Callable[[], Tensor]:
    """Return the same attention by FlexAttention, compiled; its mask holds the blocks that any list touches.

    Args:
        plan: of the part.
        queries: [n, d], sorted by list.
        keys: list by list.
        lists_of_queries: int64 [n], ascending.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    bounds, num_keys = torch.tensor(keys.bounds, device=queries.device), len(keys.keys)
    lists_of_keys = torch.arange(len(bounds) - 1, device=queries.device).repeat_interleave(bounds.diff())
    starts = torch.arange(0, len(queries), FLEX_BLOCK, device=queries.device)
    stops = (starts + FLEX_BLOCK).clamp(max=len(queries)) - 1
    first = bounds[lists_of_queries[starts]] // FLEX_BLOCK
    last = (bounds[lists_of_queries[stops] + 1] - 1) // FLEX_BLOCK
    counts = (last - first + 1).int()
    width = -(-num_keys // FLEX_BLOCK)
    places = torch.arange(width, device=queries.device)[None, :]
    indices = torch.where(places < counts[:, None], first[:, None] + places, 0).int()
    mask = BlockMask.from_kv_blocks(
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, q, k: lists_of_queries[q] == lists_of_keys[k],
        seq_lengths=(len(queries), num_keys),
    )
    compiled = torch.compile(flex_attention, backend="eager" if plan.rehearsal else "inductor", dynamic=False)
    heads, rows = queries[None, None], keys.keys[None, None]

    def compute() -> Tensor:
        with torch.no_grad():
            return compiled(heads, rows, rows, block_mask=mask)[0, 0]

    return compute


def products(plan: Plan) -> Iterator[Row]:
    """Time a product of the user-item graph with rows of 64: the embedding bag in use, and torch's CSR product."""
    interactions = world(plan)
    train, sizes = interactions.train, (interactions.num_users, interactions.num_items)
    matrix = user_item_graph(Edges(train.users(), train.items), Shards(sizes))
    graph, rows = SymmetricGraph(matrix, plan.device), plan.normal(1, matrix.shape[0], 64).to(plan.device)
    arrays = [torch.from_numpy(array).to(plan.device) for array in (matrix.indptr, matrix.indices, matrix.data)]
    floor: dict[str, Any] = plan.floor(2.0 * matrix.nnz * 64, "float32", matrix.nnz * (8 + 256.0) + 512.0 * len(rows))
    longest = int(np.diff(matrix.indptr).max())
    own = graph.multiply(rows)
    forms = {
        f"embedding bag, longest row {longest:,}": lambda: graph.multiply(rows),
        "CSR": lambda: torch.sparse_csr_tensor(*arrays, size=matrix.shape) @ rows,
    }
    for name, compute in forms.items():
        yield attempt(plan, f"product of the graph, {matrix.nnz:,} entries: {name}", compute, own, 1e-5, floor)
