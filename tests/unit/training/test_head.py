"""The head: it finds planted weights, and popularity stands alone where nothing personal is worth more than chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.model.views import Rows
from crane_core.training.head import (
    Head,
    choose_head,
    fit_head,
    log_popularity,
    of_unit_spread,
    score_spread,
)
from tests.worlds.settings import model_config

NUM_USERS, NUM_ITEMS, DIM = 1500, 1300, 6


def planted(popularity: float, personal: float, seed: int = 0) -> tuple[Interactions, Rows]:
    """Make users who take items by recent popularity and by their rows, with the given weights.

    Training interactions are older than 50 days or younger than 3, and only the young ones tell what is popular.
    """
    generator = np.random.default_rng(seed)
    rows = of_unit_spread(
        (
            torch.from_numpy(generator.standard_normal((NUM_USERS, DIM))).float(),
            torch.from_numpy(generator.standard_normal((NUM_ITEMS, DIM))).float(),
        )
    )
    sizes, ages, appeal = [8, 12], [], [generator.zipf(1.6, NUM_ITEMS).clip(max=400) for _ in range(2)]
    parts = []
    for _ in range(NUM_USERS):
        met = np.full(NUM_ITEMS, np.inf)
        for of_period, size, (youngest, oldest) in zip(appeal, sizes, ((50, 90), (0, 3)), strict=True):
            free = np.flatnonzero(np.isinf(met))
            chosen = generator.choice(free, size, replace=False, p=of_period[free] / of_period[free].sum())
            met[chosen] = generator.uniform(youngest, oldest, size)
        items = np.flatnonzero(np.isfinite(met))
        parts.append(items)
        ages.append(met[items])
    train = ItemLists.from_pairs(np.repeat(np.arange(NUM_USERS), sum(sizes)), np.concatenate(parts), NUM_USERS)
    nothing = ItemLists(np.zeros(NUM_USERS + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    log = Interactions(NUM_USERS, NUM_ITEMS, train, nothing, nothing, ages=np.concatenate(ages).astype(np.float32))
    logits = popularity * log_popularity(log, 2.0) + personal * rows[0] @ rows[1].T
    gumbel = torch.from_numpy(generator.gumbel(size=logits.shape))
    drawn = logits + gumbel
    drawn[torch.from_numpy(train.users().astype(np.int64)), torch.from_numpy(train.items.astype(np.int64))] = -torch.inf
    taken = drawn.topk(2, dim=1).indices.numpy()
    validation = ItemLists.from_pairs(np.repeat(np.arange(NUM_USERS), 2), taken.ravel(), NUM_USERS)
    return replace(log, validation=validation, test=validation), rows


@pytest.mark.parametrize(("popularity", "personal"), [(1.0, 1.5), (0.6, 0.7), (1.2, 0.0)])
def test_the_fit_finds_the_planted_weights(popularity: float, personal: float) -> None:
    log, rows = planted(popularity, personal)
    head = fit_head({"model": rows}, log_popularity(log, 2.0), log, np.arange(NUM_USERS))
    assert head.popularity == pytest.approx(popularity, abs=0.08)
    assert head.channels["model"] == pytest.approx(personal, abs=0.1)


def test_a_channel_that_repels_is_left_out() -> None:
    log, rows = planted(1.0, 1.0)
    against = rows[0], -rows[1]
    head = fit_head({"model": rows, "against": against}, log_popularity(log, 2.0), log, np.arange(NUM_USERS))
    assert head.channels["against"] == 0 < head.channels["model"]
    alone = fit_head({"against": against}, log_popularity(log, 2.0), log, np.arange(NUM_USERS))
    assert alone.channels == {"against": 0.0}


def test_scores_are_the_weighted_sums_of_the_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    channels = {name: (torch.randn(5, 3, generator=generator), torch.randn(7, 3, generator=generator)) for name in "ab"}
    popularity = torch.randn(7, generator=generator)
    users, items = Head(0.5, {"a": 2.0, "b": 0.25}).rows(channels, popularity, 5)
    expected = 0.5 * popularity + sum(w * channels[n][0] @ channels[n][1].T for n, w in (("a", 2.0), ("b", 0.25)))
    torch.testing.assert_close(users @ items.T, expected)
    users, items = Head(1.0, {"a": 0.0, "b": 0.0}).rows(channels, popularity, 5)
    torch.testing.assert_close(users @ items.T, popularity.expand(5, 7))


def test_validation_chooses_the_half_life_and_keeps_what_is_personal() -> None:
    log, rows = planted(1.0, 1.5)
    chosen = choose_head(rows, log, model_config())
    assert chosen is not None and chosen.half_life is not None and chosen.half_life < 50
    assert chosen.recall["model+recent"] > 1.2 * max(chosen.recall[""], chosen.recall["recent"])
    assert chosen.head.channels["model"] > 0.5
    assert chosen.rows[0].shape[0] == NUM_USERS and chosen.rows[1].shape[0] == NUM_ITEMS


def test_rows_of_noise_leave_popularity_alone_or_a_score_as_good() -> None:
    log, rows = planted(1.0, 0.0, seed=1)
    noise = of_unit_spread((torch.flip(rows[0], [0]), rows[1]))
    chosen = choose_head(noise, log, model_config())
    assert chosen is not None
    assert max(chosen.head.channels.values(), default=0.0) < 0.1


def test_without_times_or_half_lives_the_model_stands_alone() -> None:
    log, rows = planted(1.0, 1.0)
    assert choose_head(rows, replace(log, ages=None), model_config()) is None
    assert choose_head(rows, log, model_config(history_half_lives=())) is None


def test_equal_scores_of_all_items_become_a_channel_of_zeros() -> None:
    users, items = of_unit_spread((torch.ones(3, 2), torch.ones(4, 2)))
    assert not users.any() and not items.any()
    rows = of_unit_spread((torch.randn(30, 2), torch.randn(40, 2)))
    assert score_spread(*rows) == pytest.approx(1.0)
    assert float((rows[0] @ rows[1].T).std(correction=0)) == pytest.approx(1.0, rel=1e-4)
