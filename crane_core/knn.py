"""Exact nearest neighbours by cosine, the same for every way of sharding. The only module that imports faiss."""

from __future__ import annotations

import logging
from pathlib import Path

import faiss
import numpy as np

from crane_core.errors import ArtifactError
from crane_core.progress import track

logger = logging.getLogger(__name__)

_SPARE = 16
"""Candidates beyond k that faiss returns, so that its rounding cannot push a true neighbour out."""
_ROUNDING = 1e-5
"""Bound on the float32 rounding of a cosine in faiss."""
_HNSW_FROM = 50_000


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, zero rows left zero: float [n, d] -> float32 [n, d].

    Raises:
        ArtifactError: a row is not finite.
    """
    rows64 = rows.astype(np.float64)
    bad = int((~np.isfinite(rows64).all(axis=1)).sum())
    if bad:
        raise ArtifactError(f"{bad} of {len(rows)} rows are not finite.", "Run ml.refine again.")
    norms = np.linalg.norm(rows64, axis=1, keepdims=True)
    return (rows64 / np.where(norms > 0, norms, 1)).astype(np.float32)


def use_threads(num_threads: int | None) -> None:
    """Bound faiss's threads; None leaves its own choice."""
    if num_threads is not None:
        faiss.omp_set_num_threads(num_threads)


def search(unit: np.ndarray, start: int, stop: int, k: int, key_block: int = 65536) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar other rows of some rows.

    Neighbours are ordered by similarity, equal ones by index; similarities are computed in float64 and rounded to
    float32, so neither blocks nor shards change a bit of the result. A zero row has similarity 0 to every row.

    Args:
        unit: float32 [n, d], from `unit_rows`.
        start, stop: the query rows.
        k: neighbours; n - 1 when that is less.
        key_block: keys searched at a time.

    Returns:
        int32 [stop - start, k] neighbours and float32 [stop - start, k] similarities.
    """
    k = min(k, len(unit) - 1)
    queries = np.arange(start, stop)
    candidates, floor = _candidates(unit, queries, k + 1 + _SPARE, key_block)
    neighbours = np.empty((len(queries), k), dtype=np.int32)
    similarities = np.empty((len(queries), k), dtype=np.float32)
    if k == 0:
        return neighbours, similarities
    doubtful = []
    for rows in range(0, len(queries), 4096):
        part = slice(rows, rows + 4096)
        found, values = _nearest(unit, queries[part], candidates[part], k)
        neighbours[part], similarities[part] = found, values
        doubtful.append(rows + np.flatnonzero(values[:, -1] <= floor[part] + _ROUNDING))
    # Where the k-th neighbour is not clearly better than the last candidate, the candidates may be incomplete.
    for row in np.concatenate(doubtful):
        neighbours[row], similarities[row] = _scan(unit, queries[row], k)
    return neighbours, similarities


def brute_force(unit: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The neighbours of some rows by comparing each with every row in float64: int32 [len(queries), k or n - 1]."""
    k = min(k, len(unit) - 1)
    found = np.empty((len(queries), k), dtype=np.int32)
    for position, query in enumerate(track(queries, len(queries), "brute_force", logger)):
        if k:
            found[position] = _scan(unit, query, k)[0]
    return found


def write_index(path: Path, vectors: np.ndarray) -> None:
    """Write a faiss inner-product index over float32 [n, d]: flat for small catalogs, HNSW for large ones."""
    num_rows, dim = vectors.shape
    index = (
        faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT) if num_rows >= _HNSW_FROM else faiss.IndexFlatIP(dim)
    )
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    faiss.write_index(index, str(path))


def _candidates(unit: np.ndarray, queries: np.ndarray, width: int, key_block: int) -> tuple[np.ndarray, np.ndarray]:
    """Superset of the neighbours by faiss: int64 [n, width] keys (-1 for none), and float32 [n] the similarity no
    other key exceeds, -inf when every key is a candidate."""
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    keys = np.full((len(queries), 0), -1, dtype=np.int64)
    starts = range(0, len(unit), key_block)
    for first in track(starts, len(starts), "knn_key_blocks", logger):
        block = np.ascontiguousarray(unit[first : first + key_block])
        values, found = faiss.knn(
            np.ascontiguousarray(unit[queries[0] : queries[-1] + 1]),
            block,
            min(width, len(block)),
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        best = np.concatenate([best, values], axis=1)
        keys = np.concatenate([keys, found + first], axis=1)
        if best.shape[1] > width:
            top = np.argpartition(-best, width - 1, axis=1)[:, :width]
            best, keys = np.take_along_axis(best, top, 1), np.take_along_axis(keys, top, 1)
    floor = best.min(axis=1) if len(unit) > width else np.full(len(queries), -np.inf, dtype=np.float32)
    return keys, floor


def _nearest(unit: np.ndarray, queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity = _similarities(unit, queries, candidates)
    similarity[candidates == queries[:, None]] = -np.inf
    order = np.lexsort((candidates, -similarity), axis=1)[:, :k]
    return np.take_along_axis(candidates, order, 1), np.take_along_axis(similarity, order, 1)


def _scan(unit: np.ndarray, query: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity = _similarities(unit, query, None)
    similarity[query] = -np.inf
    best = np.argpartition(-similarity, k - 1)[:k]
    tied = np.flatnonzero(similarity >= similarity[best].min())
    order = tied[np.lexsort((tied, -similarity[tied]))][:k]
    return order, similarity[order]


def _similarities(unit: np.ndarray, queries: np.ndarray | int, candidates: np.ndarray | None) -> np.ndarray:
    """Cosines in float64 rounded to float32: of queries [n] to candidates [n, c], or of one query to all rows."""
    left = unit[queries].astype(np.float64)
    if candidates is None:
        return np.concatenate(
            [
                np.einsum("d,kd->k", left, unit[first : first + 65536].astype(np.float64)).astype(np.float32)
                for first in range(0, len(unit), 65536)
            ]
        )
    return np.einsum("nd,nkd->nk", left, unit[candidates].astype(np.float64)).astype(np.float32)
