"""Ranking, metrics and intervals, by hand and against plain loops."""

import math

import numpy as np
import pytest
import torch

from crane_core.dataset import Interactions, ItemLists
from crane_core.evaluation import (
    bootstrap,
    coverage,
    dot_product,
    paired_bootstrap,
    popularity_bias,
    rank_users,
    slices,
    user_metrics,
)


def lists(*rows: list[int]) -> ItemLists:
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return ItemLists.from_pairs(users, np.array([i for row in rows for i in row], dtype=np.int32), len(rows))


def test_metrics_by_hand() -> None:
    ranked = np.array([[4, 1, 2], [0, 3, -1]], dtype=np.int32)
    metrics = user_metrics(ranked, lists([1, 2, 9], [3]), np.array([0, 1]), (1, 3))
    assert metrics["recall@1"].tolist() == [0, 0]
    assert metrics["recall@3"].tolist() == pytest.approx([2 / 3, 1])
    best = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert metrics["ndcg@3"].tolist() == pytest.approx([(1 / math.log2(3) + 1 / math.log2(4)) / best, 1 / math.log2(3)])


def test_ranking_equals_a_plain_loop_and_never_shows_what_was_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(9, 4, generator=generator), torch.randn(30, 4, generator=generator)
    seen = lists(*[[int(i) for i in np.random.default_rng(u).choice(30, u, replace=False)] for u in range(9)])
    asked = np.array([7, 2, 0, 8])
    found = rank_users(dot_product(users, items), seen, asked, k=5, block=3)
    for row, user in enumerate(asked):
        scores = (items @ users[user]).tolist()
        own = set(seen.items[seen.indptr[user] : seen.indptr[user + 1]].tolist())
        expected = sorted((i for i in range(30) if i not in own), key=lambda i: -scores[i])[:5]
        assert found[row].tolist() == expected


def test_a_user_who_saw_almost_everything_gets_a_short_list() -> None:
    found = rank_users(dot_product(torch.ones(1, 1), torch.ones(4, 1)), lists([0, 1, 3]), np.array([0]), k=6)
    assert found.tolist() == [[2, -1, -1, -1, -1, -1]]
    metrics = user_metrics(found, lists([2]), np.array([0]), (5,))
    assert metrics["recall@5"].tolist() == [1.0]


def test_bootstrap_covers_the_mean_at_its_rate() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = bootstrap({"x": generator.normal(0.3, 1, size=80)}, 300, seed=trial)["x"]
        hits += interval.low <= 0.3 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_sees_a_small_steady_difference() -> None:
    generator = np.random.default_rng(2)
    reference = {"x": generator.normal(0, 1, size=200)}
    challenger = {"x": reference["x"] + 0.01 + generator.normal(0, 0.01, size=200)}
    interval = paired_bootstrap(challenger, reference, 500, seed=0)["x"]
    assert 0 < interval.low < 0.01 < interval.high


def test_no_users_have_no_interval() -> None:
    assert math.isnan(bootstrap({"x": np.empty(0)}, 100, seed=0)["x"].mean)


def test_coverage_and_popularity_bias_by_hand() -> None:
    train = lists([0, 1], [0])
    ranked = np.array([[0, 2], [0, -1]])
    assert coverage(ranked, 4) == 0.5
    # Item counts 2, 1, 0, 0: own means 1.5 and 2; recommended means 1 and 2.
    assert popularity_bias(ranked, np.array([0, 1]), train, 4) == pytest.approx(1.5 / 1.75)


def test_slices_split_the_test_items() -> None:
    train = lists([0, 1, 2], [0, 1], [0], [])
    interactions = Interactions(4, 5, train, lists([], [], [], []), lists([3], [2, 4], [1], [0]))
    parts = slices(interactions)
    by_item = [parts[name].items.tolist() for name in ("cold_items", "head_items", "tail_items")]
    assert by_item == [[3, 4], [0], [2, 1]]
    assert parts["cold_users"].counts().tolist() == [0, 0, 0, 1]
    assert parts["active_users"].counts().tolist() == [1, 0, 0, 0]
    assert parts["quiet_users"].counts().tolist() == [0, 0, 1, 0]
