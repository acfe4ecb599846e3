"""Drawing negatives: never met, and evenly over the rest."""

from __future__ import annotations

import numpy as np
import pytest

from crane_core.dataset.interactions import ItemLists
from crane_core.training.negatives import NegativeSampler
from tests.worlds.planted import checkerboard
from tests.worlds.trainings import lists


@pytest.mark.parametrize("seed", range(20))
def test_shared_negatives_are_warm_and_marked_where_met(seed: int) -> None:
    train, generator = lists(seed), np.random.default_rng(seed)
    dense = np.zeros((30, 50), dtype=bool)
    dense[train.users(), train.items] = True
    users = generator.integers(30, size=40)
    items, met = NegativeSampler(train, 50).shared(users, 12, generator)
    assert items.dtype == np.int64 and 0 < len(items) <= 12
    assert (np.diff(items) > 0).all()
    assert dense.any(axis=0)[items].all()
    assert met.dtype == bool and (met == dense[users][:, items]).all()


def test_shared_negatives_cover_the_warm_catalog_evenly() -> None:
    train, generator = lists(0), np.random.default_rng(0)
    sampler, drawn = NegativeSampler(train, 50), np.zeros(50)
    for _ in range(6000):
        drawn[sampler.shared(np.array([1]), 4, generator)[0]] += 1
    warm = np.unique(train.items)
    assert drawn.sum() == drawn[warm].sum()
    # About 700 draws of each item: a quarter is seven standard deviations.
    assert np.abs(drawn[warm] / drawn[warm].mean() - 1).max() < 0.25


def test_negatives_are_never_positives_and_cover_the_rest() -> None:
    interactions = checkerboard()
    sampler = NegativeSampler(interactions.train, interactions.num_items)
    users = np.full(20_000, 3)
    drawn = sampler.one_each(users, np.random.default_rng(0))
    met = interactions.train.rows(np.array([3]))[1]
    counts = np.bincount(drawn, minlength=interactions.num_items)
    assert counts[met].sum() == 0
    free = np.delete(counts, met)
    assert free.min() > 0.8 * free.mean()


def test_the_last_item_left_to_a_user_is_found_at_once() -> None:
    size = 100_000
    own = np.delete(np.arange(size, dtype=np.int32), 777)
    train = ItemLists(np.array([0, size - 1]), own)
    assert (
        NegativeSampler(train, size).one_each(np.zeros(3, dtype=np.int64), np.random.default_rng(0)).tolist()
        == [777] * 3
    )
