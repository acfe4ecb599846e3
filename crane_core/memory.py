"""What a step of training needs in memory, and what there is."""

from __future__ import annotations

from pathlib import Path

import torch

from crane_core.config import Train
from crane_core.errors import TrainingError
from crane_core.sharding import Shards

_FLOAT = 4
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(config: Train, shards: Shards, shares_negatives: bool, free: int) -> None:
    """Refuse a training whose step cannot fit, before it is killed for it.

    An estimate of what a step holds beside graph and embeddings. By node of this rank: gradient, two moments and two
    propagated layers; by node of all ranks: the gathered rows, the rows the loss reads and their gradient; by row of a
    batch: its users, positives and negatives with their gradients, and under `softmax` its scores, their exponentials,
    their gradient and the mask.

    Args:
        config: sizes.
        shards: nodes of this rank and of all.
        shares_negatives: whether a batch has one score for each of its rows and negatives.
        free: bytes.

    Raises:
        TrainingError: with the batch or the number of ranks that would fit.
    """
    width = config.embedding_dim * _FLOAT
    nodes = (5 * shards.num_local + 3 * shards.num_rows) * width
    row = 6 * width + ((3 * _FLOAT + 1) * config.num_negatives if shares_negatives else 0)
    if nodes + config.batch_size * row <= free:
        return
    fitting = (free - nodes) // row
    if fitting > 0:
        remedy = f"Set train.batch_size to {fitting} or less, and train.batches_per_step higher by the same factor."
    else:
        dim = free // (8 * shards.num_rows * _FLOAT)
        remedy = (
            f"Raise runtime.world_size, use machines with more memory, or set train.embedding_dim to {dim} or less."
        )
    raise TrainingError(
        f"A step needs about {(nodes + config.batch_size * row) / 1e9:.2f} GB, of which {nodes / 1e9:.2f} GB for the "
        f"rows of {shards.num_rows} nodes and {config.batch_size * row / 1e9:.2f} GB for {config.batch_size} "
        f"interactions; {free / 1e9:.2f} GB are free.",
        remedy,
    )


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
