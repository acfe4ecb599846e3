"""How fast RCA, the exact kNN, training and ranking are on a GPU at a million items or users."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crane_core.config import Phi, Precision
from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.ranking import dot_product, rank_blocks, users_at_a_time
from crane_core.graph.candidates import SearchResources, unpack
from crane_core.graph.exact import brute_force, nearest, top_fused
from crane_core.refine.attention import Correlation, DenseKeys, Keys
from crane_core.refine.recursion import Recursion, RecursiveCrossModalAttention
from crane_core.training.trainer import Trainer
from tests.bench.bench_rca import count_pairs, exhaust
from tests.bench.device import synthetic, wait_for
from tests.bench.gpu.attention import dense
from tests.bench.gpu.plan import Plan, Row, compared, distance, once, skipped, timed
from tests.bench.trainers import make_trainer
from tests.worlds.settings import model_config

FORMS: list[tuple[Phi, Precision, float | None]] = [
    ("softmax", "bfloat16", 4.0),
    ("tanh", "bfloat16", 6.0),
    ("linear", "float32", None),
    ("landmark", "bfloat16", None),
    ("block", "bfloat16", None),
    ("softmax", "float32", None),
    ("tanh", "float32", None),
]
"""Correlation function, number type, and the seconds that are the target."""
NUM_RECURSIONS, NUM_MODALITIES, CHUNK_SIZE = 3, 2, 16_384
SLACK = 1.3
"""A run is begun when this many times its expected seconds are left."""
LONGEST = 25.0
"""Seconds that a whole run of RCA may be expected to take; longer ones are foretold from a quarter of the items."""


def run_rca(plan: Plan) -> Iterator[Row]:
    """Time three recursions over all items, two modalities each; a quarter of the items first, which foretells it."""
    num_items, dim = plan.pick((1_000_000, 64), (48, 8))
    generator = plan.generator(1)
    centres = torch.randn(plan.pick(1000, 4), NUM_MODALITIES, dim, generator=generator).to(plan.device)
    whole = centres[torch.randint(len(centres), (num_items,), generator=generator).to(plan.device)]
    whole += 0.5 * torch.randn(whole.shape, device=plan.device)
    for phi, precision, target in FORMS:
        correlation = Correlation(phi, precision=precision)
        model = RecursiveCrossModalAttention(NUM_MODALITIES, dim, NUM_RECURSIONS, correlation, generator)
        model.to(plan.device)
        exhaust(model, whole[: num_items // 16].clone(), whole[:10].clone(), CHUNK_SIZE)
        quarter = whole[: num_items // 4].clone()
        seconds, peak = once(plan.device, lambda m=model, q=quarter: exhaust(m, q, q[:0].clone(), CHUNK_SIZE))
        if phi in ("softmax", "tanh", "linear"):
            yield sample_of_keys(plan, model, whole, phi, precision)
        ratio = {"softmax": 16, "tanh": 16, "linear": 4}.get(phi, 8)
        note, quarter_peak = "from a quarter of the items", peak
        if SLACK * ratio * seconds < plan.left() and ratio * seconds < LONGEST:
            rows = whole.clone()
            seconds, peak = once(plan.device, lambda m=model, r=rows: exhaust(m, r, r[:0].clone(), CHUNK_SIZE))
            note = f"peak beyond the keys {(peak - 4 * dim * num_items) / 1e9:.2f} GB"
        else:
            seconds *= ratio
        yield timed(
            f"RCA {phi} {precision}, {num_items:,} items, d = {dim}, M = {NUM_MODALITIES}, R = {NUM_RECURSIONS}",
            seconds,
            rca_floor(plan, model, whole, precision),
            peak,
            target_seconds=plan.pick(target, None),
            note=f"{note}; of a quarter {(quarter_peak - dim * num_items) / 1e9:.2f} GB",
        )


def first_keys(model: RecursiveCrossModalAttention, rows: Tensor) -> tuple[Recursion, Keys]:
    """Return the first recursion and its keys."""
    recursion = model.recursions[0]
    assert isinstance(recursion, Recursion)
    return recursion, model.correlation.prepare(recursion.joint_rows(rows))


@torch.no_grad()
def sample_of_keys(
    plan: Plan, model: RecursiveCrossModalAttention, rows: Tensor, phi: Phi, precision: Precision
) -> Row:
    """Compare the attention of some queries to all keys with float64: an index that overflows shows here only."""
    recursion, keys = first_keys(model, rows)
    picked = torch.linspace(0, len(rows) - 1, plan.pick(64, 8)).long().to(plan.device)
    queries, source = rows[picked, 0] @ recursion.correlation[0], recursion.joint_rows(rows)
    if precision == "bfloat16":
        exact = [each.bfloat16().double() for each in (queries, source)]
    else:
        exact = [each.double() for each in (queries, source)]
    error = distance(keys.attend(queries, CHUNK_SIZE), dense(*exact, phi, None))
    limit = 2e-2 if precision == "bfloat16" else 1e-4
    return compared(f"attention {phi} {precision} to {len(rows):,} keys", error, limit)


@torch.no_grad()
def rca_floor(plan: Plan, model: RecursiveCrossModalAttention, rows: Tensor, precision: Precision) -> dict[str, Any]:
    """Return the floor: two products for each pair of query and key, and three more of d x d for each row."""
    dim, sample = rows.shape[2], rows[: plan.pick(20_000, 16)]
    recursion, keys = first_keys(model, rows)
    pairs = count_pairs(keys, sample[:, 0] @ recursion.correlation[0]) / len(sample)
    flop = NUM_RECURSIONS * NUM_MODALITIES * len(rows) * (4 * dim * pairs + 6 * dim * dim)
    num_bytes = NUM_RECURSIONS * 3.0 * rows.nbytes
    if isinstance(keys, DenseKeys) and precision == "float32":
        # About as exact as float32: three products in TF32 for one.
        return plan.floor(3 * flop, "tf32", num_bytes)
    return plan.floor(flop, precision, num_bytes)


def run_knn(plan: Plan) -> Iterator[Row]:
    """Time the exact search among all rows with the memory of the default and with more."""
    num_rows, dim, k = plan.pick((1_000_000, 64, 10), (600, 8, 3))
    generator = np.random.default_rng(plan.seed)
    centres = generator.standard_normal((plan.pick(1000, 5), dim), np.float32)
    rows = centres[generator.integers(len(centres), size=num_rows)]
    rows += 0.5 * generator.standard_normal((num_rows, dim), np.float32)
    # About as exact as float32: three products in bfloat16 for one.
    floor = plan.floor(3 * 2.0 * num_rows**2 * dim, "bfloat16", 8.0 * num_rows * dim)

    def search(stop: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
        return unpack(nearest(rows, range(stop), k, resources=SearchResources(plan.device, memory), top=top_fused))

    sample = np.linspace(0, num_rows // 16, plan.pick(100, 10)).astype(np.int64)
    expected = brute_force(rows, sample, k)
    for memory in plan.pick((8 << 30, 1 << 30), (1 << 24, 1 << 18)):
        found, _ = search(num_rows // 16 + 1, memory)
        yield compared(f"neighbours, {memory >> 20} MiB", float((found[sample] != expected).mean()), 0.0)
        seconds, peak = once(plan.device, lambda memory=memory: search(num_rows // 16, memory))
        note = "from a sixteenth of the queries"
        if SLACK * 16 * seconds < plan.left():
            seconds, peak = once(plan.device, lambda memory=memory: search(num_rows, memory))
            note = ""
        else:
            seconds *= 16
        what = f"kNN exact, {num_rows:,} x {dim}, k = {k}, {memory >> 20} MiB"
        yield timed(what, seconds, floor, peak, target_seconds=plan.pick(3.0, None), note=note)


def world(plan: Plan) -> Interactions:
    """Return the interactions that all parts share; the first part that asks makes them."""
    num_users, num_items, num_interactions = plan.pick((1_000_000, 300_000, 42_000_000), (200, 100, 2000))
    file = plan.work / "train.npz"
    if not file.exists():
        made = synthetic(num_users, num_items, num_interactions).train
        scratch = plan.work / "part.npz"
        np.savez(scratch, indptr=made.indptr, items=made.items)
        scratch.replace(file)
    with np.load(file) as arrays:
        train = ItemLists(arrays["indptr"], arrays["items"])
    nothing = ItemLists.from_pairs(np.empty(0, np.int64), np.empty(0, np.int32), num_users)
    return Interactions(num_users, num_items, train, nothing, nothing)


def run_lightgcn(plan: Plan) -> Iterator[Row]:
    """Time an epoch of LightGCN in batches of 65,536."""
    batch_size, number = plan.pick((65_536, 16), (64, 4))
    yield from epoch(plan, crane=False, target=20.0, batch_size=batch_size, batches_per_step=number)


def run_crane(plan: Plan) -> Iterator[Row]:
    """Time an epoch of CRANE in large batches, then with the steps of the preset `million`."""
    begun = plan.left()
    for batch_size, number in plan.pick(((16_384, 64), (4096, 256)), ((64, 4), (32, 8))):
        if begun - plan.left() > plan.left():
            yield skipped(f"CRANE, {number} x {batch_size}", "no time left")
            return
        yield from epoch(plan, crane=True, target=60.0, batch_size=batch_size, batches_per_step=number)


def epoch(plan: Plan, *, crane: bool, target: float, batch_size: int, batches_per_step: int) -> Iterator[Row]:
    """Time as many steps as there is time for, a sixteenth of a step first, and foretell the epoch."""
    name = f"{'CRANE' if crane else 'LightGCN'}, {batches_per_step} x {batch_size}"
    config = model_config(
        batch_size=batch_size, batches_per_step=batches_per_step, learning_rate=5e-4, embedding_dim=plan.pick(64, 8)
    )
    started = time.perf_counter()
    interactions = world(plan)
    yield {"what": f"{name}: interactions", "seconds": time.perf_counter() - started, **NO_FLOOR}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trainer = make_trainer(interactions, config, Path(folder), plan.device, crane)
        yield {"what": f"{name}: graph, model, optimiser", "seconds": time.perf_counter() - started, **NO_FLOOR}
        started = time.perf_counter()
        graph = trainer.epoch_graph()
        drawing = time.perf_counter() - started
        yield {"what": f"{name}: the graph of an epoch", "seconds": drawing, **NO_FLOOR}
        order, size = trainer.batches.order(0), trainer.batches.step_size

        def step(number: int, rows: int) -> float:
            picked = order[number * size :][:rows]
            wait_for(plan.device)
            begun = time.perf_counter()
            trainer.step(graph, trainer.batches.of_step(picked, 0, number), len(picked))
            wait_for(plan.device)
            trainer.progress.step += 1
            return time.perf_counter() - begun

        step(0, size // 16)
        least, measured = step(0, size // 16), []
        num_steps = trainer.batches.num_steps()
        for number in range(num_steps):
            expected = measured[-1] if measured else 16 * least
            # Half of the time is for others: CRANE has two sizes of batches.
            if SLACK * expected > plan.left() / 2 or len(measured) >= 5:
                break
            measured.append(step(number, size))
        mean = sum(measured) / len(measured) if measured else 16 * least
        note = (
            f"{len(measured)} of {num_steps} steps" if measured else "from a sixteenth of a step, too much if anything"
        )
        peak = torch.cuda.max_memory_allocated() if plan.device.type == "cuda" else None
        seconds, floor = drawing + num_steps * mean, epoch_floor(plan, trainer, crane)
        yield timed(f"epoch of {name}", seconds, floor, peak, target_seconds=plan.pick(target, None), note=note)


NO_FLOOR: dict[str, Any] = {"floor_seconds": None, "floor_of": "", "times_floor": None, "peak_bytes": None}


def epoch_floor(plan: Plan, trainer: Trainer, crane: bool) -> dict[str, Any]:
    """Return the floor of an epoch: the products with the graph read a row for each entry; CRANE scores negatives."""
    dim, settings = trainer.config.lightgcn.embedding_dim, trainer.config.crane
    entries, num_nodes = trainer.graph.matrix.nnz, trainer.graph.matrix.shape[0]
    products = 2 * (trainer.config.lightgcn.num_layers + crane)
    steps, rows = trainer.batches.num_steps(), len(trainer.batches.learned)
    num_bytes = steps * products * (entries * (8 + 4.0 * dim) + 4.0 * num_nodes * dim)
    # Three products forward and backward for each pair that is scored: negatives, and contrasted nodes of both kinds.
    batch_size = trainer.config.train.batch_size
    contrasted = min(batch_size, settings.contrast_nodes or batch_size)
    pairs = settings.num_negatives + 2 * contrasted**2 / batch_size if crane else 1
    return plan.floor(6.0 * dim * pairs * rows, "float32", num_bytes)


def run_ranking(plan: Plan) -> Iterator[Row]:
    """Time the ranking of all users over all items, with the block of the default and with a larger one."""
    seen = world(plan)
    dim, k = plan.pick(64, 8), 20
    sizes = seen.num_users, seen.num_items
    users, items = (plan.normal(size, size, dim).to(plan.device) for size in sizes)
    flop = 2.0 * len(users) * len(items) * dim
    floor = plan.floor(flop, "float32", 8.0 * len(users) * len(items))

    def rank(count: int, block: int) -> None:
        for _ in rank_blocks(dot_product(users, items), seen.train, np.arange(count), k, block):
            pass

    for block in (plan.pick(4096, 64), users_at_a_time(len(items))):
        part = min(4 * block, len(users))
        rank(part, block)
        seconds, peak = once(plan.device, lambda part=part, block=block: rank(part, block))
        note, share = f"from {part:,} users", len(users) / part
        if SLACK * share * seconds < plan.left() / 2:
            seconds, peak = once(plan.device, lambda block=block: rank(len(users), block))
            note, share = "", 1.0
        what = f"ranking {len(users):,} users x {len(items):,} items, {block} at a time"
        seconds *= share
        target = 2 * flop / plan.ceilings["float32"] if plan.ceilings else None
        yield timed(what, seconds, floor, peak, target_seconds=plan.pick(target, None), note=note)
