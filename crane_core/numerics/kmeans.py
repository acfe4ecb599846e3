"""k-means on the CPU or a GPU, reproducible from its seed."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE = 64
"""Rows per cluster that the centres are fitted on, at most."""
_STEPS = 10
_CHUNK_ROWS = 512
"""Rows compared with all centres at a time on a CPU, in its cache."""
_SCORES_ON_GPU = 1 << 25
"""Scores of rows by centres at a time on a GPU, so that launches are few: 256 MiB in float64."""


def cluster(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Cluster rows by k-means: Lloyd's steps on a sample, then every row to its nearest centre.

    A centre that no row of the sample is nearest to stays where it is; a cluster may be empty.

    Args:
        rows: float [n, d].
        num_clusters: at most n.
        seed: seed of the sample and of the first centres.

    Returns:
        int64 [n], the cluster of each row.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(rows), generator=generator).to(rows.device)
    sample = rows[shuffled[: num_clusters * _SAMPLE]]
    centres = sample[:num_clusters].clone()
    for _ in range(_STEPS):
        clusters = _assign(sample, centres)
        sizes = torch.bincount(clusters, minlength=num_clusters)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, clusters, sample)
        centres = torch.where(sizes > 0, sums / sizes, centres)
    return _assign(rows, centres)


def _assign(rows: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest centre of each row, int64 [n]."""
    lengths = centres.square().sum(1) / 2
    parts = row_chunks(len(rows), chunk_rows(rows, len(centres)))
    return torch.cat([torch.addmm(lengths, rows[part], centres.T, alpha=-1).argmin(1) for part in parts])


def chunk_rows(rows: Tensor, num_centres: int) -> int:
    """Return how many of the rows are compared with all centres at a time."""
    return max(_CHUNK_ROWS, _SCORES_ON_GPU // num_centres) if rows.is_cuda else _CHUNK_ROWS


def row_chunks(stop: int, size: int, start: int = 0) -> list[slice]:
    """Cut the rows from `start` to `stop` into slices of `size`; the last may be shorter."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
