"""Batches: what they hold, and how much each user weighs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import DataError
from crane_core.training.batches import Purpose, generator_for, in_order, user_weights
from crane_core.training.trainer import Trainer
from tests.worlds.planted import checkerboard
from tests.worlds.settings import changed
from tests.worlds.trainings import SMALL, Kind, both_kinds, lists, trainer, with_everything


@both_kinds
def test_every_step_draws_negatives_of_its_own(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        Trainer, "step", lambda self, graph, batches, _: drawn.extend(each.negatives.tolist() for each in batches)
    )
    ours = trainer(tmp_path, config=changed(SMALL, num_epochs=3, batch_size=60), kind=kind)
    ours.run()
    assert len(drawn) == 12
    assert len(set(map(tuple, drawn))) == 12


@pytest.mark.parametrize(
    ("balance", "expected"), [(0.0, [1.0, 1.0, 0.0]), (0.5, [5 / 6, 5 / 3, 0.0]), (1.0, [0.625, 2.5, 0.0])]
)
def test_weights_of_users_by_hand(balance: float, expected: list[float]) -> None:
    # Four interactions and one: at 0.5 these weigh 1/2 and 1 before they are scaled to 1 on average, by 5/3.
    train = ItemLists.from_pairs(np.array([0, 0, 0, 0, 1]), np.array([0, 1, 2, 3, 0], dtype=np.int32), 3)
    found = user_weights(train.counts(), balance)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected)
    assert found[train.users()].mean() == pytest.approx(1.0)


def test_without_interactions_no_user_has_a_weight() -> None:
    assert user_weights(np.zeros(2, dtype=np.int64), 0.5).tolist() == [0.0, 0.0]


def test_a_batch_shares_its_negatives_and_weighs_its_users(tmp_path: Path) -> None:
    train, nothing = lists(3), ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 30)
    interactions = Interactions(30, 50, train, nothing, nothing)
    ours = trainer(tmp_path, interactions)
    ours.model.shares_negatives = True
    picked = np.array([5, 0, 17, 5])
    batch = ours.batches.batch(picked, np.random.default_rng(1))
    assert batch.met is not None and batch.weights is not None
    assert batch.users.tolist() == train.users()[picked].tolist()
    assert batch.positives.tolist() == train.items[picked].tolist()
    assert batch.distinct is not None and batch.rows is not None
    assert batch.distinct.tolist() == sorted(set(batch.users.tolist()))
    assert batch.distinct[batch.rows].tolist() == batch.users.tolist()
    met = [
        [item in train.items[train.indptr[u] : train.indptr[u + 1]] for item in batch.negatives] for u in batch.distinct
    ]
    assert batch.met.tolist() == met
    assert batch.weights.tolist() == user_weights(train.counts(), 0.5)[train.users()[picked]].tolist()


@both_kinds
def test_without_a_user_to_learn_from_there_is_no_training(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(DataError, match="40 have met all 32 items"):
        trainer(tmp_path, with_everything(40), kind=kind)
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 40)
    with pytest.raises(DataError, match="nothing to learn from"):
        trainer(tmp_path, Interactions(40, 32, nothing, checkerboard().validation, nothing), kind=kind)


def test_a_batch_for_both_kinds_knows_what_its_users_have_met(tmp_path: Path) -> None:
    config = changed(SMALL, contrast_negatives="both_kinds", num_epochs=2)
    ours = trainer(tmp_path, config=config, kind="crane")
    batch = ours.batches.batch(np.array([100, 3, 60, 61, 3]), np.random.default_rng(0))
    users, items = (sorted(set(column.tolist())) for column in (batch.users, batch.positives))
    pairs = set(zip(ours.batches.edges.users.tolist(), ours.batches.edges.items.tolist(), strict=True))
    assert batch.known is not None
    assert batch.known.tolist() == [[(user, item) in pairs for item in items] for user in users]
    assert ours.run()["num_epochs"] == 2
    assert trainer(tmp_path / "other", kind="crane").batches.batch(np.arange(9), np.random.default_rng(0)).known is None


def test_rows_of_a_user_share_a_batch(tmp_path: Path) -> None:
    config = changed(SMALL, batch_size=40, batches_per_step=4, num_negatives=8)
    ours = trainer(tmp_path, config=config, kind="crane").batches
    picked = ours.order(0)[:160]
    batches = list(ours.of_step(picked, 0, 0))
    pairs = sorted(zip(ours.edges.users[picked].tolist(), ours.edges.items[picked].tolist(), strict=True))
    found = [pair for each in batches for pair in zip(each.users.tolist(), each.positives.tolist(), strict=True)]
    assert sorted(found) == pairs and [len(each.users) for each in batches] == [40] * 4
    users = [set(each.users.tolist()) for each in batches]
    # A user's rows are consecutive, so that at most one user of a batch goes on in the next.
    assert sum(map(len, users)) <= len(set.union(*users)) + 3
    # Each batch has a generator of its own, by its number in the epoch.
    later = list(ours.of_step(picked, 0, 2))
    for number, each in ((1, batches[1]), (2 * 4 + 3, later[3])):
        place = generator_for(config.train.seed, Purpose.NEGATIVES, 0, number)
        expected = ours.sampler.shared(np.unique(each.users), config.crane.num_negatives, place)[0]
        assert each.negatives.tolist() == expected.tolist()
    other = {tuple(sorted(each.users.tolist())) for each in ours.of_step(picked, 1, 0)}
    assert other.isdisjoint(tuple(sorted(each.users.tolist())) for each in batches)


def test_of_a_large_batch_a_sample_is_contrasted(tmp_path: Path) -> None:
    small, large = (
        trainer(tmp_path / str(nodes), config=changed(SMALL, contrast_nodes=nodes), kind="crane").batches
        for nodes in (None, 5)
    )
    everything, sampled = (each.batch(np.arange(100), np.random.default_rng(3)) for each in (small, large))
    assert everything.contrasted is None and sampled.contrasted is not None
    assert sampled.negatives.tolist() == everything.negatives.tolist()
    for sample, nodes in zip(sampled.contrasted, (sampled.users, sampled.positives), strict=True):
        distinct = set(nodes.tolist())
        assert sample.num_distinct == len(distinct) > 5
        assert sample.nodes.tolist() == sorted(set(sample.nodes.tolist()) & distinct)
        assert len(sample.nodes) == 5
    elsewhere = sampled.to(torch.device("meta"))
    tensors = [each for each in elsewhere if isinstance(each, torch.Tensor)]
    assert elsewhere.contrasted is not None and len(tensors) == 7
    assert {each.device.type for each in (*tensors, *(sample.nodes for sample in elsewhere.contrasted))} == {"meta"}
    few = large.batch(np.arange(2), np.random.default_rng(3))
    assert few.contrasted is not None
    assert few.contrasted[1].nodes.tolist() == sorted(set(few.positives.tolist()))


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("number", [0, 1, 5, 40])
def test_results_computed_ahead_come_in_order(num_threads: int, number: int) -> None:
    def compute(value: int) -> int:
        time.sleep(0.002 * (value % 3))
        return value * value

    assert list(in_order(compute, range(number), num_threads)) == [value * value for value in range(number)]


def test_a_failure_ahead_is_raised_where_it_would_have_been() -> None:
    def compute(value: int) -> float:
        return 1 / (value - 2)

    results = in_order(compute, range(9), 2)
    assert [next(results), next(results)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
