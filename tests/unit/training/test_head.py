"""The head: planted tastes are found, and noise is left out; scores are the weighted sums of the channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.model.fold_in import History
from crane_core.model.views import Rows
from crane_core.model_config import Choices, HeadWeights
from crane_core.training.channels import of_unit_spread
from crane_core.training.head import choose_head, head_rows, log_popularity
from tests.worlds.settings import model_config

NUM_USERS, NUM_ITEMS, DIM = 1000, 1300, 6


def planted(popularity: float, personal: float, seed: int = 0) -> tuple[Interactions, Rows]:
    """Make users who take items by recent popularity and by their rows, with the given weights.

    Training interactions are older than 50 days or younger than 3, and only the young ones tell what is popular.
    """
    generator = np.random.default_rng(seed)
    rows = of_unit_spread(
        (
            torch.from_numpy(generator.standard_normal((NUM_USERS, DIM))).float(),
            torch.from_numpy(generator.standard_normal((NUM_ITEMS, DIM))).float(),
        ),
        np.ones(NUM_ITEMS, dtype=bool),
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


def content_world(seed: int = 0, noise: float = 0.0) -> tuple[Interactions, Rows, list[tuple[np.ndarray, np.ndarray]]]:
    """Make users who take items by content, a tenth of which is cold, and a model that knows the popular items only.

    The model's rows are right for items with many training interactions, and noise for those with few. With `noise`
    the features say nothing.
    """
    generator = np.random.default_rng(seed)
    num_users, num_items, dim = 700, 400, 8
    users, items = (generator.standard_normal((size, dim)) for size in (num_users, num_items))
    appeal = -1.2 * np.log1p(generator.permutation(num_items))
    cold = np.arange(num_items) % 10 == 0
    scores = users @ items.T * 0.7 + appeal + generator.gumbel(size=(num_users, num_items))
    order = np.argsort(-np.where(cold, -np.inf, scores), axis=1)[:, :8]
    late = scores.copy()
    np.put_along_axis(late, order, -np.inf, axis=1)
    held_out = np.argsort(-late, axis=1)[:, :4]
    by = np.repeat(np.arange(num_users), 2)
    train = ItemLists.from_pairs(np.repeat(np.arange(num_users), 8), order.ravel().astype(np.int32), num_users)
    validation, test = (
        ItemLists.from_pairs(by, held_out[:, part::2].ravel().astype(np.int32), num_users) for part in (0, 1)
    )
    log = Interactions(num_users, num_items, train, validation, test)
    doubt = 3 / np.sqrt(1 + log.item_counts())[:, None]
    rows = items + doubt * generator.standard_normal(items.shape)
    features = generator.standard_normal(items.shape) if noise else items
    model = torch.from_numpy(users).float(), torch.from_numpy(rows + 0.0).float()
    return log, model, [(features.astype(np.float32), np.ones(num_items, dtype=bool))]


def recall(rows: Rows, log: Interactions, only: np.ndarray | None = None) -> float:
    wanted = log.test if only is None else log.test.where(only[log.test.items])
    users = np.flatnonzero(wanted.counts() > 0)
    ranked = rank_users(dot_product(*rows), log.train, users, 20)
    return float(user_metrics(ranked, wanted, users, (20,))["recall@20"].mean())


def test_scores_are_the_weighted_sums_of_the_channels_by_evidence() -> None:
    log, _, _ = content_world()
    generator = torch.Generator().manual_seed(0)
    size = log.num_users, log.num_items
    channels = {
        name: tuple(torch.randn(n, 3, generator=generator) for n in size) for name in ("model", "recent", "profile")
    }
    channels["generated"] = channels["model"][0], torch.randn(size[1], 3, generator=generator)
    popularity = torch.randn(size[1], generator=generator)
    num_cold = len(log.cold_items())
    weights = HeadWeights(
        edges=(0, 1, 8),
        popularity=0.5,
        channels={"model": (0, 2, 3), "recent": (0, 0, 0), "profile": (1, 0.5, 0), "generated": (2, 1, 0)},
        bias=(-1, 0.25, 0.5),
        num_cold=2 * num_cold,
    )
    users, items = head_rows(weights, channels, popularity, log)
    buckets = torch.from_numpy(np.digitize(log.item_counts(), (1, 8)))
    expected = 0.5 * popularity + torch.tensor([-1 + np.log(2), 0.25, 0.5])[buckets].float()
    for name, values in weights.channels.items():
        expected = expected + torch.tensor(values)[buckets] * (channels[name][0] @ channels[name][1].T)
    torch.testing.assert_close(users @ items.T, expected, rtol=1e-4, atol=1e-4)
    assert users.shape[1] == 3 + 3 + 1  # Generated rows lie in the model's space; a channel without weight is left out.


def test_content_is_trusted_where_there_is_little_evidence() -> None:
    log, model, features = content_world()
    chosen = choose_head(model, log, model_config(), features)
    assert chosen is not None and chosen.form == "model+profile+generated by evidence"
    content = np.array(chosen.weights.channels["profile"]) + np.array(chosen.weights.channels["generated"])
    assert content[0] > 0 and content[1] > content[-1]
    without = choose_head(model, log, model_config())
    assert without is not None
    cold = log.item_counts() == 0
    assert recall(chosen.rows, log) > recall(without.rows, log) + 0.02
    assert recall(chosen.rows, log, cold) > recall(without.rows, log, cold) + 0.05
    assert recall(chosen.rows, log) > recall(model, log) + 0.02


def test_features_of_noise_cost_nothing() -> None:
    log, model, features = content_world(noise=1.0)
    chosen, without = (choose_head(model, log, model_config(), each) for each in (features, ()))
    assert chosen is not None and without is not None
    assert "profile" not in chosen.form
    assert recall(chosen.rows, log) >= recall(without.rows, log) - 0.01


def test_given_weights_are_taken_as_they_are() -> None:
    log, model, features = content_world()
    config = model_config()
    chosen = choose_head(model, log, config, features)
    assert chosen is not None
    choices = Choices(behaviour_epochs=1, crane_epochs=1, crane_ranking="dot", share=0.5, head=chosen.weights)
    nothing = ItemLists(np.zeros(log.num_users + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    unseen = replace(log, validation=nothing, test=nothing)
    given = choose_head(model, unseen, config.model_copy(update={"choices": choices}), features)
    assert given is not None
    for mine, theirs in zip(given.rows, chosen.rows, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_known_users_fold_to_about_their_own_lists() -> None:
    log, model, features = content_world()
    chosen = choose_head(model, log, model_config(), features)
    assert chosen is not None
    folded = chosen.fold_in.fold(History(log.train.users(), log.train.items, log.decayed(None)), log.num_users)
    assert folded.shape == chosen.rows[0].shape
    everyone = np.arange(log.num_users)
    lists = [
        rank_users(dot_product(rows, chosen.rows[1]), log.train, everyone, 20)
        for rows in (torch.from_numpy(folded), chosen.rows[0])
    ]
    overlap = [len(set(a) & set(b)) / 20 for a, b in zip(*lists, strict=True)]
    assert np.median(overlap) > 0.5


@pytest.mark.parametrize(("popularity", "personal"), [(1.0, 1.5), (0.6, 0.7)])
def test_the_moment_and_the_personal_are_weighed_as_they_were_planted(popularity: float, personal: float) -> None:
    log, rows = planted(popularity, personal)
    chosen = choose_head(rows, log, model_config(half_lives=(2.0,)))
    assert chosen is not None and chosen.half_life == 2.0 and "model" in chosen.form
    assert chosen.weights.popularity == pytest.approx(popularity, abs=0.12)
    assert np.mean(chosen.weights.channels["model"][1:]) == pytest.approx(personal, abs=0.2)


def test_validation_chooses_the_half_life_and_keeps_what_is_personal() -> None:
    log, rows = planted(1.0, 1.5)
    chosen = choose_head(rows, log, model_config())
    assert chosen is not None and chosen.half_life is not None and chosen.half_life < 50
    assert chosen.recall["model+recent"] > 1.2 * max(chosen.recall["popularity"], chosen.recall["recent"])


def test_rows_of_noise_leave_popularity_alone_or_a_score_as_good() -> None:
    log, rows = planted(1.0, 0.0, seed=1)
    chosen = choose_head((torch.flip(rows[0], [0]), rows[1]), log, model_config())
    assert chosen is not None
    assert max(chosen.weights.channels["model"]) < 0.1


def test_without_validation_interactions_the_model_stands_alone() -> None:
    log, rows = planted(1.0, 1.0)
    nothing = ItemLists(np.zeros(NUM_USERS + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    assert choose_head(rows, replace(log, validation=nothing), model_config()) is None


def test_without_half_lives_the_score_knows_no_times() -> None:
    log, rows = planted(1.0, 1.0)
    heads = [choose_head(rows, replace(log, ages=None), model_config())]
    heads.append(choose_head(rows, log, model_config(history_half_lives=())))
    for head in heads:
        assert head is not None and head.half_life is None and head.form.startswith("model")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda log, rows: (few(log, 12), rows), id="twelve validation interactions"),
        pytest.param(lambda log, rows: (few(log, 1), rows), id="one validation interaction"),
        pytest.param(lambda log, rows: (log, (torch.zeros(700, 2), rows[1][:, :2])), id="a model that says nothing"),
        pytest.param(lambda log, rows: (log, (rows[0], torch.ones_like(rows[1]))), id="a constant model"),
    ],
)
@pytest.mark.parametrize("with_content", [True, False])
def test_edges_have_defined_results(spoil, with_content: bool) -> None:
    log, model, features = content_world()
    log, model = spoil(log, model)
    head = choose_head(model, log, model_config(), features if with_content else [])
    assert head is not None
    assert all(bool(torch.isfinite(side).all()) for side in head.rows)


def few(log: Interactions, count: int) -> Interactions:
    return replace(log, validation=log.validation.where(np.arange(len(log.validation.items)) < count))
