"""The low-pass filter of the user-item graph against numpy's singular vectors."""

import dataclasses

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.model.graph_filter import filtered, item_axes
from tests.worlds.planted import communities


def test_the_axes_are_the_leading_singular_vectors() -> None:
    log = communities(0).interactions
    dense = np.zeros((log.num_users, log.num_items))
    dense[log.train.users(), log.train.items] = 1
    degrees = [(dense.sum(axis=axis) + 10) ** -0.5 for axis in (1, 0)]
    normalised = degrees[0][:, None] * dense * degrees[1]
    _, values, vectors = np.linalg.svd(normalised)
    num_axes = 4
    assert values[num_axes - 1] > 1.05 * values[num_axes]
    found = item_axes(log, num_axes, seed=0).numpy()
    expected = vectors[:num_axes].T
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-3)
    assert torch.equal(item_axes(log, num_axes, seed=0), torch.from_numpy(found))


def test_a_user_is_the_decayed_sum_of_what_the_user_met() -> None:
    log = communities(0).interactions
    ages = np.random.default_rng(0).uniform(0, 9, len(log.train.items)).astype(np.float32)
    weights = np.random.default_rng(1).uniform(1, 5, len(log.train.items)).astype(np.float32)
    log = dataclasses.replace(log, ages=ages, weights=weights)
    axes = item_axes(log, 4, seed=0)
    users, items = filtered(axes, log, 2.0)
    roots = (log.item_counts() + 10) ** 0.5
    np.testing.assert_allclose(items.numpy(), axes.numpy() / roots[:, None], rtol=1e-5)
    for user in (0, 5):
        own = slice(log.train.indptr[user], log.train.indptr[user + 1])
        met = log.train.items[own]
        worth = weights[own] * 0.5 ** (ages[own] / 2)
        np.testing.assert_allclose(users[user].numpy(), worth @ items.numpy()[met], rtol=1e-4, atol=1e-6)


def test_users_who_met_nothing_else_make_no_axis() -> None:
    # Twenty pairs of a user and an item that met each other alone, beside two groups of users.
    users = [*np.repeat(np.arange(60), 5), *range(60, 80)]
    items = [*((np.arange(300) // 150) * 10 + np.arange(300) % 7), *range(20, 40)]
    pairs = np.unique(np.stack([users, items]), axis=1)
    train = ItemLists.from_pairs(pairs[0], pairs[1], 80)
    log = Interactions(80, 40, train, train, train)
    axes = item_axes(log, 2, seed=0).numpy()
    assert np.abs(axes[20:]).max() < 0.01 < np.abs(axes[:7]).max()
