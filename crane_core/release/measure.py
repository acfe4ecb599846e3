"""Measure a served model on the window that is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.metrics import coverage, popularity_bias, user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.evaluation.slices import slices_of_test
from crane_core.serving.model_folder import ServedModel

_K = 20


@dataclass(frozen=True)
class Measurement:
    """How a model does on the window that is judged.

    Attributes:
        version: registered version.
        window_end: end of the window it was made from.
        metrics: `ndcg@20` and `recall@20`, each float [num_users]; all standings of one decision list the same users
            in the same order.
        coverage: share of the catalog in at least one top 20.
        popularity_bias: training popularity of the top 20 over that of the users' own items.
        cold_recall: Recall@20 of held-out items without training interactions, None where there are none.
    """

    version: str
    window_end: datetime
    metrics: Mapping[str, np.ndarray]
    coverage: float
    popularity_bias: float
    cold_recall: float | None


def measure(
    model: ServedModel,
    version: str,
    window_end: datetime,
    interactions: Interactions,
    user_ids: np.ndarray,
    item_ids: np.ndarray,
    users: np.ndarray,
    block: int,
) -> Measurement:
    """What a served model would have shown on a window, matched by external ids.

    Users the model does not know get its most popular items, as in serving. Items outside the window's catalog are
    passed over. Training items of the window are masked, whatever window the model comes from.

    Args:
        model: the model.
        version: its version.
        window_end: end of the window it was made from.
        interactions: the judged window.
        user_ids, item_ids: external ids of that window, position = index.
        users: int [n] evaluated users of that window.
        block: users at a time.
    """
    rows = model.item_ids.get_indexer(item_ids)
    # Tombstones keep their numbers, and a model from before knows them: they are outside the catalog all the same.
    rows[interactions.tombstones] = -1
    absent = np.where(rows >= 0, 0.0, -np.inf).astype(np.float32)
    known = model.user_ids.get_indexer(user_ids[users])
    ranked = np.full((len(users), _K), -1, dtype=np.int32)
    counts = np.where(rows >= 0, model.popularity()[rows], -np.inf)
    # Places, not counts: many are equal, and the evaluation puts equal ones by row.
    popularity = np.empty(len(rows), dtype=np.float32)
    popularity[np.argsort(-counts, kind="stable")] = -np.arange(len(rows))
    popularity[rows < 0] = -np.inf
    one = np.ones((interactions.num_users, 1), dtype=np.float32)
    everybody = np.zeros((interactions.num_users, model.user_embeddings.shape[1]), dtype=np.float32)
    everybody[users[known >= 0]] = model.user_embeddings[known[known >= 0]]
    # A constant coordinate carries -inf into the scores of items the model has never heard of.
    item_rows = np.column_stack([np.where(rows[:, None] >= 0, model.item_embeddings[rows], 0.0), absent])
    sides = (
        (known >= 0, np.column_stack([everybody, one]), item_rows),
        (known < 0, one, popularity[:, None]),
    )
    for who, left, right in sides:
        score = dot_product(torch.from_numpy(left), torch.from_numpy(right))
        ranked[who] = rank_users(score, interactions.train, users[who], _K, block)
    cold = slices_of_test(interactions)["cold_items"]
    members = np.flatnonzero(cold.counts()[users] > 0)
    return Measurement(
        version,
        window_end,
        user_metrics(ranked, interactions.test, users, (_K,)),
        coverage(ranked, interactions.num_items - len(interactions.tombstones)),
        popularity_bias(ranked, users, interactions.train, interactions.num_items),
        float(user_metrics(ranked[members], cold, users[members], (_K,))["recall@20"].mean()) if len(members) else None,
    )
