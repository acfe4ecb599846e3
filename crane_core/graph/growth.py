"""Find the neighbours of this run's rows from the lists of an earlier run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crane_core.config import Knn, RunConfig
from crane_core.errors import ArtifactError
from crane_core.graph.candidates import CPU, SearchResources, pack_lists, unpack
from crane_core.graph.exact import nearest, top_on
from crane_core.graph.lists import find_neighbours
from crane_core.stages import STAGES, list_settings
from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import blocks, changed_rows, open_matrix

logger = logging.getLogger(__name__)
MAX_SEARCHED = 0.5
"""Largest share of the rows that is searched for alone; beyond it all rows are."""


@dataclass(frozen=True)
class BaseGraph:
    """Rows and neighbours of the earlier run that `ml.knn` grows from.

    Attributes:
        rows: float [m, d], fused rows of the items, not scaled.
        neighbours, similarities: int32 and float32 [m, k].
    """

    rows: np.ndarray
    neighbours: np.ndarray
    similarities: np.ndarray


def find_base_graph(refined: Artifact, graph: Artifact, config: RunConfig) -> BaseGraph | None:
    """Return the lists to grow from, if they were found in the same way; else None, with a line in the log.

    Args:
        refined, graph: artifacts of `ml.refine` and `ml.graph` of the earlier run.
        config: configuration of this run.
    """
    fits = {
        "same_version": graph.manifest["stage_version"] == STAGES["ml.graph"].version,
        "same_settings": list_settings(graph.manifest["config"]["knn"]) == list_settings(config.knn.model_dump()),
    }
    if not all(fits.values()):
        found = " ".join(f"{name}={fit}" for name, fit in fits.items())
        logger.warning("build_anew base=%s %s", config.etl.base_run, found)
        return None
    for artifact in (refined, graph):
        artifact.verify()
    names = ("neighbours.npy", "similarities.npy")
    return BaseGraph(open_matrix(refined.file("fused_items.npy")), *(open_matrix(graph.file(name)) for name in names))


@dataclass(frozen=True)
class Grown:
    """Neighbours after a growth.

    Attributes:
        neighbours, similarities: as from `exact.search`.
        num_touched: rows that are new or have changed.
        num_searched: queries that were compared with all rows: the new and changed ones, and those that had a changed
            row among their neighbours.
    """

    neighbours: np.ndarray
    similarities: np.ndarray
    num_touched: int
    num_searched: int


def grow_neighbours(
    rows: np.ndarray,
    base: BaseGraph,
    queries: range,
    config: Knn,
    *,
    device: torch.device = CPU,
    work: Path | None = None,
) -> Grown:
    """Find the neighbours of this run's rows from those of an earlier run.

    If a row has not changed and neither have its neighbours, only new and changed rows can enter its list: it is
    compared with those alone. From exact neighbours come exact ones, byte for byte those of a search from nothing.
    Neighbours that an approximate search has missed among old rows stay missing; the certificate of the graph measures
    how many.

    Args:
        rows: float [n, d], those of this run, not scaled; earlier rows keep their numbers, new ones follow.
        base: rows and lists of the earlier run, m <= n.
        queries: row numbers to search for.
        config: settings of the search, the same as in the earlier run.
        device, work: as in `lists.find_neighbours`.

    Raises:
        ArtifactError: there are fewer rows than before, another width, or lists that are not of those rows.
    """
    if len(rows) < len(base.rows) or rows.shape[1] != base.rows.shape[1] or len(base.neighbours) != len(base.rows):
        raise ArtifactError(
            f"Rows {rows.shape} do not grow from rows {base.rows.shape} with {len(base.neighbours)} lists of "
            "neighbours.",
            "Set etl.base_run to a run with the same catalog and refine.embedding_dim, or to null to build anew.",
        )
    changed = changed_rows(base.rows, rows)
    searched = _to_search(changed, base, min(config.k, len(rows) - 1))[queries.start : queries.stop]
    count = int(changed.sum()), int(searched.sum())
    logger.info("grow rows=%d queries=%d touched=%d searched=%d", len(rows), len(queries), *count)
    if searched.all():
        return Grown(*find_neighbours(rows, queries, config, device, work), *count)
    folders = [work / name if work else None for name in ("searched", "kept")]
    for folder in filter(None, folders):
        folder.mkdir(exist_ok=True)
    width = base.neighbours.shape[1]
    packed = np.empty((len(queries), width), dtype=np.int64)
    anew = queries.start + np.flatnonzero(searched)
    packed[searched] = pack_lists(*find_neighbours(rows, anew, config, device, folders[0]))
    kept = queries.start + np.flatnonzero(~searched)
    top = top_on(device, rows.shape[1])
    new_keys, resources = np.flatnonzero(changed), SearchResources(device, config.memory, folders[1])
    gained = nearest(rows, kept, config.k, keys=new_keys, resources=resources, top=top)
    both = np.concatenate([pack_lists(base.neighbours[kept], base.similarities[kept]), gained], axis=1)
    packed[~searched] = np.sort(both, axis=1)[:, :width]
    return Grown(*unpack(packed), *count)


def _to_search(changed: np.ndarray, base: BaseGraph, width: int) -> np.ndarray:
    """Return the rows that must be compared with all others: bool [n].

    The choice is made over all rows, so the number of shards does not change it.

    Args:
        changed: bool [n], rows that are new or have changed.
        base: the earlier run.
        width: length of this run's lists.
    """
    searched = changed.copy()
    for block in blocks(len(base.neighbours), base.neighbours[:1].nbytes):
        searched[block] |= changed[base.neighbours[block]].any(axis=1)
    if base.neighbours.shape[1] != width or searched.sum() > MAX_SEARCHED * len(changed):
        searched[:] = True
    return searched
