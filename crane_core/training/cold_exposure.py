"""Choose how much is added to the scores of cold items, which no training interaction tells anything about."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_blocks, users_at_a_time, without
from crane_core.model.views import Rows

_OFFSETS = tuple(step / 4 for step in range(-40, 41))
_LEAST_ROWS = 200
"""Validation interactions with cold items, from which on these may be shown more than they are met."""
_MOST_SHARE = 1.5
"""Then, the share of the lists' places that they take at most, in their shares of the validation interactions."""
_K = 20


def cold_offset(rows: Rows, interactions: Interactions, users: np.ndarray, exposure: float | None) -> float:
    """Return what is added to the score of every cold item.

    Args:
        rows: users float32 [num_users, d] and items float32 [num_items, d] to score by.
        interactions: training and validation interactions.
        users: int [n], the validation users.
        exposure: share of the places in the lists that cold items take; None for validation's choice. Then it is the
            offset by which most validation items are found, the smallest of equals, with at most 1.5 times the share
            that cold items have among them; at most that share where few of them are cold. Cold items that nothing
            tells apart are not shown.
    """
    cold = interactions.cold_items()
    if not len(cold) or len(cold) == interactions.num_items:
        return 0.0
    if exposure is None and bool((rows[1][cold] == rows[1][cold[0]]).all()):
        return _OFFSETS[0]
    _, positives = interactions.validation.rows(users)
    is_cold = np.isin(positives, cold)
    lists = _Lists(rows, interactions, users, cold)
    found = {offset: lists.merged(offset) for offset in _OFFSETS}
    share = {offset: float(np.isin(ranked, cold).mean()) for offset, ranked in found.items()}
    if exposure is not None:
        return min(_OFFSETS, key=lambda offset: (abs(share[offset] - exposure), offset))
    most = float(is_cold.mean()) * (_MOST_SHARE if is_cold.sum() >= _LEAST_ROWS else 1.0)
    allowed = [offset for offset in _OFFSETS if share[offset] <= most] or [_OFFSETS[0]]

    def recall(offset: float) -> float:
        return float(user_metrics(found[offset], interactions.validation, users, (_K,))["recall@20"].mean())

    return max(allowed, key=recall)


class _Lists:
    """The best warm and the best cold items of each user, to be merged at any offset."""

    def __init__(self, rows: Rows, interactions: Interactions, users: np.ndarray, cold: np.ndarray) -> None:
        warm = np.setdiff1d(np.arange(interactions.num_items), cold)
        score = without(dot_product(*rows), interactions.tombstones)
        block = users_at_a_time(interactions.num_items)
        self._sides: list[tuple[Tensor, Tensor]] = []
        for others in (cold, warm):
            parts = list(rank_blocks(without(score, others), interactions.train, users, _K, block))
            self._sides.append((torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])))

    def merged(self, offset: float) -> np.ndarray:
        """Return the lists where this is added to the cold scores: int64 [n, k], -1 where fewer are left."""
        (warm, warm_items), (cold, cold_items) = self._sides
        scores, items = torch.cat([warm, cold + offset], dim=1), torch.cat([warm_items, cold_items], dim=1)
        best, places = scores.topk(min(_K, scores.shape[1]), dim=1)
        return torch.where(best > -torch.inf, items.gather(1, places), -1).numpy()
