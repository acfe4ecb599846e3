"""Ranked lists against plain loops."""

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.cold import rank_cold
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users, without
from tests.worlds.planted import item_lists


def test_ranking_equals_a_plain_loop_and_never_shows_what_was_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(9, 4, generator=generator), torch.randn(30, 4, generator=generator)
    seen = item_lists(*[[int(i) for i in np.random.default_rng(u).choice(30, u, replace=False)] for u in range(9)])
    asked = np.array([7, 2, 0, 8])
    found = rank_users(dot_product(users, items), seen, asked, k=5, block=3)
    for row, user in enumerate(asked):
        scores = (items @ users[user]).tolist()
        own = set(seen.items[seen.indptr[user] : seen.indptr[user + 1]].tolist())
        expected = sorted((i for i in range(30) if i not in own), key=lambda i: -scores[i])[:5]
        assert found[row].tolist() == expected


def test_a_user_who_saw_almost_everything_gets_a_short_list() -> None:
    found = rank_users(dot_product(torch.ones(1, 1), torch.ones(4, 1)), item_lists([0, 1, 3]), np.array([0]), k=6)
    assert found.tolist() == [[2, -1, -1, -1, -1, -1]]
    metrics = user_metrics(found, item_lists([2]), np.array([0]), (5,))
    assert metrics["recall@5"].tolist() == [1.0]


def test_tombstones_are_no_candidates_and_no_cold_items() -> None:
    """Item 2 is a tombstone, items 3 and 4 are cold."""
    train, test = (
        ItemLists.from_pairs(np.array(users), np.array(items), 2)
        for users, items in (([0, 1], [0, 1]), ([0, 1], [3, 0]))
    )
    nothing = ItemLists(np.zeros(3, dtype=np.int64), np.empty(0, dtype=np.int32))
    interactions = Interactions(2, 5, train, nothing, test, np.array([2]))
    scores = torch.tensor([[0.0, 1, 9, 2, 3], [1, 0, 9, 2, 3]])
    score = without(lambda users: scores[torch.from_numpy(users)].clone(), interactions.tombstones)
    ranked = rank_users(score, train, np.array([0, 1]), 5)
    assert ranked.tolist() == [[4, 3, 1, -1, -1], [4, 3, 0, -1, -1]]
    assert interactions.cold_items().tolist() == [3, 4]
    assert rank_cold(score, interactions, np.array([0]))["cold_auc"].tolist() == [0.0]
