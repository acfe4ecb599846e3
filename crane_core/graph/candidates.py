"""Lists of neighbours that can be merged in any order with the same result.

The result does not depend on blocks, shards, threads, libraries or devices, for two reasons. Unit rows are rounded to a
grid on which float64 dot products are exact. And neighbours have a total order, by similarity and then by row number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crane_core.errors import ArtifactError

MEMORY = 1 << 30
"""Default memory of a search, bytes."""
CPU = torch.device("cpu")
NONE = torch.iinfo(torch.int64).max
"""Packed value of a place in a list that holds no neighbour; it sorts last."""
SPARE = 4
"""Candidates beyond k + 1. With them, a near tie seldom makes the comparison with all keys necessary."""
_PAIRS = 4096
"""Candidates compared at a time on a CPU, so that their rows fit in the cache."""
_PAIRS_ON_GPU = 1 << 18
"""The same on a GPU: 256 MiB of rows at 64 numbers each, so that launches are few."""
GROUP = 128
"""Keys in a group; on a GPU the largest scores of the groups are compared first."""
RowNumbers = range | np.ndarray
"""Row numbers, ascending."""


@dataclass(frozen=True)
class SearchResources:
    """The device, memory and disk that a search uses.

    Attributes:
        device: faiss searches on a CPU, torch on CUDA.
        memory: bytes for blocks of rows and scores, on the CPU or the device. A search holds its result besides, and
            the libraries some tens of MB.
        work: folder for the finished blocks of queries. A later search with the same arguments continues from them.
    """

    device: torch.device = CPU
    memory: int = MEMORY
    work: Path | None = None


DEFAULT_RESOURCES = SearchResources()


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1 and round them to multiples of 2^-25; zero rows stay zero.

    A product of two entries is then a multiple of 2^-50 and, by Cauchy-Schwarz, no partial sum exceeds 1. A dot product
    in float64 is therefore exact for any order of summation, with or without fused multiply-add, on any device. For
    entries above 1/4, float32 itself is no finer than this grid.

    Args:
        rows: float [n, d].

    Returns:
        float32 [n, d].

    Raises:
        ArtifactError: a row is not finite.
    """
    unit = np.empty(rows.shape, dtype=np.float32)
    bad = 0
    for start in range(0, len(rows), 4096):
        block = rows[start : start + 4096].astype(np.float64)
        bad += int((~np.isfinite(block).all(axis=1)).sum())
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))[:, None]
        with np.errstate(invalid="ignore"):
            block /= np.where(norms > 0, norms, 1)
        unit[start : start + 4096] = np.rint(block * 2.0**25) * 2.0**-25
    if bad:
        raise ArtifactError(
            f"{bad} of {len(rows)} rows are not finite.",
            "Remove the artifact of ml.refine that this run names, and run python -m jobs.ml.refine for the run again.",
        )
    return unit


def pack(similarities: Tensor, keys: Tensor) -> Tensor:
    """Pack each neighbour into an int64. Ascending order is descending similarity, then ascending row number.

    Args:
        similarities: float32, no NaN.
        keys: integer row numbers below 2^31; the shape broadcasts.
    """
    bits = (similarities + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((~ascending).long() << 32) | keys.long()


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers, int32, and the similarities, float32, of packed neighbours, int64."""
    return (packed & 0x7FFFFFFF).astype(np.int32), _similarity(torch.from_numpy(packed)).numpy()


def pack_lists(neighbours: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """Pack neighbours int32 [n, k] and similarities float32 [n, k] into int64 [n, k]."""
    return pack(torch.from_numpy(np.array(similarities)), torch.from_numpy(np.array(neighbours))).numpy()


class Candidates(NamedTuple):
    """Keys that may be the nearest ones of some queries.

    Attributes:
        values: float32 [q, width], their scores, descending.
        found: int64 [q, width], their positions among the keys.
        others: float32 [q], upper bound of the scores of all other keys, up to the rounding of a product.
    """

    values: Tensor
    found: Tensor
    others: Tensor


Top = Callable[[Tensor, Tensor, int, int], Candidates]
"""Function from (queries, keys, width, memory) to the keys with the largest scores."""


@dataclass(frozen=True)
class KeyBlock:
    """A block of keys in which equal rows are stored once.

    Attributes:
        rows: float32 [m, d], distinct unit rows in the order of their first row numbers.
        bounds: int64 [m + 1], first position of the row numbers of each distinct row in `ids`.
        ids: int64, row numbers, ascending for each distinct row.
    """

    rows: Tensor
    bounds: Tensor
    ids: Tensor


def improve(best: Tensor, queries: Tensor, keys: KeyBlock, memory: int, top: Top | None) -> Tensor:
    """Merge the neighbours among a block of keys into the best so far.

    Args:
        best: int64 [q, width], packed, ascending.
        queries: float32 [q, d], unit rows.
        keys: the block.
        memory: bytes for scores.
        top: finds candidates; with None every query is compared with every key.

    Returns:
        int64 [q, width], the best after the block.
    """
    width = best.shape[1]
    if top is None or len(keys.rows) <= 2 * (width + SPARE):
        return compare_all(best, queries, keys, memory)
    merged, doubtful = rescore(best, queries, keys, *top(queries, keys.rows, width + SPARE, memory))
    if len(doubtful):
        merged[doubtful] = compare_all(best[doubtful], queries[doubtful], keys, memory)
    return merged


def rescore(
    best: Tensor, queries: Tensor, keys: KeyBlock, values: Tensor, found: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge candidates into the best so far, by their exact similarities.

    Args:
        best, queries, keys: as in `improve`.
        values: float32 [q, c], scores of the candidates, descending; -inf where there is no candidate.
        found: int64 [q, c], positions of the candidates among the keys.
        others: float32 [q], upper bound of the scores of all other keys.

    Returns:
        The best after the merge, and the positions of the queries for which one of the other keys may be better.
    """
    rounding = _rounding(queries)
    width = best.shape[1]
    # The last of the best will be at least this. Candidates that are certainly below need no exact similarity.
    least = torch.maximum(_worst(best), values[:, width - 1] - rounding)
    row, column = ((values >= least[:, None] - rounding) & (values > -torch.inf)).nonzero(as_tuple=True)
    key, size = found[row, column], _PAIRS_ON_GPU if found.is_cuda else _PAIRS
    similarities = [
        _products(queries[i].double(), keys.rows[j].double()).float()
        for i, j in zip(row.split(size), key.split(size), strict=True)
    ]
    merged = _merge(best, row, key, torch.cat(similarities), keys)
    return merged, (others >= _worst(merged) - rounding).nonzero()[:, 0]


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of each pair of unit rows, float64 [n]: exact, in whatever way it is computed."""
    # On a GPU the einsum is a batch of n products of single rows, more than a launch may hold.
    return (left * right).sum(1) if left.is_cuda else torch.einsum("nd,nd->n", left, right)


def compare_all(best: Tensor, queries: Tensor, keys: KeyBlock, memory: int) -> Tensor:
    """Merge the neighbours among a block of keys into the best so far, comparing every query with every key.

    See `improve` for the arguments.
    """
    columns, first = keys.rows.double().T, keys.ids[keys.bounds[:-1]]
    width = min(best.shape[1], len(first))
    merged = torch.empty_like(best)
    for part in torch.arange(len(queries), device=best.device).split(max(1, memory // (40 * max(1, len(first))))):
        similarity = (queries[part].double() @ columns).float()
        # This many distinct rows suffice, since each stands for one neighbour or more.
        key = pack(similarity, first).topk(width, dim=1, largest=False).indices
        row = torch.arange(len(part), device=best.device).repeat_interleave(width)
        merged[part] = _merge(best[part], row, key.flatten(), similarity.gather(1, key).flatten(), keys)
    return merged


def _merge(best: Tensor, row: Tensor, key: Tensor, similarity: Tensor, keys: KeyBlock) -> Tensor:
    """Merge pairs of a query and a key into the best so far.

    Args:
        best: int64 [q, width].
        row, key: int64 [p], the query and the key of each pair; `row` ascends. All row numbers of a key are merged.
        similarity: float32 [p].
        keys: the block.
    """
    counts = (keys.bounds[key + 1] - keys.bounds[key]).clamp(max=best.shape[1])
    pair = torch.arange(len(key), device=key.device).repeat_interleave(counts)
    ids = keys.ids[keys.bounds[key][pair] + _numbered(counts)]
    sizes = torch.zeros(len(best), dtype=torch.int64, device=key.device).index_add_(0, row, counts)
    others = torch.full((len(best), int(sizes.max())), NONE, device=best.device)
    others[row[pair], _numbered(sizes)] = pack(similarity[pair], ids)
    return torch.cat([best, others], dim=1).sort(dim=1).values[:, : best.shape[1]]


def _numbered(counts: Tensor) -> Tensor:
    """Return 0, 1, .., counts[0] - 1, 0, 1, .., counts[1] - 1, .."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=counts.device) - starts.repeat_interleave(counts)


def _worst(best: Tensor) -> Tensor:
    """Return the similarity of the last neighbour, -inf where the list is not full."""
    return torch.where(best[:, -1] == NONE, -torch.inf, _similarity(best[:, -1]))


def _similarity(packed: Tensor) -> Tensor:
    ascending = ~(packed >> 32).int()
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _rounding(rows: Tensor) -> float:
    """Bound the error of a float32 dot product of unit rows, and of rounding the exact product to float32."""
    if rows.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        return 2.0**-9
    return (rows.shape[1] + 4) * 2.0**-24


def key_block(unit: np.ndarray, rows: RowNumbers, device: torch.device = CPU) -> KeyBlock:
    """Make a block of keys on a device from unit rows float32 [m, d] and their row numbers."""
    first = first_equal(unit)
    leaders, counts = np.unique(first, return_counts=True)
    ids = np.asarray(rows, dtype=np.int64)[np.argsort(first, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    distinct = unit if len(leaders) == len(unit) else unit[leaders]
    return KeyBlock(*(torch.from_numpy(each).to(device) for each in (distinct, bounds, ids)))


def first_equal(unit: np.ndarray) -> np.ndarray:
    """Return the position of the first row that equals each row, int64 [n]."""
    words = (unit + 0.0).view(np.uint32)
    factors = np.random.default_rng(0).integers(1 << 63, size=unit.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.zeros(len(unit), dtype=np.uint64)
    for start in range(0, len(unit), 4096):
        hashes[start : start + 4096] = (words[start : start + 4096] * factors).sum(axis=1)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    first = first[group]
    repeated = np.flatnonzero(first != np.arange(len(unit)))
    for some in np.split(repeated, range(4096, len(repeated), 4096)):
        other = some[(unit[some] != unit[first[some]]).any(axis=1)]
        first[other] = other
    return first


def without_self(packed: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Drop the query itself, or else the last neighbour, from each list: int64 [q, k + 1] -> [q, k]."""
    itself = (packed & 0x7FFFFFFF) == queries[:, None]
    itself[:, -1] |= ~itself.any(axis=1)
    return packed[~itself].reshape(len(packed), k)


def save_whole(path: Path, array: np.ndarray) -> None:
    """Write a file that is complete or absent, even if the process is killed."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, array)
    part.replace(path)


def take(rows: np.ndarray, which: RowNumbers) -> np.ndarray:
    """Return some rows; a range is a view, without a copy."""
    return rows[which.start : which.stop] if isinstance(which, range) else rows[which]
