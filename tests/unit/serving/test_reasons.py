"""Reasons against a loop over every row of every list."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import ItemLists
from crane_core.model.fold_in import Block, FoldIn, History
from crane_core.serving.reasons import Reasons

CPU = torch.device("cpu")
NUM_USERS, NUM_ITEMS, K = 120, 200, 12


@dataclasses.dataclass(frozen=True)
class World:
    fold_in: FoldIn
    items: np.ndarray
    seen: ItemLists
    history: History
    lists: np.ndarray

    def reasons(self) -> Reasons:
        return Reasons(self.fold_in, self.items, self.seen, self.history, CPU)


def world(seed: int, popularity: float) -> World:
    """Histories of 1 to 90 items; lists by the folded rows and a popularity of the given strength."""
    generator = np.random.default_rng(seed)
    blocks = (Block(4, None, 0.5), Block(3, 5.0), Block(1))
    rows = generator.normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    rows[:, 7] = 0
    items = generator.normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    items[:, 7] *= popularity
    fold_in = FoldIn(rows, np.float32([0, 0, 0, 0, 0, 0, 0, 1]), blocks)
    sizes = generator.integers(1, 90, NUM_USERS) // generator.integers(1, 20, NUM_USERS) + 1
    met = np.concatenate([generator.choice(NUM_ITEMS, size, replace=False) for size in sizes])
    seen = ItemLists.from_pairs(np.repeat(np.arange(NUM_USERS), sizes), met, NUM_USERS)
    ages = generator.uniform(0, 20, len(met)).astype(np.float32)
    history = History(seen.users(), seen.items, generator.uniform(1, 5, len(met)).astype(np.float32), ages)
    scores = fold_in.fold(history, NUM_USERS) @ items.T
    scores[seen.users(), seen.items] = -np.inf
    return World(fold_in, items, seen, history, np.argsort(-scores, axis=1)[:, :K])


def expected(world: World, user: int, place: int) -> set[int]:
    """The items that may be named, by one sum at a time in float64; -1 for none."""
    item = int(world.lists[user, place])
    own = slice(world.seen.indptr[user], world.seen.indptr[user + 1])
    met, weights, ages = world.seen.items[own], world.history.weights[own], world.history.ages
    assert ages is not None
    popular = [int(i) for i in np.argsort(-(world.items @ world.fold_in.constant), kind="stable") if i not in met][:K]
    if item in popular:
        return {-1}
    added = []
    for row, weight, age in zip(world.fold_in.rows[met].astype(float), weights, ages[own], strict=True):
        scored = world.items[item].astype(float)
        part = weight / weights.astype(float).sum() ** 0.5 * row[:4] @ scored[:4]
        added.append(part + weight * 0.5 ** (age / 5) * row[4:7] @ scored[4:7])
    near = np.array(added) >= max(added) - 1e-4
    return {*met[near].tolist(), *([-1] if max(added) < 1e-4 else [])} if max(added) > -1e-4 else {-1}


@pytest.mark.parametrize(("seed", "popularity"), [(0, 1.0), (1, 4.0), (2, 0.0)])
def test_reasons_are_the_largest_sums_on_a_thousand_rows(seed: int, popularity: float) -> None:
    whole = world(seed, popularity)
    users = np.random.default_rng(seed).permutation(NUM_USERS)
    found = whole.reasons().of(users, whole.lists[users])
    assert found.size >= 1000
    for position, user in enumerate(users.tolist()):
        for place in range(K):
            assert found[position, place] in expected(whole, user, place), (user, place)
    assert 0.05 < (found >= 0).mean() < 1


def test_the_bound_of_the_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, users = world(0, 1.0), np.arange(NUM_USERS)
    found = whole.reasons().of(users, whole.lists)
    for numbers in (1, 500):
        monkeypatch.setattr("crane_core.serving.reasons._BLOCK_NUMBERS", numbers)
        np.testing.assert_array_equal(whole.reasons().of(users, whole.lists), found)


def test_popularity_alone_is_no_reason() -> None:
    whole = world(0, 1000.0)
    assert (whole.reasons().of(np.arange(NUM_USERS), whole.lists) == -1).mean() > 0.95


def test_an_item_that_takes_away_is_no_reason() -> None:
    """One item was met; it pushes every score of the list down."""
    items = np.float32([[1, 0], [1, 3], [1, 2], [1, 1]])
    fold_in = FoldIn(np.float32([[-1, 0], [0, 0], [0, 0], [0, 0]]), np.float32([0, -1]), (Block(2),))
    seen = ItemLists.from_pairs(np.array([0]), np.array([0]), 1)
    history = History(seen.users(), seen.items, np.ones(1))
    assert Reasons(fold_in, items, seen, history, CPU).of(np.array([0]), np.array([[1]])).tolist() == [[-1]]
    helpful = dataclasses.replace(fold_in, rows=-fold_in.rows)
    assert Reasons(helpful, items, seen, history, CPU).of(np.array([0]), np.array([[1]])).tolist() == [[0]]
