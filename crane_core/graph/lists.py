"""Approximate nearest neighbours: rows in inverted lists, each query compared with the rows of its nearest lists.

The method is that of faiss's IVF indexes, but all queries that probe a list are multiplied with it at once. In a search
for the neighbours of every row this is several times faster than one query at a time. Among the rows of its lists a
query finds its neighbours exactly, and k-means runs in exact arithmetic. So the result depends on the rows, the sizes
and the seed, and not on shards, threads or the machine.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crane_core.config import Knn
from crane_core.graph.candidates import (
    CPU,
    MEMORY,
    NONE,
    KeyBlock,
    RowNumbers,
    SearchResources,
    compare_all,
    improve,
    key_block,
    rescore,
    save_whole,
    unit_rows,
    unpack,
    without_self,
)
from crane_core.graph.exact import QUERY_BLOCK, search
from crane_core.graph.faiss_search import top_faiss
from crane_core.progress import track

logger = logging.getLogger(__name__)

_ITERATIONS = 8
"""Steps of k-means."""
_SAMPLE = 48
"""Rows per list that the centroids are fitted on, at most."""
_SPARE = 1
"""Candidates beyond k + 1 that are taken from each list."""


def find_neighbours(
    rows: np.ndarray, queries: RowNumbers, config: Knn, device: torch.device = CPU, work: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the neighbours of some rows, exactly or approximately as the configuration says.

    Args:
        rows: float [n, d], not yet scaled; may be a memory map larger than the memory.
        queries: rows to search for.
        config: the kind of search and its sizes.
        device: device of an exact search; lists are searched on the CPU.
        work: folder from which an interrupted search continues.

    Returns:
        int32 [len(queries), k] neighbours and float32 [len(queries), k] similarities, ordered as by
        `exact.search`.
    """
    if not config.approximate(len(rows)):
        return search(rows, queries, config.k, resources=SearchResources(device, config.memory, work))
    lists = build_lists(rows, config.num_lists, 0, config.memory, work)
    return search_lists(lists, queries, config.k, config.num_probes, memory=config.memory, work=work)


@dataclass(frozen=True)
class Lists:
    """Rows in inverted lists, in which equal rows are stored once.

    Attributes:
        centroids: float32 [num_lists, d], unit rows.
        keys: every distinct row, sorted by list, and its row numbers; on disk where a folder was given.
        bounds: int64 [num_lists + 1], position of the first distinct row of each list, then their number.
    """

    centroids: np.ndarray
    keys: KeyBlock
    bounds: np.ndarray

    def keys_of(self, number: int) -> KeyBlock:
        """Return the keys of a list."""
        start, stop = self.bounds[number : number + 2]
        return KeyBlock(self.keys.rows[start:stop], self.keys.bounds[start : stop + 1], self.keys.ids)


def build_lists(
    rows: np.ndarray, num_lists: int | None, seed: int, memory: int = MEMORY, work: Path | None = None
) -> Lists:
    """Cluster rows by cosine and sort them by cluster.

    Args:
        rows: float [n, d], not yet scaled; may be a memory map larger than the memory.
        num_lists: number of clusters; sqrt(n) when None, n when there are fewer rows.
        seed: seed of the sample that the centroids are fitted on.
        memory: bytes for blocks of rows.
        work: folder for the sorted rows; in memory when None.
    """
    num_rows, dim = rows.shape
    num_lists = min(num_lists or max(1, round(num_rows**0.5)), num_rows)
    generator = np.random.default_rng(seed)
    # The sample is in random order: its first rows are the first centroids.
    sample = generator.choice(num_rows, size=min(num_rows, _SAMPLE * num_lists), replace=False)
    points = unit_rows(rows[sample])
    centroids = points[:num_lists]
    for _ in track(range(_ITERATIONS), _ITERATIONS, "fit_lists", logger):
        # The sums are exact: multiples of 2^-25 below 2^28.
        sums = np.zeros((num_lists, dim))
        np.add.at(sums, _nearest_lists(points, centroids, 1, memory)[:, 0], points.astype(np.float64))
        centroids = np.where((sums != 0).any(axis=1, keepdims=True), unit_rows(sums), centroids)
    block = max(1, min(QUERY_BLOCK, memory // (64 * dim)))
    starts = range(0, num_rows, block)
    labels = np.concatenate(
        [
            _nearest_lists(unit_rows(rows[start : start + block]), centroids, 1, memory)[:, 0]
            for start in track(starts, len(starts), "assign_lists", logger)
        ]
    )
    ids = np.argsort(labels, kind="stable")
    distinct = (
        np.lib.format.open_memmap(work / "distinct.npy", "w+", np.float32, rows.shape)
        if work
        else np.empty(rows.shape, dtype=np.float32)
    )
    counts, sizes, num_distinct = [], np.zeros(num_lists, dtype=np.int64), 0
    for start in track(starts, len(starts), "sort_by_list", logger):
        some = ids[start : start + block]
        keys = key_block(unit_rows(rows[some]), some)
        counts.append(keys.bounds.diff())
        ids[start : start + block] = keys.ids.numpy()
        distinct[num_distinct : num_distinct + len(keys.rows)] = keys.rows.numpy()
        num_distinct += len(keys.rows)
        sizes += np.bincount(labels[keys.ids[keys.bounds[:-1]].numpy()], minlength=num_lists)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    keys = KeyBlock(torch.from_numpy(distinct[:num_distinct]), bounds, torch.from_numpy(ids))
    return Lists(centroids, keys, np.concatenate([[0], np.cumsum(sizes)]))


def search_lists(
    lists: Lists, queries: RowNumbers, k: int, num_probes: int, *, memory: int = MEMORY, work: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar other rows of some rows among the rows in their nearest lists.

    A query whose lists hold fewer than k others is compared with every row.

    Args:
        lists: all rows.
        queries: rows to search for.
        k: number of neighbours; n - 1 when that is less.
        num_probes: number of nearest lists to search.
        memory: bytes for blocks of scores. The result and the rows of the lists in use are held besides.
        work: folder for the finished blocks of queries. A later search with the same arguments continues from them.

    Returns:
        int32 [len(queries), k] neighbours and float32 [len(queries), k] similarities, ordered as by
        `exact.search`.
    """
    ids = lists.keys.ids.numpy()
    k = min(k, len(ids) - 1)
    found = np.empty((len(queries), max(k, 0)), dtype=np.int64)
    if k <= 0 or len(queries) == 0:
        return unpack(found)
    num_probes = min(num_probes, len(lists.centroids))
    row_bytes = 16 * lists.keys.rows.shape[1] + 48 * num_probes * (k + 1 + _SPARE)
    block = max(1, min(QUERY_BLOCK, memory // row_bytes))
    # Queries are sorted by list, so that those of a block probe the same lists.
    number = np.full(len(ids), -1)
    number[np.asarray(queries)] = np.arange(len(queries))
    places = np.flatnonzero(number[ids] >= 0)
    starts = range(0, len(places), block)
    for start in track(starts, len(starts), "knn", logger):
        part = places[start : start + block]
        done = work / f"{start}.npy" if work else None
        if done is not None and done.exists():
            found[number[ids[part]]] = np.load(done)
            continue
        key = np.searchsorted(lists.keys.bounds.numpy(), part, side="right") - 1
        distinct, follows = np.unique(key, return_inverse=True)
        best = _search_block(lists, lists.keys.rows[torch.from_numpy(distinct)], k + 1, num_probes, memory)
        packed = without_self(best.numpy()[follows], ids[part], k)
        found[number[ids[part]]] = packed
        if done is not None:
            save_whole(done, packed)
    return unpack(found)


def _search_block(lists: Lists, queries: Tensor, width: int, num_probes: int, memory: int) -> Tensor:
    """Find the packed neighbours of unit rows among the rows of their lists, themselves included: int64 [q, width]."""
    probes = _nearest_lists(queries.numpy(), lists.centroids, num_probes, memory)
    pairs = np.argsort(probes, axis=None, kind="stable")
    shape = (len(pairs), width + _SPARE)
    values, found = torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64)
    # For each query and list, the largest score that a row outside the candidates can have.
    hidden = torch.full((len(pairs),), -torch.inf)
    for number, pair in _by_list(probes, pairs):
        keys = lists.keys_of(number).rows
        count = min(shape[1], len(keys))
        if count == 0:
            continue
        query = torch.from_numpy(pairs[pair] // num_probes)
        near = top_faiss(queries.index_select(0, query), keys, count, memory)
        values[pair, :count], found[pair, :count] = near.values, near.found + int(lists.bounds[number])
        if count < len(keys):
            hidden[pair] = near.others
    # Back to the order of the queries, the candidates of all lists of a query side by side.
    back = torch.from_numpy(np.argsort(pairs))
    values, found = (each.index_select(0, back).view(len(queries), -1) for each in (values, found))
    others = hidden[back].view(len(queries), -1).amax(1)
    ranked = values.topk(min(width + 4, values.shape[1]), dim=1)
    if ranked.values.shape[1] < values.shape[1]:
        others = torch.maximum(others, ranked.values[:, -1])
    candidates = found.gather(1, ranked.indices)
    best = torch.full((len(queries), width), NONE)
    best, doubtful = rescore(best, queries, lists.keys, ranked.values, candidates, others)
    # Doubtful queries are compared with all rows of their lists; those with too few rows in them, with all rows.
    few = (best[:, -1] == NONE).nonzero()[:, 0]
    best[doubtful] = best[few] = NONE
    probes = probes[doubtful.numpy()]
    pairs = np.argsort(probes, axis=None, kind="stable")
    for number, pair in _by_list(probes, pairs):
        which = doubtful[torch.from_numpy(pairs[pair] // num_probes)]
        best[which] = compare_all(best[which], queries[which], lists.keys_of(number), memory)
    best[few] = NONE
    for number in range(len(lists.centroids) if len(few) else 0):
        best[few] = compare_all(best[few], queries[few], lists.keys_of(number), memory)
    return best


def _nearest_lists(unit: np.ndarray, centroids: np.ndarray, num_probes: int, memory: int) -> np.ndarray:
    """Return the numbers of the lists with the nearest centroids, nearest first: int32 [n, num_probes]."""
    none = torch.full((len(unit), num_probes), NONE)
    keys = key_block(centroids, range(len(centroids)))
    return unpack(improve(none, torch.from_numpy(unit), keys, memory, top_faiss).numpy())[0]


def _by_list(probes: np.ndarray, pairs: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield the lists that are probed, and for each the slice of `pairs` that probe it.

    Args:
        probes: int [q, num_probes], lists of each query.
        pairs: positions in the flattened `probes`, sorted by list.
    """
    numbers = probes.ravel()[pairs]
    cuts = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
    for start, stop in itertools.pairwise(cuts):
        yield int(numbers[start]), slice(start, stop)
