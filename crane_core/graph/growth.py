"""Find the neighbours of today's rows from the lists of an earlier run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crane_core.config import Knn
from crane_core.errors import ArtifactError
from crane_core.graph.candidates import CPU, pack_lists, unpack
from crane_core.graph.exact import nearest, top_torch
from crane_core.graph.faiss_search import top_faiss
from crane_core.graph.lists import find_neighbours
from crane_core.storage.matrix import blocks, changed_rows

logger = logging.getLogger(__name__)
MAX_SEARCHED = 0.5
"""Where a larger share of the rows would be searched for, all of them are."""


@dataclass(frozen=True)
class Grown:
    """Neighbours after a growth.

    Attributes:
        neighbours, similarities: as from `knn.search`.
        num_touched: rows that are new or have changed.
        num_searched: queries that were searched for as if there were no earlier lists: those rows, and the ones that
            had a changed row among their neighbours.
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
    queries: range,
    config: Knn,
    *,
    device: torch.device = CPU,
    work: Path | None = None,
) -> Grown:
    """The neighbours of today's rows, from those of an earlier run.

    A row that is as it was, and whose neighbours are, can only gain new and changed rows as neighbours: it is compared
    with those alone. From exact neighbours come exact ones, byte for byte those of a search from nothing; what
    approximate ones missed among old rows they still miss, which the certificate of the graph measures.

    Args:
        rows: float [n, d], those of today, not yet scaled; row numbers stay, new ones follow.
        previous: float [m, d], those of the earlier run, m <= n.
        neighbours, similarities: int32 and float32 [m, k] of the earlier run.
        queries: rows of today to search for.
        config: how, the same as in the earlier run.
        device, work: as in `knn.search`.

    Raises:
        ArtifactError: there are fewer rows than before, another width, or lists that are not of those rows.
    """
    if len(rows) < len(previous) or rows.shape[1] != previous.shape[1] or len(neighbours) != len(previous):
        raise ArtifactError(
            f"Rows {rows.shape} do not grow from rows {previous.shape} with {len(neighbours)} lists of neighbours.",
            "Set etl.base_run to a run with the same catalog and refine.embedding_dim, or to null to build anew.",
        )
    k, width = config.k, min(config.k, len(rows) - 1)
    changed = changed_rows(previous, rows)
    everywhere = changed.copy()
    for block in blocks(len(neighbours), neighbours[:1].nbytes):
        everywhere[block] |= changed[neighbours[block]].any(axis=1)
    # Over all rows, so that how the queries are cut into shards decides nothing.
    if neighbours.shape[1] != width or everywhere.sum() > MAX_SEARCHED * len(rows):
        everywhere[:] = True
    searched = everywhere[queries.start : queries.stop]
    count = int(changed.sum()), int(searched.sum())
    logger.info("grow rows=%d queries=%d touched=%d searched=%d", len(rows), len(queries), *count)
    if searched.all():
        return Grown(*find_neighbours(rows, queries, config, device, work), *count)
    folders = [work / name if work else None for name in ("searched", "kept")]
    for folder in filter(None, folders):
        folder.mkdir(exist_ok=True)
    packed = np.empty((len(queries), width), dtype=np.int64)
    anew = queries.start + np.flatnonzero(searched)
    packed[searched] = pack_lists(*find_neighbours(rows, anew, config, device, folders[0]))
    kept = queries.start + np.flatnonzero(~searched)
    top = top_faiss if device.type == "cpu" else top_torch
    gained = nearest(
        rows, kept, k, keys=np.flatnonzero(changed), memory=config.memory, device=device, work=folders[1], top=top
    )
    both = np.concatenate([pack_lists(neighbours[kept], similarities[kept]), gained], axis=1)
    packed[~searched] = np.sort(both, axis=1)[:, :width]
    return Grown(*unpack(packed), *count)
