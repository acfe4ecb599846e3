"""Slices of the test split, and the entropy of interests, by hand."""

import math

import numpy as np
import pytest

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.slices import interest_entropy, slices_of_test
from tests.worlds.planted import item_lists


def test_slices_split_the_test_items() -> None:
    train = item_lists([0, 1, 2], [0, 1], [0], [])
    interactions = Interactions(4, 5, train, item_lists([], [], [], []), item_lists([3], [2, 4], [1], [0]))
    parts = slices_of_test(interactions)
    by_item = [parts[name].items.tolist() for name in ("cold_items", "head_items", "tail_items")]
    assert by_item == [[3, 4], [0], [2, 1]]
    assert parts["cold_users"].counts().tolist() == [0, 0, 0, 1]
    assert parts["active_users"].counts().tolist() == [1, 0, 0, 0]
    assert parts["quiet_users"].counts().tolist() == [0, 0, 1, 0]


def test_entropy_by_hand() -> None:
    # Ten rows make two clusters.
    rows = np.repeat([[0, 1], [5, 0]], 5, axis=0) + 0.01 * np.arange(10)[:, None]
    train = item_lists([0, 1, 2], [0, 5], [1, 6, 7, 8], [])
    thirds = -(np.log(1 / 4) / 4 + 3 * np.log(3 / 4) / 4)
    for seed in range(5):
        found = interest_entropy(rows, train, seed)
        assert found.tolist() == pytest.approx([0, math.log(2), thirds, math.nan], nan_ok=True)


def test_slices_by_entropy() -> None:
    train = item_lists([0], [0], [0], [0], [], [0])
    interactions = Interactions(6, 2, train, item_lists(*[[]] * 6), item_lists([1], [1], [1], [1], [1], []))
    # Of the users who are asked about, 0 to 3, one is a quarter; user 5 has no test item, user 4 no interests.
    parts = slices_of_test(interactions, np.array([0.4, 0.1, 0.9, 0.5, np.nan, 2.0]))
    assert np.flatnonzero(parts["diverse_users"].counts()).tolist() == [2]
    assert np.flatnonzero(parts["focused_users"].counts()).tolist() == [1]
    assert not {"diverse_users", "focused_users"} & set(slices_of_test(interactions))
