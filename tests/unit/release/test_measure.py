from datetime import UTC, datetime

import numpy as np
import pytest

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.release.measure import JudgedWindow, measure
from tests.worlds.served import make_model


@pytest.mark.parametrize("tombstones", [[], ["gone"]])
def test_a_model_of_another_window_answers_by_external_ids(tombstones):
    """Items in another order, an item and a user the model never met, and one item that is gone, or a tombstone."""
    model = make_model(
        users={"ann": [1, 0], "bob": [0, 1]},
        items={"gone": [9, 9], "c": [0, 3], "b": [2, 2], "a": [3, 0]},
        seen={"ann": ["gone", "c"], "bob": ["c"]},
    )
    # The judged window: users cyd (new), bob, ann; items a, b, new, c.
    train = ItemLists.from_pairs(np.array([1, 2, 0]), np.array([3, 0, 3]), 3)
    test = ItemLists.from_pairs(np.array([0, 1, 2]), np.array([0, 1, 2]), 3)
    items = ["a", "b", "new", "c", *tombstones]
    judged = Interactions(3, len(items), train, test, test, np.arange(4, len(items)))
    users = np.array(["cyd", "bob", "ann"], dtype=object)
    window = JudgedWindow(judged, users, np.array(items, dtype=object), np.arange(3))
    found = measure(model, "1", datetime(2026, 3, 1, tzinfo=UTC), window, block=2)
    # cyd gets what is popular: c is masked, so a and b (no interactions) by either order, and a is within the 20.
    # bob: c masked, b (2) before a (0): hit at rank 1. ann wants `new`, which the model cannot recommend.
    assert found.metrics["recall@20"].tolist() == [1, 1, 0]
    assert found.metrics["ndcg@20"][1] == pytest.approx(1)
    assert found.coverage == pytest.approx(3 / 4)
    # Nobody trained on b (wanted by bob) or new (wanted by ann).
    assert found.cold_recall == pytest.approx(1 / 2)
    # b is in all three lists, of two items each.
    assert (found.cold_share, found.cold_held_out) == (pytest.approx(3 / 6), pytest.approx(2 / 3))
