"""The ranks of a distributed job."""

from __future__ import annotations

import torch.distributed as dist


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: (0, 1) outside a distributed job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
