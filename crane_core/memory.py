"""What a step of training needs in memory, and what there is."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from crane_core.errors import TrainingError
from crane_core.model import LightGCN

_FLOAT = 4
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(model: LightGCN, free: int) -> None:
    """Refuse a training whose step cannot fit, before it is killed for it.

    Args:
        model: what a step propagates and learns from.
        free: bytes.

    Raises:
        TrainingError: with the batch, or else the width and the means, that would fit.
    """
    batch_size, dim = model.config.batch_size, model.config.embedding_dim
    nodes, rows = node_bytes(model, dim), batch_bytes(model, batch_size, dim)
    if nodes + rows <= free:
        return
    fitting = bisect(range(1, batch_size), free - nodes, key=lambda size: batch_bytes(model, size, dim))
    if fitting:
        remedy = f"Set train.batch_size to {fitting} or less, and train.batches_per_step higher by the same factor."
    else:
        # Ranks that share a machine's memory need more of it together than one alone.
        remedy = "Train on more or larger machines or GPUs, with no more ranks on a machine's CPU"
        fitting = bisect(
            range(1, dim), free, key=lambda dim: node_bytes(model, dim) + batch_bytes(model, batch_size, dim)
        )
        remedy += f", or set train.embedding_dim to {fitting} or less." if fitting else "."
    raise TrainingError(
        f"A step needs about {(nodes + rows) / 1e9:.2f} GB, of which {nodes / 1e9:.2f} GB for the rows of "
        f"{model.shards.num_rows} nodes and {rows / 1e9:.2f} GB for {batch_size} interactions; {free / 1e9:.2f} GB are "
        "free.",
        remedy,
    )


def node_bytes(model: LightGCN, dim: int) -> int:
    """Bytes a step of `dim` columns holds for the nodes, beside graphs, embeddings and frozen content.

    By node of this rank: gradient, two moments, the propagated layers, and what CRANE's views are made of; by node of
    all ranks and view: the gathered rows, the rows the loss reads, and their gradient. The refinement of a joint
    training is not in it.
    """
    local = (4 + model.num_views) * dim + model.content_width
    return (local * model.shards.num_local + 3 * model.num_views * dim * model.shards.num_rows) * _FLOAT


def batch_bytes(model: LightGCN, batch_size: int, dim: int) -> int:
    """Bytes a step holds for the rows of a batch.

    By row: its users, positives and negatives, what the loss makes of them, and the gradients; under `softmax` its
    scores, their exponentials, their gradient and the mask. By pair of contrasted nodes: scores, their gradient and,
    where users are contrasted with items, two masks.
    """
    row = 18 * dim * _FLOAT + ((3 * _FLOAT + 1) * model.config.num_negatives if model.shares_negatives else 0)
    users, items = (min(batch_size, size) for size in model.shards.sizes)
    pairs = 0
    if model.num_views > 1:
        pairs = 13 * (users + items) ** 2 if model.contrasts_kinds else 2 * _FLOAT * (users**2 + items**2)
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
                f"Memory ran out: {found}", "Use more or larger machines or GPUs, or a smaller train.embedding_dim."
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
