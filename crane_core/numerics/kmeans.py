"""k-means on the CPU or a GPU: Lloyd's steps on a sample, the same cells for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor

_CLUSTER_SAMPLE = 64
"""Keys per list that the centres are fitted on, at most."""
_CLUSTER_STEPS = 10
CHUNK_ROWS = 512
"""Rows compared with all centres at a time."""


def cluster(keys: Tensor, num_lists: int, seed: int) -> Tensor:
    """k-means by Lloyd's steps on a sample of the keys: the cell of each key, int64 [m].

    A centre without keys stays where it is.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(keys), generator=generator).to(keys.device)
    sample = keys[shuffled[: num_lists * _CLUSTER_SAMPLE]]
    centres = sample[:num_lists].clone()
    for _ in range(_CLUSTER_STEPS):
        cells = _assign(sample, centres)
        sizes = torch.bincount(cells, minlength=num_lists)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, cells, sample)
        centres = torch.where(sizes > 0, sums / sizes, centres)
    return _assign(keys, centres)


def _assign(rows: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each row: int64 [n]."""
    lengths = centres.square().sum(1) / 2
    return torch.cat(
        [torch.addmm(lengths, rows[part], centres.T, alpha=-1).argmin(1) for part in row_chunks(len(rows), CHUNK_ROWS)]
    )


def row_chunks(stop: int, size: int, start: int = 0) -> list[slice]:
    """Rows from `start` to `stop`, `size` at a time."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
