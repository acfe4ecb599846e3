"""Measure a served model on the window of the challenger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from crane_core.dataset.interactions import Interactions, load_ids, load_interactions
from crane_core.evaluation.metrics import coverage, popularity_bias, user_metrics
from crane_core.schema import ITEM_ID, USER_ID
from crane_core.serving.model_folder import ServedModel
from crane_core.storage.artifacts import Artifact

_K = 20


@dataclass(frozen=True)
class JudgedWindow:
    """The window on which challenger and champion are compared.

    Attributes:
        interactions: its training and test items.
        user_ids, item_ids: external ids, position = index.
        users: int [n], the evaluated users.
    """

    interactions: Interactions
    user_ids: np.ndarray
    item_ids: np.ndarray
    users: np.ndarray

    @classmethod
    def load(cls, source: Artifact, users: np.ndarray) -> JudgedWindow:
        """Read the artifact of `etl.interactions`."""
        user_ids = load_ids(source, "users", USER_ID).to_numpy()
        item_ids = load_ids(source, "items", ITEM_ID).to_numpy()
        return cls(load_interactions(source), user_ids, item_ids, users)


@dataclass(frozen=True)
class Measurement:
    """Metrics of a model on the judged window.

    Attributes:
        version: registered version.
        window_end: end of the window the model was made from.
        metrics: `ndcg@20` and `recall@20`, each float [num_users]; all measurements of one decision list the same users
            in the same order.
        coverage: share of the catalog in at least one top 20.
        popularity_bias: training popularity of the top 20 divided by that of the users' own items.
        cold_recall: Recall@20 of held-out items without training interactions, None where there are none.
        cold_share: share of such items in the top 20.
        cold_held_out: share of such items in the held-out interactions.
    """

    version: str
    window_end: datetime
    metrics: Mapping[str, np.ndarray]
    coverage: float
    popularity_bias: float
    cold_recall: float | None
    cold_share: float
    cold_held_out: float


def measure(model: ServedModel, version: str, window_end: datetime, judged: JudgedWindow, block: int) -> Measurement:
    """Rank the judged window with a served model, matched by external ids, and compute its metrics.

    Args:
        model: the model.
        version: its version.
        window_end: end of the window it was made from.
        judged: the window.
        block: users at a time.
    """
    from crane_core.evaluation.slices import slices_of_test

    interactions, users = judged.interactions, judged.users
    ranked = _rank(model, judged, block)
    cold = slices_of_test(interactions)["cold_items"]
    members = np.flatnonzero(cold.counts()[users] > 0)
    is_cold = np.isin(np.arange(interactions.num_items), interactions.cold_items())
    num_held_out = interactions.test.counts()[users].sum()
    return Measurement(
        version,
        window_end,
        user_metrics(ranked, interactions.test, users, (_K,)),
        coverage(ranked, interactions.num_items - len(interactions.tombstones)),
        popularity_bias(ranked, users, interactions.train, interactions.num_items),
        float(user_metrics(ranked[members], cold, users[members], (_K,))["recall@20"].mean()) if len(members) else None,
        float(is_cold[ranked[ranked >= 0]].mean()) if (ranked >= 0).any() else 0.0,
        float(cold.counts()[users].sum() / max(num_held_out, 1)),
    )


def _rank(model: ServedModel, judged: JudgedWindow, block: int) -> np.ndarray:
    """Return the top 20 of every evaluated user: int32 [n, 20] items of the window, -1 for no item.

    Users that the model does not know get its most popular items, as in serving. Items that only one of model and
    window knows are never ranked. Training items of the window are masked, whatever window the model was made from.
    """
    # Torch takes seconds to import, and an earlier decision is found without it.
    import torch

    from crane_core.evaluation.ranking import dot_product, rank_users

    interactions, users = judged.interactions, judged.users
    rows = model.item_ids.get_indexer(judged.item_ids)
    # Tombstones keep their numbers, and an older model may know them; they are outside the catalog all the same.
    rows[interactions.tombstones] = -1
    absent = np.where(rows >= 0, 0.0, -np.inf).astype(np.float32)
    known = model.user_ids.get_indexer(judged.user_ids[users])
    one = np.ones((interactions.num_users, 1), dtype=np.float32)
    everybody = np.zeros((interactions.num_users, model.user_embeddings.shape[1]), dtype=np.float32)
    everybody[users[known >= 0]] = model.user_embeddings[known[known >= 0]]
    # A constant coordinate adds -inf to the scores of items that the model does not know.
    item_rows = np.column_stack([np.where(rows[:, None] >= 0, model.item_embeddings[rows], 0.0), absent])
    sides = (
        (known >= 0, np.column_stack([everybody, one]), item_rows),
        (known < 0, one, _popularity(model, rows)[:, None]),
    )
    ranked = np.full((len(users), _K), -1, dtype=np.int32)
    for who, left, right in sides:
        score = dot_product(torch.from_numpy(left), torch.from_numpy(right))
        ranked[who] = rank_users(score, interactions.train, users[who], _K, block)
    return ranked


def _popularity(model: ServedModel, rows: np.ndarray) -> np.ndarray:
    """Return a score that sorts items by the model's popularity: float32 [num_items], -inf for unknown items.

    The score is the rank and not the count: many counts are equal, and the evaluation sorts equal scores by row.
    """
    counts = np.where(rows >= 0, model.popularity[rows], -np.inf)
    scores = np.empty(len(rows), dtype=np.float32)
    scores[np.argsort(-counts, kind="stable")] = -np.arange(len(rows))
    scores[rows < 0] = -np.inf
    return scores
