"""A fold-in that is fitted to a model: it nearly gives the lists of users whom it has and has not met in the fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.model.fold_in import FoldIn, History
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, user_item_graph
from crane_core.model.views import Rows
from crane_core.training.fold_in import fit_fold_in
from tests.worlds.planted import communities
from tests.worlds.settings import model_config

DIM = 8


def propagated(log: Interactions) -> Rows:
    """Rows as LightGCN has them for embeddings of the groups with noise."""
    generator = torch.Generator().manual_seed(0)
    model = LightGCN(log.num_users, log.num_items, model_config(embedding_dim=DIM))
    groups = torch.cat([torch.arange(log.num_users) // 60, torch.arange(log.num_items) // 60])
    centres = torch.randn(4, DIM, generator=generator)
    noise = torch.randn(len(groups), DIM, generator=generator)
    with torch.no_grad():
        model.ids.copy_(centres[groups] + 0.5 * noise)
        shards = Shards((log.num_users, log.num_items))
        graph = SymmetricGraph(user_item_graph(Edges(log.train.users(), log.train.items), shards), torch.device("cpu"))
        final = model(graph).final
    return final[: log.num_users], final[log.num_users :]


def own_histories(log: Interactions) -> History:
    return History(log.train.users(), log.train.items, log.decayed(None))


def overlap(rows: np.ndarray, expected: np.ndarray, items: np.ndarray, log: Interactions) -> float:
    """Median share of the top 20 unseen items that two sets of rows have in common."""
    lists = []
    for each in (rows, expected):
        scores = each @ items.T
        scores[log.train.users(), log.train.items] = -np.inf
        lists.append(np.argsort(-scores, axis=1)[:, :20])
    return float(np.median([len(set(a) & set(b)) / 20 for a, b in zip(*lists, strict=True)]))


def test_the_own_history_of_a_known_user_nearly_gives_the_trained_list() -> None:
    log = communities(0).interactions
    users, items = propagated(log)
    folded = fit_fold_in((users, items), log).fold(own_histories(log), log.num_users)
    assert overlap(folded, users.numpy(), items.numpy(), log) >= 0.8
    shuffled = folded[np.random.default_rng(0).permutation(len(folded))]
    assert overlap(shuffled, users.numpy(), items.numpy(), log) < 0.5


def test_users_who_had_no_part_in_the_fit_get_nearly_their_list() -> None:
    log = communities(0).interactions
    users, items = propagated(log)
    fitted = log.train.where(log.train.users() % 3 > 0)
    folded = fit_fold_in((users, items), replace(log, train=fitted)).fold(own_histories(log), log.num_users)
    left_out = np.arange(log.num_users) % 3 == 0
    part = replace(log, train=ItemLists.from_pairs(*others(log, left_out), int(left_out.sum())))
    assert overlap(folded[left_out], users.numpy()[left_out], items.numpy(), part) >= 0.75


def others(log: Interactions, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training pairs of some users, who are numbered anew."""
    users = log.train.users()
    return (np.cumsum(kept) - 1)[users[kept[users]]], log.train.items[kept[users]]


def test_rows_that_are_sums_over_the_history_are_found() -> None:
    """The map and the corrections together can tell any linear form of the histories."""
    log = communities(0).interactions
    generator = np.random.default_rng(0)
    items = generator.normal(size=(log.num_items, DIM)).astype(np.float32)
    truth = FoldIn(items, generator.normal(size=DIM).astype(np.float32), fit_fold_in(propagated(log), log).blocks)
    blocks = tuple(replace(block, width=DIM) for block in truth.blocks)
    users = replace(truth, blocks=blocks).fold(own_histories(log), log.num_users)
    found = fit_fold_in((torch.from_numpy(users), torch.from_numpy(items)), log)
    folded = found.fold(own_histories(log), log.num_users)
    assert np.square(folded - users).sum() < 0.3 * np.square(users - users.mean(0)).sum()


def test_weights_count_as_in_the_graph() -> None:
    """A user who met the same items with other weights gets another row, and a common factor changes little."""
    log = communities(0).interactions
    weights = np.random.default_rng(0).uniform(1, 5, len(log.train.items)).astype(np.float32)
    log = replace(log, weights=weights)
    rows = propagated(log)
    fold_in = fit_fold_in(rows, log)
    one = fold_in.fold(History(np.zeros(2, int), np.array([0, 70]), np.array([1.0, 5.0])), 1)
    other = fold_in.fold(History(np.zeros(2, int), np.array([0, 70]), np.array([5.0, 1.0])), 1)
    assert np.abs(one - other).max() > 0.01 * np.abs(one).max()


def test_a_cold_item_has_a_row_to_add() -> None:
    """Its row of the model, by neighbours in the item graph, is propagated like that of an item met once."""
    log = communities(0).interactions
    users, items = propagated(log)
    cold = int(log.cold_items()[0])
    near = int(np.flatnonzero(log.item_counts() > 0)[0])
    items = items.clone()
    items[cold] = items[near]
    rows = fit_fold_in((users, items), log).rows
    cosine = rows[cold] @ rows[near] / np.linalg.norm(rows[cold]) / np.linalg.norm(rows[near])
    assert np.isfinite(rows).all() and cosine > 0.5


@pytest.mark.parametrize("most", [50])
def test_many_users_are_sampled(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = communities(0).interactions
    users, items = propagated(log)
    monkeypatch.setattr("crane_core.training.fold_in._MOST_USERS", most)
    folded = fit_fold_in((users, items), log).fold(own_histories(log), log.num_users)
    assert overlap(folded, users.numpy(), items.numpy(), log) >= 0.7
