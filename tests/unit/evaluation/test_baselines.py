"""The baselines, by hand and against dense loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.evaluation import baselines
from crane_core.evaluation.baselines import (
    choose_half_life,
    content,
    first_unseen,
    item_knn,
    popular_for_strangers,
    popularity,
    recent_popularity,
)
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import Scorer, dot_product, rank_users
from tests.worlds.planted import checkerboard


def interactions(*rows: list[int], num_items: int) -> Interactions:
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    train = ItemLists.from_pairs(users, np.array([i for row in rows for i in row], dtype=np.int32), len(rows))
    nothing = ItemLists(np.zeros(len(rows) + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    return Interactions(len(rows), num_items, train, nothing, nothing)


def random_interactions(num_users: int = 30, num_items: int = 25) -> Interactions:
    generator = np.random.default_rng(3)
    rows = [sorted(generator.choice(num_items - 2, size=generator.integers(0, 9), replace=False)) for _ in range(30)]
    return interactions(*rows, num_items=num_items)


def test_popularity_counts_and_breaks_ties_by_row() -> None:
    log = interactions([2, 3], [2, 1], [2, 1, 3], num_items=5)
    nothing = ItemLists(np.zeros(4, dtype=np.int64), np.empty(0, dtype=np.int32))
    assert rank_users(popularity(log), nothing, np.array([2, 0]), 5).tolist() == [[2, 1, 3, 0, 4]] * 2
    # Many ties: short lists are sorted stably by any algorithm.
    many = popularity(interactions([70, 90], [90], num_items=100))(np.array([0]))[0]
    rest = [item for item in range(100) if item not in (70, 90)]
    assert many.argsort(descending=True).tolist() == [90, 70, *rest]


def test_users_without_training_items_are_shown_what_is_popular() -> None:
    log = interactions([0], [], [0, 3], [], num_items=4)
    rows = torch.eye(4)
    scores = popular_for_strangers(dot_product(rows, rows), log, None)(np.array([3, 2, 1]))
    assert scores[1].tolist() == [0, 0, 1, 0]
    assert all(scores[row].argsort(descending=True).tolist() == [0, 3, 1, 2] for row in (0, 2))
    score = dot_product(rows, rows)
    assert popular_for_strangers(score, interactions([0], [3], num_items=4), None) is score


def test_recent_popularity_forgets_with_age() -> None:
    log = replace(interactions([0, 1], [0, 1], [0, 2], num_items=4), ages=np.float32([8, 0, 8, 2, 8, 0]))
    nobody = np.array([0])
    assert popularity(log)(nobody).argsort(descending=True).tolist() == [[0, 1, 2, 3]]
    assert recent_popularity(log, 1.0)(nobody).argsort(descending=True).tolist() == [[1, 2, 0, 3]]
    assert recent_popularity(log, None)(nobody).tolist() == popularity(log)(nobody).tolist()


def test_the_half_life_is_the_one_that_finds_the_validation_items() -> None:
    # Of 60 items, half were popular long ago and half are popular now; users go on with those of now.
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 20)
    old = np.concatenate([generator.choice(30, 12, replace=False) for _ in range(40)]).reshape(40, 12)
    new = np.concatenate([generator.choice(np.arange(30, 60), 8, replace=False) for _ in range(40)]).reshape(40, 8)
    items = np.sort(np.concatenate([old, new], axis=1), axis=1)
    train = ItemLists.from_pairs(users, items.ravel(), 40)
    left = np.array([np.setdiff1d(np.arange(30, 60), row)[:3] for row in items])
    validation = ItemLists.from_pairs(np.repeat(np.arange(40), 3), left.ravel(), 40)
    ages = np.where(train.items < 30, 100, 1).astype(np.float32)
    log = Interactions(40, 60, train, validation, train, ages=ages)
    assert choose_half_life(log, (None, 5.0)) == 5.0
    assert choose_half_life(log, (5.0, None)) == 5.0
    assert choose_half_life(replace(log, ages=None), (5.0,)) is None
    longest = replace(log, ages=np.zeros_like(ages))
    assert choose_half_life(longest, (1.0, 7.0, None)) is None


@pytest.mark.parametrize("k", [1, 3, 25])
def test_the_first_unseen_items_equal_a_plain_loop(k: int) -> None:
    log = random_interactions()
    order = np.random.default_rng(1).permutation(25)[:20]
    users = np.array([7, 0, 29, 7])
    found = first_unseen(order, log.train, users, k)
    for user, row in zip(users, found, strict=True):
        seen = set(log.train.items[log.train.indptr[user] : log.train.indptr[user + 1]].tolist())
        expected = [item for item in order.tolist() if item not in seen][:k]
        assert row.tolist() == expected + [-1] * (k - len(expected))


def test_item_knn_by_hand() -> None:
    # Item 0 is met by users 0 and 1, item 1 by all three, item 2 by user 2, item 3 by no one.
    log = interactions([0, 1], [0, 1], [1, 2], num_items=4)
    near, far = 2 / math.sqrt(2 * 3), 1 / math.sqrt(3 * 1)
    scores = item_knn(log, num_neighbours=5, shrinkage=0)(np.array([0, 2]))
    assert scores.dtype == torch.float32
    assert scores.numpy() == pytest.approx(np.array([[near, near, far, 0], [near, far, far, 0]]))
    # One neighbour each: item 1 has item 0, and items 0 and 2 have item 1.
    scores = item_knn(log, num_neighbours=1, shrinkage=0)(np.array([0, 2]))
    assert scores.numpy() == pytest.approx(np.array([[near, near, far, 0], [near, 0, far, 0]]))
    shrunk = item_knn(log, num_neighbours=5, shrinkage=3)(np.array([0]))
    assert shrunk[0, 0].item() == pytest.approx(2 / (math.sqrt(6) + 3))


@pytest.mark.parametrize(("num_neighbours", "shrinkage"), [(1, 0.0), (4, 0.0), (4, 7.0), (100, 2.0)])
def test_item_knn_equals_a_dense_loop_in_blocks_and_whole(
    num_neighbours: int, shrinkage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = random_interactions()
    dense = np.zeros((log.num_users, log.num_items))
    dense[log.train.users(), log.train.items] = 1
    expected = np.zeros_like(dense)
    for item in range(log.num_items):
        similarity = np.zeros(log.num_items)
        for other in range(log.num_items):
            overlap = (dense[:, item] * dense[:, other]).sum()
            if other != item and overlap:
                norm = math.sqrt(dense[:, item].sum() * dense[:, other].sum())
                similarity[other] = overlap / (norm + shrinkage)
        best = sorted(range(log.num_items), key=lambda other: (-similarity[other], other))[:num_neighbours]
        for user in range(log.num_users):
            expected[user, item] = sum(similarity[other] for other in best if dense[user, other])
    users = np.arange(log.num_users)
    whole = item_knn(log, num_neighbours, shrinkage)(users)
    assert whole.numpy() == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(baselines, "BLOCK_ENTRIES", 60)
    assert torch.equal(item_knn(log, num_neighbours, shrinkage)(users), whole)


def test_item_knn_finds_the_planted_answer() -> None:
    log = checkerboard()
    users = np.arange(log.num_users)
    ranked = rank_users(item_knn(log), log.train, users, 2)
    assert user_metrics(ranked, log.test, users, (2,))["recall@2"].mean() == 1.0


def modality(items: np.ndarray, profiles: np.ndarray) -> Modality:
    return Modality(
        "m", items.astype(np.float32), np.ones(len(items), bool), profiles.astype(np.float32), np.ones(len(profiles))
    )


def test_content_is_the_cosine_over_all_modalities() -> None:
    first = modality(np.array([[1, 0], [0, 2], [0, 0]]), np.array([[3, 4], [0, 0]]))
    second = modality(np.array([[2], [0], [0]]), np.array([[12], [0]]))
    scores = content([first, second])(np.array([0, 1]))
    # Profile (3, 4, 12) of length 13; items (1, 0, 2), (0, 2, 0) and one without features.
    expected = [[(3 + 24) / (13 * math.sqrt(5)), 8 / (13 * 2), 0], [0, 0, 0]]
    assert scores.numpy() == pytest.approx(np.array(expected))


@pytest.mark.parametrize("build", [popularity, item_knn])
def test_scores_are_the_caller_s_to_overwrite(build: type) -> None:
    score: Scorer = build(random_interactions())
    first = score(np.array([4, 1]))
    kept = first.clone()
    first[:] = -torch.inf
    assert torch.equal(score(np.array([4, 1])), kept)
