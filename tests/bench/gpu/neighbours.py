"""The exact kNN on a GPU against brute force in float64, and faiss for GPUs where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import torch

from crane_core.graph.candidates import SearchResources, unit_rows, unpack
from crane_core.graph.exact import brute_force, nearest, top_fused, top_torch
from tests.bench.gpu.plan import Plan, Row, compared, median_seconds, skipped, timed

KINDS = ("random", "near ties", "duplicates", "zero rows", "all equal")


def run(plan: Plan) -> Iterator[Row]:
    """Compare neighbours and similarities with those of brute force: not one may differ."""
    num_rows, dim, k = plan.pick((20_000, 64, 10), (300, 8, 5))
    for number, kind in enumerate(KINDS):
        rows = make_rows(kind, num_rows, dim, np.random.default_rng(plan.seed + number))
        sample = np.linspace(0, num_rows - 1, plan.pick(1000, 60)).astype(np.int64)
        expected = brute_force(rows, sample, k)
        memories = plan.pick((1 << 30, 24 << 20), (1 << 24, 1 << 17))
        for top, memory in ((top_fused, memories[0]), (top_fused, memories[1]), (top_torch, memories[1])):
            resources = SearchResources(plan.device, memory)
            found, similarities = unpack(nearest(rows, range(num_rows), k, resources=resources, top=top))
            unit = unit_rows(rows).astype(np.float64)
            exact = np.einsum("nd,nkd->nk", unit[sample], unit[expected]).astype(np.float32)
            different = float((found[sample] != expected).mean() + (similarities[sample] != exact).mean())
            yield compared(f"neighbours of {kind} by {top.__name__}, {memory >> 20} MiB", different, 0.0)
    queries = np.arange(5, num_rows, 7)
    rows = make_rows("duplicates", num_rows, dim, np.random.default_rng(plan.seed))
    parts = [range(num_rows // 3), range(num_rows // 3, num_rows)]
    packed = [
        nearest(rows, queries, k, keys=part, resources=SearchResources(plan.device, memories[0]), top=top_fused)
        for part in parts
    ]
    merged = unpack(np.sort(np.concatenate(packed, axis=1), axis=1)[:, :k])[0]
    different = float((merged != brute_force(rows, queries, k)).mean())
    yield compared("neighbours in two shards of the keys, merged", different, 0.0)


def make_rows(kind: str, num_rows: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Make rows that are hard for a search, float32 [num_rows, dim]."""
    rows = generator.standard_normal((num_rows, dim), np.float32)
    if kind == "near ties":
        return rows[:20].repeat(-(-num_rows // 20), axis=0)[:num_rows] + np.float32(1e-4) * rows
    if kind == "duplicates":
        return rows[generator.integers(num_rows // 4, size=num_rows)]
    if kind == "zero rows":
        rows[::3] = 0
    if kind == "all equal":
        rows[:] = rows[0]
    return rows


def run_faiss(plan: Plan) -> Iterator[Row]:
    """Import faiss and search with it: on a GPU where its build can, else on the CPU."""
    if importlib.util.find_spec("faiss") is None:
        yield skipped("faiss", "faiss is not installed")
        return
    import faiss

    num_keys, num_queries, dim, width = plan.pick((1_000_000, 20_000, 64, 11), (500, 50, 8, 4))
    unit = unit_rows(np.random.default_rng(plan.seed).standard_normal((num_keys, dim), np.float32))
    queries = np.ascontiguousarray(unit[:num_queries])
    on_gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if plan.device.type == "cuda" and not on_gpu:
        yield skipped("faiss on the GPU", f"faiss {faiss.__version__} is a build for CPUs, or sees no GPU")
        num_keys, unit, queries = 50_000, np.ascontiguousarray(unit[:50_000]), queries[:500]
    metric = faiss.METRIC_INNER_PRODUCT
    if on_gpu:
        resources = faiss.StandardGpuResources()

        def search() -> tuple[np.ndarray, np.ndarray]:
            return faiss.knn_gpu(resources, queries, unit, width, metric=metric)
    else:

        def search() -> tuple[np.ndarray, np.ndarray]:
            return faiss.knn(queries, unit, width, metric=metric)

    place = "on the GPU" if on_gpu else "on the CPU"
    values, found = search()
    scores = torch.from_numpy(queries[:200]).double() @ torch.from_numpy(unit).double().T
    exact = scores.topk(width, dim=1).values
    error = float((torch.from_numpy(values[:200]).double() - exact).abs().max())
    error = max(error, float((scores.gather(1, torch.from_numpy(found[:200]).long()) - exact).abs().max()))
    yield compared(f"faiss {faiss.__version__} {place}", error, 1e-5)
    seconds = median_seconds(plan.device, search, 3)
    floor = plan.floor(2.0 * len(queries) * len(unit) * dim, "float32", 4.0 * len(unit) * dim)
    yield timed(f"faiss {place}, {len(queries):,} of {len(unit):,} x {dim}", seconds, floor)
