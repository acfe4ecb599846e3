"""Rankings of cold items, by hand, against plain loops and against chance."""

import math

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.cold import rank_cold, summarise_cold
from crane_core.evaluation.slices import slices_of_test
from tests.worlds.planted import item_lists


def cold_world(test: ItemLists) -> Interactions:
    """Items 0 and 4 are warm; 1, 2, 3 and 5 are cold."""
    train = item_lists(*[[0, 4]] * test.num_users)
    return Interactions(test.num_users, 6, train, item_lists(*[[]] * test.num_users), test)


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
    interactions = cold_world(item_lists([1], [2], [2], [1, 3], [1, 2, 3, 5]))
    asked = np.array([3, 0, 4, 2, 1])
    for block in (1, 2, 5):
        found = rank_cold(lambda users: scores[users], interactions, asked, block)
        assert found["among_cold_recall@20"].tolist() == [1] * 5, "a list of 20 holds all four"
        assert found["cold_auc"].tolist() == pytest.approx([1 / 2, 1, math.nan, 1 / 3, 2 / 3], nan_ok=True)


def test_cold_auc_equals_plain_loops_and_never_holds_more_than_a_block() -> None:
    generator = np.random.default_rng(3)
    train, test = ([sorted(generator.choice(60, 5, replace=False).tolist()) for _ in range(20)] for _ in range(2))
    interactions = Interactions(20, 60, item_lists(*train), item_lists(*[[]] * 20), item_lists(*test))
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
    """Items 0 to 49 are cold, 50 to 59 warm; each of 300 users has one to four cold test items and a warm one."""
    generator = np.random.default_rng(seed)
    wanted = [generator.choice(50, 1 + user % 4, replace=False).tolist() for user in range(300)]
    train = item_lists(*[[50 + user % 10] for user in range(300)])
    test = item_lists(*[[*own, 50 + (user + 1) % 10] for user, own in enumerate(wanted)])
    return Interactions(300, 60, train, item_lists(*[[]] * 300), test), wanted


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
    test = item_lists(*[[int(generator.choice([1, 2, 3, 5]))] for _ in range(2000)])
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
    interactions = cold_world(item_lists([1], [], [0, 2, 3], [1, 2, 3, 5]))
    values = {"recall@20": np.array([1.0, 0.5, 0.0]), "cold_auc": np.array([0.25, 0.75, np.nan])}
    found = summarise_cold(interactions, {"m": values}, 100, seed=0)
    assert found is not None
    assert (found["items"], found["rows"], found["users"]) == (4, 7, 3)
    assert found["models"]["m"]["mean"] == 0.5 and found["chance"] == 1.0
    assert found["among_cold"] == {"chance": 1.0, "models": {}}
    assert found["cold_auc"]["users"] == 2 and found["cold_auc"]["models"]["m"]["mean"] == 0.5
    nothing = {"m": values | {"cold_auc": np.full(3, np.nan)}}
    assert (summarise_cold(interactions, nothing, 100, seed=0) or {})["cold_auc"] is None
    assert summarise_cold(cold_world(item_lists([0], [4])), {"m": values}, 100, seed=0) is None
