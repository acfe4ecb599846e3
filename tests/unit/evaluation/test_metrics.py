"""Ranking, metrics and intervals, by hand and against plain loops."""

import math

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.cold import rank_cold, summarise_cold
from crane_core.evaluation.metrics import coverage, popularity_bias, user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users, without
from crane_core.evaluation.slices import interest_entropy, slices_of_test
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap


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


def test_the_best_list_is_no_longer_than_the_cut_off() -> None:
    relevant = ItemLists.from_pairs(np.zeros(4, dtype=np.int64), np.array([1, 2, 3, 4], dtype=np.int32), 1)
    metrics = user_metrics(np.array([[1, 9, 2, 3, 4]], dtype=np.int32), relevant, np.array([0]), (2, 5))
    assert metrics["recall@2"].tolist() == [1 / 4] and metrics["recall@5"].tolist() == [1.0]
    discounts = 1 / np.log2(np.arange(2, 7))
    assert metrics["ndcg@2"][0] == pytest.approx(discounts[0] / discounts[:2].sum())
    assert metrics["ndcg@5"][0] == pytest.approx(discounts[[0, 2, 3, 4]].sum() / discounts[:4].sum())


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
    parts = slices_of_test(interactions)
    by_item = [parts[name].items.tolist() for name in ("cold_items", "head_items", "tail_items")]
    assert by_item == [[3, 4], [0], [2, 1]]
    assert parts["cold_users"].counts().tolist() == [0, 0, 0, 1]
    assert parts["active_users"].counts().tolist() == [1, 0, 0, 0]
    assert parts["quiet_users"].counts().tolist() == [0, 0, 1, 0]


def cold_world(test: ItemLists) -> Interactions:
    """Items 0 and 4 are warm; 1, 2, 3 and 5 are cold."""
    train = lists(*[[0, 4]] * test.num_users)
    return Interactions(test.num_users, 6, train, lists(*[[]] * test.num_users), test)


def test_cold_auc_by_hand() -> None:
    scores = torch.tensor(
        [
            [9, 5, 3, 1, 9, 2],  # item 1 above 2, 3 and 5
            [9, 5, 3, 1, 9, 2],  # item 2 above 3 and 5, below 1
            [9, 0, 0, 0, 9, 1],  # item 2 ties with 1 and 3, below 5
            [9, 5, 3, 1, 9, 2],  # items 1 and 3 against 2 and 5: above both, above none
            [-9, 1, 2, 3, -9, 4],  # every cold item: nothing to compare with
        ],
        dtype=torch.float32,
    )
    interactions = cold_world(lists([1], [2], [2], [1, 3], [1, 2, 3, 5]))
    asked = np.array([3, 0, 4, 2, 1])
    for block in (1, 2, 5):
        found = rank_cold(lambda users: scores[users], interactions, asked, block)
        assert found["among_cold_recall@20"].tolist() == [1] * 5, "a list of 20 holds all four"
        assert found["cold_auc"].tolist() == pytest.approx([1 / 2, 1, math.nan, 1 / 3, 2 / 3], nan_ok=True)


def test_cold_auc_equals_plain_loops_and_never_holds_more_than_a_block() -> None:
    generator = np.random.default_rng(3)
    train, test = ([sorted(generator.choice(60, 5, replace=False).tolist()) for _ in range(20)] for _ in range(2))
    interactions = Interactions(20, 60, lists(*train), lists(*[[]] * 20), lists(*test))
    cold = np.flatnonzero(interactions.item_counts() == 0).tolist()
    scores = torch.from_numpy(generator.integers(4, size=(20, 60)).astype(np.float32))
    users = np.flatnonzero(slices_of_test(interactions)["cold_items"].counts() > 0)
    asked: list[int] = []

    def score(picked: np.ndarray) -> torch.Tensor:
        asked.append(len(picked))
        return scores[picked]

    found = rank_cold(score, interactions, users, block=7)["cold_auc"]
    assert max(asked) == 7 and sum(asked) == len(users) > 10
    for user, value in zip(users, found, strict=True):
        row = scores[user].tolist()
        pairs = [(i, j) for i in test[user] if i in cold for j in cold if j not in test[user]]
        expected = [(row[i] > row[j]) + (row[i] == row[j]) / 2 for i, j in pairs]
        assert value == pytest.approx(np.mean(expected))


def many_cold(seed: int) -> tuple[Interactions, list[list[int]]]:
    """Items 0 to 49 are cold, 50 to 59 warm; 300 users were held out one to four cold items and a warm one."""
    generator = np.random.default_rng(seed)
    wanted = [generator.choice(50, 1 + user % 4, replace=False).tolist() for user in range(300)]
    train = lists(*[[50 + user % 10] for user in range(300)])
    test = lists(*[[*own, 50 + (user + 1) % 10] for user, own in enumerate(wanted)])
    return Interactions(300, 60, train, lists(*[[]] * 300), test), wanted


def test_recall_among_the_cold_items_equals_a_plain_ranking_of_them() -> None:
    interactions, wanted = many_cold(5)
    scores = torch.from_numpy(np.random.default_rng(6).normal(size=(300, 60)).astype(np.float32))
    scores[:, 50:] += 10
    found = rank_cold(lambda users: scores[users].clone(), interactions, np.arange(300), 70)["among_cold_recall@20"]
    for user, own in enumerate(wanted):
        top = sorted(range(50), key=lambda item: -float(scores[user, item]))[:20]
        assert found[user] == pytest.approx(len(set(top) & set(own)) / len(own))


def test_recall_among_the_cold_items_shares_the_places_of_a_tie() -> None:
    interactions, wanted = many_cold(7)
    users = np.arange(300)
    # Item 0 stands first, the items 1 to 9 after it, all others tie for the ten places left.
    scores = torch.zeros(300, 60)
    scores[:, :10] = torch.tensor([2.0, *[1.0] * 9])
    found = rank_cold(lambda users: scores[users].clone(), interactions, users)["among_cold_recall@20"]
    assert found.tolist() == pytest.approx([np.mean([1 if item < 10 else 10 / 40 for item in own]) for own in wanted])
    per_user = {
        name: {"recall@20": np.ones(300), **rank_cold(lambda u, t=table: t[u].clone(), interactions, users)}
        for name, table in (
            ("nothing", torch.zeros(300, 60)),
            ("noise", torch.rand(300, 60, generator=torch.Generator().manual_seed(0))),
        )
    }
    per_user["earlier"] = {name: per_user["noise"][name] for name in ("recall@20", "cold_auc")}
    summary = summarise_cold(interactions, per_user, 300, seed=0)
    assert summary is not None
    among = summary["among_cold"]
    assert among["chance"] == 20 / 50 and set(among["models"]) == {"nothing", "noise"}
    assert among["models"]["nothing"]["mean"] == pytest.approx(0.4)
    assert among["models"]["noise"]["low"] < 0.4 < among["models"]["noise"]["high"]


def test_a_ranking_by_chance_has_auc_one_half_and_one_that_knows_has_more() -> None:
    generator = np.random.default_rng(4)
    test = lists(*[[int(generator.choice([1, 2, 3, 5]))] for _ in range(2000)])
    noise = torch.from_numpy(generator.normal(size=(2000, 6)).astype(np.float32))
    knowing = noise.clone()
    knowing[torch.arange(2000), torch.from_numpy(test.items).long()] += 1
    interactions, users = cold_world(test), np.arange(2000)
    per_user = {
        name: {"recall@20": np.ones(2000), **rank_cold(lambda u, t=table: t[u], interactions, users)}
        for name, table in (("noise", noise), ("knowing", knowing), ("constant", torch.zeros(2000, 6)))
    }
    found = summarise_cold(interactions, per_user, 300, seed=0)
    assert found is not None and found["cold_auc"]["users"] == 2000
    auc = found["cold_auc"]["models"]
    assert auc["noise"]["low"] < 0.5 < auc["noise"]["high"] < 0.55
    # P(N(0, 1) + 1 > N(0, 1)) = Phi(1 / sqrt 2).
    assert auc["knowing"]["low"] < 0.7602 < auc["knowing"]["high"]
    assert auc["constant"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_the_summary_of_cold_items_counts_and_says_what_it_cannot() -> None:
    interactions = cold_world(lists([1], [], [0, 2, 3], [1, 2, 3, 5]))
    values = {"recall@20": np.array([1.0, 0.5, 0.0]), "cold_auc": np.array([0.25, 0.75, np.nan])}
    found = summarise_cold(interactions, {"m": values}, 100, seed=0)
    assert found is not None
    assert (found["items"], found["rows"], found["users"]) == (4, 7, 3)
    assert found["models"]["m"]["mean"] == 0.5 and found["chance"] == 1.0
    assert found["among_cold"] == {"chance": 1.0, "models": {}}
    assert found["cold_auc"]["users"] == 2 and found["cold_auc"]["models"]["m"]["mean"] == 0.5
    nothing = {"m": values | {"cold_auc": np.full(3, np.nan)}}
    assert (summarise_cold(interactions, nothing, 100, seed=0) or {})["cold_auc"] is None
    assert summarise_cold(cold_world(lists([0], [4])), {"m": values}, 100, seed=0) is None


def test_entropy_by_hand() -> None:
    # Ten rows make two clusters.
    rows = np.repeat([[0, 1], [5, 0]], 5, axis=0) + 0.01 * np.arange(10)[:, None]
    train = lists([0, 1, 2], [0, 5], [1, 6, 7, 8], [])
    thirds = -(np.log(1 / 4) / 4 + 3 * np.log(3 / 4) / 4)
    for seed in range(5):
        found = interest_entropy(rows, train, seed)
        assert found.tolist() == pytest.approx([0, math.log(2), thirds, math.nan], nan_ok=True)


def test_slices_by_entropy() -> None:
    train = lists([0], [0], [0], [0], [], [0])
    interactions = Interactions(6, 2, train, lists(*[[]] * 6), lists([1], [1], [1], [1], [1], []))
    # Of the users who are asked about, 0 to 3, one is a quarter; user 5 has no test item, user 4 no interests.
    parts = slices_of_test(interactions, np.array([0.4, 0.1, 0.9, 0.5, np.nan, 2.0]))
    assert np.flatnonzero(parts["diverse_users"].counts()).tolist() == [2]
    assert np.flatnonzero(parts["focused_users"].counts()).tolist() == [1]
    assert not {"diverse_users", "focused_users"} & set(slices_of_test(interactions))


def test_tombstones_are_no_candidates_and_no_cold_items() -> None:
    """Item 2 is gone, items 3 and 4 are cold."""
    train, test = (
        ItemLists.from_pairs(np.array(users), np.array(items), 2)
        for users, items in (([0, 1], [0, 1]), ([0, 1], [3, 0]))
    )
    nothing = ItemLists(np.zeros(3, dtype=np.int64), np.empty(0, dtype=np.int32))
    interactions = Interactions(2, 5, train, nothing, test, np.array([2]))
    scores = torch.tensor([[0.0, 1, 9, 2, 3], [1, 0, 9, 2, 3]])
    score = without(lambda users: scores[torch.from_numpy(users)].clone(), interactions.gone)
    ranked = rank_users(score, train, np.array([0, 1]), 5)
    assert ranked.tolist() == [[4, 3, 1, -1, -1], [4, 3, 0, -1, -1]]
    assert interactions.cold_items().tolist() == [3, 4]
    assert rank_cold(score, interactions, np.array([0]))["cold_auc"].tolist() == [0.0]
