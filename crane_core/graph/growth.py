"""A run that goes on from an earlier one: rows and neighbours that stay, and what staying costs.

RCA keeps the weights and the keys of the run that was built anew last, so the refined row of an item changes only with
the item's own features. The drift is what a catalog refined by its own keys would have for neighbours instead.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crane_core.config import Knn
from crane_core.errors import ArtifactError
from crane_core.graph.exact import CPU, nearest, pack_lists, search, top_faiss, top_torch, unpack
from crane_core.graph.lists import find_neighbours
from crane_core.refine.fit import Modality, Refiner, project_items
from crane_core.storage.matrix import blocks, changed_rows, open_matrix

logger = logging.getLogger(__name__)

ANCHORS = 16_384
"""Items on whose rows the drift is measured; with a catalog no larger it is exact."""
MAX_SEARCHED = 0.5
"""Where a larger share of the rows would be searched for, all of them are."""
MAX_CHANGED = 0.5
"""Where a larger share of the earlier items has other features, they are of another kind or measured otherwise: weights
fitted on the ones before say nothing about them, nor does the drift, which compares keys under these weights."""
MAX_GROWTH = 2
"""Times the items that RCA was built on; as many times `ANCHORS` is the largest sample the drift is measured on."""


@dataclass(frozen=True)
class Touched:
    """Numbers of the rows that are new or whose input has changed, ascending: int64."""

    items: np.ndarray
    users: np.ndarray


def touched(before: list[Modality], now: list[Modality]) -> Touched:
    """Compare the features and profiles of two runs under the same numbers."""
    pairs = list(zip(before, now, strict=True))
    items = [changed_rows(getattr(b, name), getattr(n, name)) for b, n in pairs for name in ("items", "present")]
    users = [changed_rows(getattr(b, name), getattr(n, name)) for b, n in pairs for name in ("profiles", "counts")]
    return Touched(*(np.flatnonzero(np.logical_or.reduce(masks)) for masks in (items, users)))


def outgrown(items: np.ndarray, num_before: int, num_built: int, num_items: int) -> bool:
    """Whether so much is new or changed that the weights are to be fitted anew, whatever the drift.

    Args:
        items: int, numbers of the items that are new or have changed, ascending.
        num_before, num_built, num_items: number of items in the run before, when RCA was built, and today.
    """
    num_changed = int(np.searchsorted(items, num_before))
    return num_changed > MAX_CHANGED * num_before or num_items > MAX_GROWTH * num_built


_COLUMNS = {"items": "items", "present": "items", "profiles": "users", "counts": "users"}
"""Parts of a modality to whose rows they are."""


def write_selected(modalities: list[Modality], rows: Touched, folder: Path) -> None:
    """Copy some rows of features and profiles into files, a block at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, modality in enumerate(modalities):
        for name, whose in _COLUMNS.items():
            source, which = getattr(modality, name), getattr(rows, whose)
            shape = (len(which), *source.shape[1:])
            target = np.lib.format.open_memmap(folder / f"{number}-{name}.npy", "w+", source.dtype, shape)
            for block in blocks(len(which), source[:1].nbytes):
                target[block] = source[which[block]]


def load_selected(modalities: list[Modality], folder: Path) -> list[Modality]:
    """The rows that were copied, memory-mapped."""
    return [
        Modality(modality.name, *(open_matrix(folder / f"{number}-{name}.npy") for name in _COLUMNS))
        for number, modality in enumerate(modalities)
    ]


def choose_anchors(num_items: int, seed: int) -> np.ndarray:
    """A random sample of the items, all of them when there are few: int64 [n], ascending."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(num_items, min(num_items, ANCHORS), replace=False))


@torch.no_grad()
def drift(
    refiner: Refiner,
    anchors: np.ndarray,
    then: np.ndarray,
    num_then: int,
    modalities: list[Modality],
    k: int,
    chunk_size: int,
) -> float:
    """Share of the neighbours that keys of today would replace, among a sample of the items.

    The sample holds the anchors, and as large a share of the items that are new since. Its rows are refined by the keys
    that were kept, those of the anchors as they were, and by its own, every recursion by the rows of the one before.

    Args:
        refiner: with the weights that were kept.
        anchors: int [n], item numbers.
        then: float32 [n, M, d], the anchors' projections when RCA was built.
        num_then: number of items then.
        modalities: features of today.
        k: neighbours.
        chunk_size: rows at a time.
    """
    num_items = len(modalities[0].items)
    share = min(num_items - num_then, round((num_items - num_then) * len(anchors) / num_then))
    new = np.random.default_rng(0).choice(np.arange(num_then, num_items), share, replace=False)
    device = refiner.fusion.device
    now = project_items(refiner, modalities, np.concatenate([anchors, np.sort(new)])).to(device)
    own, _ = refiner.rca(now, now[:0], chunk_size)
    _, kept = refiner.rca(torch.from_numpy(np.array(then)).to(device), now, chunk_size)
    ours, theirs = (_neighbours(refiner, rows, k) for rows in (kept, own))
    if ours.shape[1] == 0:
        return 0.0
    return 1.0 - float((ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean())


def _neighbours(refiner: Refiner, rows: Tensor, k: int) -> np.ndarray:
    return search(refiner.fuse(rows).cpu().numpy(), range(len(rows)), k)[0]


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
            "Grow from an earlier run of the same catalog and embedding_dim, or build anew.",
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
