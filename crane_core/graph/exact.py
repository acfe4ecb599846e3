"""Find nearest neighbours by cosine, exactly and in bounded memory."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crane_core.graph.candidates import (
    CPU,
    MEMORY,
    NONE,
    SPARE,
    KeyBlock,
    RowNumbers,
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
"""Most queries at a time: what a kill costs at most."""
_GROUP = 32
"""Keys of which the torch search looks at the best first."""


def search(
    rows: np.ndarray,
    queries: RowNumbers,
    k: int,
    *,
    keys: RowNumbers | None = None,
    memory: int = MEMORY,
    device: torch.device = CPU,
    work: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar other rows of some rows, exactly.

    Neighbours are ordered by similarity, equal ones by row number; similarities are rounded to float32 before they
    are compared. A zero row has similarity 0 to every row.

    Args:
        rows: float [n, d], not yet scaled; may be a memory map larger than the memory.
        queries: rows to search for.
        k: neighbours; fewer where there are not as many other keys.
        keys: rows to search among; all when None.
        memory: bytes for blocks of rows and scores, on the CPU or the device. What is held beyond is the result, and
            some tens of MB in the libraries.
        device: faiss searches on a CPU, torch on CUDA.
        work: folder for the blocks of queries that are done; the next attempt with the same arguments goes on there.

    Returns:
        int32 [len(queries), k] neighbours and float32 [len(queries), k] similarities.

    Raises:
        ArtifactError: a row is not finite.
    """
    top = top_faiss if device.type == "cpu" else top_torch
    return unpack(nearest(rows, queries, k, keys=keys, memory=memory, device=device, work=work, top=top))


def brute_force(rows: np.ndarray, queries: np.ndarray, k: int, memory: int = MEMORY) -> np.ndarray:
    """The neighbours of some rows by comparing each with every row in float64, without any shortcut.

    Args:
        rows: float [n, d].
        queries: int [q], ascending.
        k: neighbours; n - 1 when that is less.
        memory: bytes for blocks of rows and scores.

    Returns:
        int32 [q, k].
    """
    return unpack(nearest(rows, queries, k, memory=memory, top=None))[0]


def nearest(
    rows: np.ndarray,
    queries: RowNumbers,
    k: int,
    *,
    keys: RowNumbers | None = None,
    memory: int = MEMORY,
    device: torch.device = CPU,
    work: Path | None = None,
    top: Top | None,
) -> np.ndarray:
    """As `search`, packed: int64 [len(queries), k], ascending. `top` finds candidates; None compares everything."""
    # A shard without queries has lists as long as the others.
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


def top_torch(queries: Tensor, keys: Tensor, width: int, memory: int) -> tuple[Tensor, Tensor]:
    """Written for CUDA, right on any device. The best `width` keys lie in the `width` groups with the best maxima, so
    one pass over the scores takes maxima and the selection sees a small part of them."""
    num_groups = -(-len(keys) // _GROUP)
    # Column j of a group is key j * num_groups + group: the rows past the end are in the last columns.
    step = max(1, memory // (8 * num_groups * _GROUP))
    buffer = queries.new_full((min(step, len(queries)), num_groups * _GROUP), -torch.inf)
    values, found = [], []
    for part in queries.split(step):
        torch.mm(part, keys.T, out=buffer[: len(part), : len(keys)])
        scores = buffer[: len(part)].view(-1, _GROUP, num_groups)
        groups = scores.amax(1).topk(min(width, num_groups), dim=1).indices
        inside = scores.gather(2, groups[:, None, :].expand(-1, _GROUP, -1)).flatten(1)
        best = inside.topk(width, dim=1)
        values.append(best.values)
        column = best.indices // groups.shape[1]
        found.append(column * num_groups + groups.gather(1, best.indices % groups.shape[1]))
    return torch.cat(values), torch.cat(found)
