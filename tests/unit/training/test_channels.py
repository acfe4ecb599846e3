"""Channels: spreads, zero rows where a channel is absent, sums over the history, fold-ins that give the user rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.model.fold_in import History
from crane_core.training.channels import GENERATED, MODEL, PROFILE, RECENT, Channels, of_unit_spread, score_spread
from tests.worlds.settings import model_config

NUM_USERS, NUM_ITEMS, NUM_COLD = 90, 70, 12


def made(has_times: bool = True, num_missing: int = 5) -> tuple[Channels, Interactions]:
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 9, NUM_USERS)
    users = np.repeat(np.arange(NUM_USERS), counts)
    items = np.concatenate([generator.choice(NUM_ITEMS - NUM_COLD, count, replace=False) for count in counts])
    train = ItemLists.from_pairs(users, items.astype(np.int32), NUM_USERS)
    nothing = ItemLists(np.zeros(NUM_USERS + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    ages = generator.uniform(0, 30, len(users)).astype(np.float32)
    weights = generator.uniform(0.5, 2, len(users)).astype(np.float32)
    log = Interactions(NUM_USERS, NUM_ITEMS, train, nothing, nothing, weights=weights, ages=ages if has_times else None)
    present = np.arange(NUM_ITEMS) >= num_missing
    features = [(generator.standard_normal((NUM_ITEMS, 6)).astype(np.float32), present)]
    model = tuple(torch.from_numpy(generator.standard_normal((n, 4))).float() for n in (NUM_USERS, NUM_ITEMS))
    return Channels((model[0], model[1]), log, features, model_config(embedding_dim=8)), log


def test_spread_is_the_standard_deviation_of_all_scores() -> None:
    users, items = torch.randn(61, 5), torch.randn(80, 5)
    assert score_spread(users, items) == pytest.approx((users @ items.T).std(correction=0).item(), rel=1e-5)


def test_equal_scores_of_all_items_become_a_channel_of_zeros() -> None:
    everything = np.ones(4, dtype=bool)
    for items, measured in ((torch.ones(4, 2), everything), (torch.randn(4, 2), ~everything)):
        _, scaled = of_unit_spread((torch.ones(3, 2), items), measured)
        assert scaled.shape == (4, 2) and not scaled.any()


def test_scores_of_the_items_that_have_a_channel_have_unit_spread_and_the_others_are_zero() -> None:
    channels, _ = made()
    found = channels.at(5.0)
    assert sorted(found) == sorted(channels.names) == sorted([MODEL, RECENT, PROFILE, GENERATED])
    warm, has_content = np.arange(NUM_ITEMS) < NUM_ITEMS - NUM_COLD, np.arange(NUM_ITEMS) >= 5
    for name, measured in (
        (MODEL, warm),
        (RECENT, warm),
        (PROFILE, warm & has_content),
        (GENERATED, warm & has_content),
    ):
        users, items = found[name]
        scores = users @ items.T
        assert float(scores[:, measured].std(correction=0)) == pytest.approx(1, rel=1e-3), name
        absent = ~(warm if name in (MODEL, RECENT) else has_content)
        assert absent.any() and not items[torch.from_numpy(absent)].any(), name
        assert items[torch.from_numpy(~absent)].any(dim=1).all(), name


def test_a_profile_is_the_decayed_sum_over_the_root_of_the_weights() -> None:
    channels, log = made()
    users, _ = channels.at(5.0)[PROFILE]
    assert channels.whitening is not None
    white = channels.whitening.rows(channels.features).numpy()
    user = 3
    own = slice(log.train.indptr[user], log.train.indptr[user + 1])
    weights = log.weights[own] * 0.5 ** (log.ages[own] / 5)
    expected = weights @ white[log.train.items[own]] / weights.sum() ** 0.5
    np.testing.assert_allclose(users[user].numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [RECENT, PROFILE])
def test_the_own_history_folds_to_the_users_row(name: str) -> None:
    channels, log = made()
    history = History(log.train.users(), log.train.items, log.weights, log.ages)
    folded = channels.fold_in(name, 5.0).fold(history, NUM_USERS)
    np.testing.assert_allclose(folded, channels.at(5.0)[name][0].numpy(), rtol=1e-4, atol=1e-5)


def test_without_times_or_content_their_channels_are_absent() -> None:
    timeless, _ = made(has_times=False)
    assert sorted(timeless.at(None)) == sorted(timeless.names) == sorted([MODEL, PROFILE, GENERATED])
    channels, log = made()
    bare = Channels(channels.model, replace(log, ages=None), [], channels.config)
    assert list(bare.at(None)) == bare.names == [MODEL]
    nothing_present = [(items, np.zeros_like(present)) for items, present in channels.features]
    assert Channels(channels.model, replace(log, ages=None), nothing_present, channels.config).names == [MODEL]


def test_likeness_is_half_behaviour_and_half_content() -> None:
    channels, _ = made()
    rows = channels.likeness()
    assert channels.whitening is not None
    white, behaviour = channels.whitening.rows(channels.features), channels.at(None)
    cosines = torch.nn.functional.cosine_similarity
    warm, other, cold = 10, 20, NUM_ITEMS - 1
    expected = (cosines(*(channels.model[1][[warm, other]]), dim=0) + white[warm] @ white[other]) / 2
    torch.testing.assert_close(cosines(rows[warm], rows[other], dim=0), expected, rtol=1e-4, atol=1e-5)
    generated = cosines(behaviour[GENERATED][1][cold], behaviour[MODEL][1][warm], dim=0)
    expected = (generated + white[cold] @ white[warm]) / 2
    torch.testing.assert_close(cosines(rows[cold], rows[warm], dim=0), expected, rtol=1e-4, atol=1e-5)
    bare = Channels(channels.model, channels.interactions, [], channels.config)
    torch.testing.assert_close(bare.likeness(), bare.at(None)[MODEL][1])
