"""Find nearest neighbours by cosine, exactly and in bounded memory."""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.graph.candidates import (
    DEFAULT_RESOURCES,
    GROUP,
    MEMORY,
    NONE,
    SPARE,
    Candidates,
    KeyBlock,
    RowNumbers,
    SearchResources,
    Top,
    first_equal,
    improve,
    key_block,
    save_whole,
    take,
    unit_rows,
    unpack,
    without_self,
)
from crane_core.graph.faiss_search import top_faiss
from crane_core.progress import track

logger = logging.getLogger(__name__)
QUERY_BLOCK = 32_768
"""Upper bound of the queries in a block: a kill loses the work on one block at most."""
_SMALL_GROUP = 32
"""Keys in a group of `top_torch`."""
MOST_DIMS = 128
"""Largest width of a row for `top_fused`: a block of rows must fit in the registers of a program."""


def search(
    rows: np.ndarray,
    queries: RowNumbers,
    k: int,
    *,
    keys: RowNumbers | None = None,
    resources: SearchResources = DEFAULT_RESOURCES,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar other rows of some rows, exactly.

    Neighbours are ordered by similarity, equal ones by row number; similarities are rounded to float32 before they
    are compared. A zero row has similarity 0 to every row.

    Args:
        rows: float [n, d], not yet scaled; may be a memory map larger than the memory.
        queries: rows to search for.
        k: number of neighbours; fewer where there are not as many other keys.
        keys: rows to search among; all when None.
        resources: device, memory and work folder.

    Returns:
        int32 [len(queries), k] neighbours and float32 [len(queries), k] similarities.

    Raises:
        ArtifactError: a row is not finite.
    """
    top = top_on(resources.device, rows.shape[1])
    return unpack(nearest(rows, queries, k, keys=keys, resources=resources, top=top))


def brute_force(rows: np.ndarray, queries: np.ndarray, k: int, memory: int = MEMORY) -> np.ndarray:
    """Find the neighbours of some rows by comparing each with every row in float64, without a search for candidates.

    Args:
        rows: float [n, d].
        queries: int [q], ascending.
        k: number of neighbours; n - 1 when that is less.
        memory: bytes for blocks of rows and scores.

    Returns:
        int32 [q, k].
    """
    return unpack(nearest(rows, queries, k, resources=SearchResources(memory=memory), top=None))[0]


def nearest(
    rows: np.ndarray,
    queries: RowNumbers,
    k: int,
    *,
    keys: RowNumbers | None = None,
    resources: SearchResources = DEFAULT_RESOURCES,
    top: Top | None,
) -> np.ndarray:
    """Find neighbours as `search`, and return them packed: int64 [len(queries), k], ascending.

    Args:
        rows, queries, k, keys, resources: as in `search`.
        top: finds candidates; with None every query is compared with every key.
    """
    device, memory, work = resources.device, resources.memory, resources.work
    # Whether queries are keys must not depend on the shard: lists of an empty shard are as long as the others.
    holds_itself = keys is None or bool(np.isin(queries, keys).any())
    keys = range(len(rows)) if keys is None else keys
    num_keys = len(keys)
    k = min(k, num_keys - int(holds_itself))
    found = np.empty((len(queries), max(k, 0)), dtype=np.int64)
    if k <= 0 or len(queries) == 0:
        return found
    dim = rows.shape[1]
    block = max(1, memory // (4 * (12 * dim + 48 * (k + 1 + SPARE))))
    starts = [
        (first, key) for first in range(0, len(queries), min(block, QUERY_BLOCK)) for key in range(0, num_keys, block)
    ]
    kept: dict[int, KeyBlock] = {}
    keep = 4 * num_keys * dim <= memory // 4
    for first, key in track(starts, len(starts), "knn", logger):
        part = queries[first : first + min(block, QUERY_BLOCK)]
        done = work / f"{first}.npy" if work else None
        if done is not None and done.exists():
            found[first : first + len(part)] = np.load(done)
            continue
        if key == 0:
            unit = unit_rows(take(rows, part))
            leaders, follows = np.unique(first_equal(unit), return_inverse=True)
            distinct = torch.from_numpy(unit[leaders]).to(device)
            best = torch.full((len(leaders), k + 1), NONE, device=device)
        if key not in kept:
            some = keys[key : key + block]
            each = key_block(unit_rows(take(rows, some)), some, device)
            if keep:
                kept[key] = each
        else:
            each = kept[key]
        best = improve(best, distinct, each, memory // 4, top)
        if key + block >= num_keys:
            found[first : first + len(part)] = without_self(best.cpu().numpy()[follows], np.asarray(part), k)
            if done is not None:
                save_whole(done, found[first : first + len(part)])
    return found


def top_on(device: torch.device, dim: int) -> Top:
    """Return the search for candidates on a device, for rows of `dim` numbers."""
    if device.type == "cpu":
        return top_faiss
    return top_fused if dim <= MOST_DIMS else top_torch


def top_torch(queries: Tensor, keys: Tensor, width: int, memory: int) -> Candidates:
    """Find the keys with the largest dot products, as a `Top`. Correct on any device, for rows of any width.

    The best `width` keys lie in the `width` groups with the largest maxima. So one pass over the scores finds the
    maxima, and the selection sees only a small part of the scores.
    """
    num_groups = -(-len(keys) // _SMALL_GROUP)
    # Column j of a group is key j * num_groups + group, so the columns without a key are the last ones.
    step = max(1, memory // (8 * num_groups * _SMALL_GROUP))
    buffer = queries.new_full((min(step, len(queries)), num_groups * _SMALL_GROUP), -torch.inf)
    values, found = [], []
    for part in queries.split(step):
        torch.mm(part, keys.T, out=buffer[: len(part), : len(keys)])
        scores = buffer[: len(part)].view(-1, _SMALL_GROUP, num_groups)
        groups = scores.amax(1).topk(min(width, num_groups), dim=1).indices
        inside = scores.gather(2, groups[:, None, :].expand(-1, _SMALL_GROUP, -1)).flatten(1)
        best = inside.topk(width, dim=1)
        values.append(best.values)
        column = best.indices // groups.shape[1]
        found.append(column * num_groups + groups.gather(1, best.indices % groups.shape[1]))
    scores = torch.cat(values)
    return Candidates(scores, torch.cat(found), scores[:, -1])


def top_fused(queries: Tensor, keys: Tensor, width: int, memory: int) -> Candidates:
    """Find the keys with the largest dot products on a GPU, as a `Top`, with no more than the maxima in memory.

    The `width` groups with the largest maxima are searched. The maxima are nearly exact, so that another group holds
    nothing larger than the least of them and their error.
    """
    from crane_core.graph.maxima_triton import error_bound, group_maxima

    num_groups, dim = -(-len(keys) // GROUP), keys.shape[1]
    searched = min(width, num_groups)
    padded = F.pad(keys, (0, 0, 0, num_groups * GROUP - len(keys))).view(num_groups, GROUP * dim)
    place = torch.arange(GROUP, device=keys.device)
    parts = []
    for some in queries.split(max(1, memory // (8 * num_groups))):
        largest = group_maxima(some, keys).topk(searched, dim=1)
        for part, maxima, groups in zip(
            *(each.split(max(1, memory // (16 * searched * GROUP * dim))) for each in (some, *largest)), strict=True
        ):
            near = padded.index_select(0, groups.flatten()).view(len(part), searched * GROUP, dim)
            columns = (groups[:, :, None] * GROUP + place).flatten(1)
            scores = torch.bmm(near, part[:, :, None])[:, :, 0].masked_fill_(columns >= len(keys), -torch.inf)
            values, positions = scores.topk(width, dim=1)
            others = values[:, -1]
            if searched < num_groups:
                others = torch.maximum(others, maxima[:, -1] + error_bound(dim))
            parts.append(Candidates(values, columns.gather(1, positions), others))
    return Candidates(*map(torch.cat, zip(*parts, strict=True)))
