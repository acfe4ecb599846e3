"""Estimate the memory that a training needs, and compare it with what is free."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from crane_core.errors import TrainingError
from crane_core.model.lightgcn import LightGCN

_FLOAT = 4
_EDGE = 16
"""Bytes of an edge in a graph: a column and a value in the row of either end."""
_LISTED_EDGE = 20
"""Bytes of an edge in lists: its user, its number among the interactions to learn from, its place in an epoch."""
_DRAWN_EDGE = 20
"""Further bytes of an edge while graphs are built and the edges of an epoch are drawn; no step runs meanwhile."""
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(model: LightGCN, num_edges: int, device: torch.device, free: int) -> None:
    """Refuse a training that cannot fit, before its graph is built.

    Args:
        model: of the training.
        num_edges: training interactions.
        device: of the model.
        free: bytes that are free there.

    Raises:
        TrainingError: with the batch, or else the width and the means, that would fit.
    """
    batch_size, dim = model.config.train.batch_size, model.config.lightgcn.embedding_dim
    edges = edge_bytes(model, num_edges, device)
    nodes, rows = node_bytes(model, dim), batch_bytes(model, batch_size, dim)
    laid_out = edges + (0 if device.type == "cuda" else _DRAWN_EDGE * num_edges)
    needed = max(edges + nodes + rows, laid_out)
    if needed <= free:
        return
    left = free - edges if laid_out <= free else 0
    fitting = bisect(range(1, batch_size), left - nodes, key=lambda size: batch_bytes(model, size, dim))
    if fitting:
        remedy = f"Set train.batch_size to {fitting} or less, and train.batches_per_step higher by the same factor."
    else:
        # Ranks that share a machine's memory need more of it together than one alone.
        remedy = "Train on more or larger machines or GPUs, with no more ranks on a machine's CPU"
        fitting = bisect(
            range(1, dim), left, key=lambda dim: node_bytes(model, dim) + batch_bytes(model, batch_size, dim)
        )
        remedy += f", or set lightgcn.embedding_dim to {fitting} or less." if fitting else "."
    raise TrainingError(
        f"Training needs about {needed / 1e9:.2f} GB: {edges / 1e9:.2f} GB for {num_edges} edges, and in a step "
        f"{nodes / 1e9:.2f} GB for the rows of {model.shards.num_rows} nodes and {rows / 1e9:.2f} GB for {batch_size} "
        f"interactions; {free / 1e9:.2f} GB are free.",
        remedy,
    )


def edge_bytes(model: LightGCN, num_edges: int, device: torch.device) -> int:
    """Return the bytes that the edges take on the device, beside their items.

    These are this rank's rows of the graph and of the graph of an epoch; on a CPU also the lists of all edges, which
    every rank holds. The graph that others are sampled from is not moved to a GPU.
    """
    on_gpu, num_neighbours = device.type == "cuda", model.config.train.num_neighbours
    in_graphs = 0 if on_gpu and num_neighbours is not None else num_edges
    if num_neighbours is not None:
        in_graphs += min(num_edges, num_neighbours * model.shards.num_rows)
    elif model.edge_dropout:
        in_graphs += round(num_edges * (1 - model.edge_dropout))
    return _EDGE * in_graphs // model.shards.world_size + (0 if on_gpu else _LISTED_EDGE * num_edges)


def node_bytes(model: LightGCN, dim: int) -> int:
    """Return the bytes that a step of `dim` columns takes for the nodes, beside graphs, embeddings and frozen content.

    For a node of this rank: gradient, two moments, propagated layers, and the parts of CRANE's views. For a node of all
    ranks and every view: the gathered rows, the rows that the loss reads, and their gradient. The refinement of a joint
    training is not counted.
    """
    local = (4 + model.num_views) * dim + model.content_width
    return (local * model.shards.num_local + 3 * model.num_views * dim * model.shards.num_rows) * _FLOAT


def batch_bytes(model: LightGCN, batch_size: int, dim: int) -> int:
    """Bytes a step holds for the rows of a batch.

    By row: its users, positives and negatives, what the loss makes of them, and the gradients; under `softmax` its
    scores and the mask. By pair of contrasted nodes: scores and, where users are contrasted with items, two masks.
    """
    row = 18 * dim * _FLOAT + ((_FLOAT + 1) * model.config.crane.num_negatives if model.shares_negatives else 0)
    users, items = (min(batch_size, size, model.contrasted_nodes or size) for size in model.shards.sizes)
    pairs = 0
    if model.num_views > 1:
        pairs = (_FLOAT + 2) * (users + items) ** 2 if model.contrasts_kinds else _FLOAT * (users**2 + items**2)
    return batch_size * row + pairs


@contextmanager
def naming_out_of_memory() -> Iterator[None]:
    """Turn what numpy and torch raise when there is no more memory into an error with a remedy.

    Raises:
        TrainingError: memory ran out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch has no type of its own for it.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            found = " ".join(str(error).split()) or type(error).__name__
            raise TrainingError(
                f"Memory ran out: {found}", "Use more or larger machines or GPUs, or a smaller lightgcn.embedding_dim."
            ) from error
        raise


def free_bytes(device: torch.device) -> int:
    """Memory a training may still take: of the device, or of this machine and the control group it runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:
        return 2**63 - 1
    try:
        limit, used, details = (
            (_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current", "memory.stat")
        )
    except OSError:
        return free
    # Pages of files count as used, and are given back before anybody is killed.
    cached = next((int(line.split()[1]) for line in details.splitlines() if line.startswith("inactive_file ")), 0)
    return free if limit == "max" else min(free, int(limit) - int(used) + cached)
