"""Yesterday's neighbours brought up to date: only new and changed rows, and those that had one, are searched anew."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crane_core.errors import ArtifactError
from crane_core.knn import CPU, MEMORY, nearest, pack_lists, top_faiss, top_torch, unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grown:
    """Neighbours after a growth.

    Attributes:
        neighbours, similarities: as from `knn.search` over the rows of today.
        num_touched: new and changed rows.
        num_searched: rows that were compared with every row: those, and the ones that had a changed row among their
            neighbours; all of them where the lists were built anew.
    """

    neighbours: np.ndarray
    similarities: np.ndarray
    num_touched: int
    num_searched: int


def grow_neighbours(
    rows: np.ndarray,
    previous: np.ndarray,
    neighbours: np.ndarray,
    similarities: np.ndarray,
    k: int,
    max_searched: float,
    *,
    memory: int = MEMORY,
    device: torch.device = CPU,
    work: Path | None = None,
) -> Grown:
    """The neighbours of today's rows, from yesterday's.

    A row that is as it was, and whose neighbours are, can only gain new and changed rows as neighbours: it is compared
    with those alone. From exact neighbours come exact ones, byte for byte those of a search from nothing; what
    approximate ones missed among old rows they still miss, which the certificate of the graph measures.

    Args:
        rows: float [n, d], those of today, not yet scaled; row numbers stay, new ones follow.
        previous: float [m, d], those of yesterday, m <= n.
        neighbours, similarities: int32 and float32 [m, k] of yesterday.
        k: neighbours.
        max_searched: share of the rows to be compared with every row above which all of them are.
        memory, device, work: as in `knn.search`.

    Raises:
        ArtifactError: there are fewer rows than yesterday, another width, or lists that are not of yesterday's rows.
    """
    if len(rows) < len(previous) or rows.shape[1] != previous.shape[1] or len(neighbours) != len(previous):
        raise ArtifactError(
            f"Rows {rows.shape} do not grow from rows {previous.shape} with {len(neighbours)} lists of neighbours.",
            "Grow from an earlier run of the same catalog and embedding_dim, or build anew.",
        )
    top = top_faiss if device.type == "cpu" else top_torch
    num_rows, width = len(rows), min(k, len(rows) - 1)
    touched = np.ones(num_rows, dtype=bool)
    step = max(1, memory // (16 * rows.shape[1]))
    for start in range(0, len(previous), step):
        part = slice(start, min(start + step, len(previous)))
        touched[part] = (rows[part] != previous[part]).any(axis=1)
    searched = touched.copy()
    searched[: len(previous)] |= touched[neighbours].any(axis=1)
    if neighbours.shape[1] != width or searched.sum() > max_searched * num_rows:
        searched[:] = True
    logger.info("grow rows=%d touched=%d searched=%d", num_rows, touched.sum(), searched.sum())
    packed = np.empty((num_rows, width), dtype=np.int64)
    folders = [work / name if work else None for name in ("searched", "kept")]
    for folder in filter(None, folders):
        folder.mkdir(exist_ok=True)
    packed[searched] = nearest(
        rows, np.flatnonzero(searched), k, memory=memory, device=device, work=folders[0], top=top
    )
    kept = np.flatnonzero(~searched)
    if len(kept):
        packed[kept] = pack_lists(neighbours[kept], similarities[kept])
        gained = nearest(
            rows, kept, k, keys=np.flatnonzero(touched), memory=memory, device=device, work=folders[1], top=top
        )
        packed[kept] = np.sort(np.concatenate([packed[kept], gained], axis=1), axis=1)[:, :width]
    return Grown(*unpack(packed), int(touched.sum()), int(searched.sum()))
