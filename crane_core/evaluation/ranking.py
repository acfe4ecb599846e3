"""Rank the whole catalog for users, a block of users at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import ItemLists
from crane_core.evaluation.rules import ItemRules
from crane_core.numerics.top_k import Groups, grouped_top_k, top_k
from crane_core.progress import track

logger = logging.getLogger(__name__)

SCORE_BYTES = 256 * 1024 * 1024
"""Default memory for scores, bytes: with 300,000 items, enough for 223 users at a time."""
GPU_SCORE_BYTES = 2 << 30
"""The same on a GPU, where small blocks are slow."""


def users_at_a_time(num_items: int, device: torch.device | None = None) -> int:
    """Return how many users have all their scores in `SCORE_BYTES`: 1 at least and 1024 at most.

    On a GPU `GPU_SCORE_BYTES` count, and 4096 users at most.
    """
    if device is not None and device.type == "cuda":
        return max(1, min(4096, GPU_SCORE_BYTES // (4 * num_items)))
    return max(1, min(1024, SCORE_BYTES // (4 * num_items)))


Scorer = Callable[[np.ndarray], Tensor]
"""Function from users, int [b], to their scores of the whole catalog, float32 [b, num_items]. The caller may overwrite
the scores; the next call may overwrite them too."""


def without(score: Scorer, items: np.ndarray) -> Scorer:
    """Set the scores of some items, int [n], to -inf, so that they are never recommended."""
    if len(items) == 0:
        return score
    return lambda users: (scores := score(users)).index_fill_(1, torch.from_numpy(items).to(scores.device), -torch.inf)


def dot_product(users: Tensor, items: Tensor, added: Tensor | None = None) -> Scorer:
    """Score by dot products of rows.

    Args:
        users: float32 [num_users, d].
        items: float32 [num_items, d].
        added: float32 [num_items], what is added to the scores of each item, -inf to leave it out; None for nothing.
            As part of the product it takes a third of the time of another pass over the scores.
    """

    # Kept between calls: the page faults of a new block of scores take longer than the products.
    block = users.new_empty(0)

    def score(picked: np.ndarray) -> Tensor:
        nonlocal block
        rows = users[torch.from_numpy(picked.astype(np.int64)).to(users.device)]
        if len(block) < len(picked):
            block = rows.new_empty(len(picked), len(items))
        out = block[: len(picked)]
        return torch.mm(rows, items.T, out=out) if added is None else torch.addmm(added, rows, items.T, out=out)

    return score


def adding(score: Scorer, added: np.ndarray) -> Scorer:
    """Add numbers to the scores of the items, float32 [num_items], -inf to leave one out."""
    return lambda users: (scores := score(users)).add_(torch.from_numpy(added).to(scores.device))


def groups_of(rules: ItemRules, device: torch.device) -> Groups | None:
    """Return the categories of the items as groups of the scores' columns; None where a list may hold any number."""
    return None if rules.most is None else Groups(rules.categories, rules.most, device)


def rank_blocks(
    score: Scorer, seen: ItemLists, users: np.ndarray, k: int, block: int, groups: Groups | None = None
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Rank the whole catalog for some users, a block of users at a time, on the device of the scores.

    Args:
        score: scores to rank by.
        seen: items that must not be recommended to a user.
        users: int [n], the users to rank for.
        k: list length; the size of the catalog if that is smaller.
        block: users at a time; `block * num_items` scores are in memory at once.
        groups: groups of items of which a list holds only so many; None for none.

    Yields:
        int [b] users; float32 [b, k] scores, -inf where fewer than k items are left; int64 [b, k] items.
    """
    blocks = [users[start : start + block] for start in range(0, len(users), block)]
    ranked: tuple[np.ndarray, Tensor, Tensor] | None = None
    for chunk in track(blocks, len(blocks), "rank", logger):
        # While a GPU ranks a block, the CPU prepares the next one, and the caller uses the one before.
        rows, items = seen.rows(chunk)
        finished = None if ranked is None else (ranked[0], ranked[1].cpu(), ranked[2].cpu())
        scores = score(chunk)
        scores[torch.from_numpy(rows), torch.from_numpy(items.astype(np.int64))] = -torch.inf
        width = min(k, scores.shape[1])
        ranked = chunk, *(top_k(scores, width) if groups is None else grouped_top_k(scores, width, groups))
        if finished is not None:
            yield finished
    if ranked is not None:
        yield ranked[0], ranked[1].cpu(), ranked[2].cpu()


def rank_users(
    score: Scorer, seen: ItemLists, users: np.ndarray, k: int, block: int = 1024, groups: Groups | None = None
) -> np.ndarray:
    """Return the top k items of some users, int32 [n, k]; -1 where fewer than k items are left. See `rank_blocks`."""
    ranked = np.full((len(users), k), -1, dtype=np.int32)
    start = 0
    for chunk, values, indices in rank_blocks(score, seen, users, k, block, groups):
        indices = torch.where(values > -torch.inf, indices, -1)
        ranked[start : start + len(chunk), : indices.shape[1]] = indices.numpy()
        start += len(chunk)
    return ranked
