"""The ranks of a distributed job."""

from __future__ import annotations

import torch
import torch.distributed as dist


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: (0, 1) outside a distributed job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank; all ranks call this and get the same answer."""
    if ranks()[1] == 1:
        return flag
    answer = torch.tensor([flag], dtype=torch.float32, device=device)
    dist.all_reduce(answer)
    return bool(answer > 0)
