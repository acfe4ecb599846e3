"""Search and indexes by faiss. No other module imports faiss.

The functions import it, not the module: what computes on a GPU must run where faiss is not installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crane_core.graph.candidates import Candidates

_HNSW_FROM = 50_000
"""Rows from which an index is HNSW."""


def use_threads(num_threads: int | None) -> None:
    """Limit the number of faiss's threads; None keeps faiss's own choice."""
    if num_threads is not None:
        import faiss

        faiss.omp_set_num_threads(num_threads)


def write_index(path: Path, vectors: np.ndarray) -> None:
    """Write a faiss inner-product index over float32 [n, d]: flat for small catalogs, HNSW for large ones."""
    import faiss

    num_rows, dim = vectors.shape
    index = (
        faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT) if num_rows >= _HNSW_FROM else faiss.IndexFlatIP(dim)
    )
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    faiss.write_index(index, str(path))


def top_faiss(queries: Tensor, keys: Tensor, width: int, memory: int) -> Candidates:
    """Find the keys with the largest dot products on the CPU, as a `Top`."""
    import faiss

    # By default faiss multiplies 4096 queries with 1024 keys at a time: 16 MB of scores, too many for a core's cache.
    shared, faiss.cvar.distance_compute_blas_query_bs = faiss.cvar.distance_compute_blas_query_bs, 512
    try:
        values, found = faiss.knn(queries.numpy(), keys.numpy(), width, metric=faiss.METRIC_INNER_PRODUCT)
    finally:
        faiss.cvar.distance_compute_blas_query_bs = shared
    scores = torch.from_numpy(values)
    return Candidates(scores, torch.from_numpy(found), scores[:, -1])
