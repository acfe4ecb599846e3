"""The user-item graph: normalisation by hand, sampling, and the rows of each rank."""

import numpy as np
import pytest

from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, sampled_user_item_graph, user_item_graph


def test_user_item_graph_by_hand() -> None:
    graph = user_item_graph(Edges(np.array([0, 0, 1]), np.array([0, 1, 1])), Shards((2, 3))).toarray()
    expected = np.zeros((5, 5))
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(2 * 1)
    expected[0, 3] = expected[3, 0] = 1 / np.sqrt(2 * 2)
    expected[1, 3] = expected[3, 1] = 1 / np.sqrt(1 * 2)
    np.testing.assert_allclose(graph, expected, rtol=1e-6)


def popular_edges() -> tuple[np.ndarray, np.ndarray]:
    """40 users and 30 items, the first of which nearly everybody has met."""
    met = np.random.default_rng(0).random((40, 30)) < np.linspace(0.9, 0.02, 30)
    return np.nonzero(met)


@pytest.mark.slow
def test_a_sampled_graph_is_the_whole_one_on_average() -> None:
    shards, (users, items) = Shards((40, 30)), popular_edges()
    whole = user_item_graph(Edges(users, items), shards).toarray()
    drawn = [
        sampled_user_item_graph(Edges(users, items), shards, 2, np.random.default_rng(seed)) for seed in range(4000)
    ]
    assert all((graph != graph.T).nnz == 0 and graph.has_sorted_indices for graph in drawn[:20])
    mean, kept = sum(graph.toarray() for graph in drawn) / 4000, sum(graph.toarray() > 0 for graph in drawn) / 4000
    degrees = np.maximum((whole > 0).sum(1), 1)
    chances = np.where(whole > 0, np.minimum(1, 2 * (1 / degrees[:, None] + 1 / degrees)), 0)
    assert 0.1 < chances[whole > 0].min() < 0.3 and (chances == 1).any()
    np.testing.assert_allclose(kept, chances, atol=5 * 0.5 / 4000**0.5)
    np.testing.assert_allclose(mean, whole, atol=5 * 0.25 * 0.5 / 4000**0.5)
    # Every weight of an edge that might have gone is at most 1 / (2 * 2).
    assert max(graph.toarray()[chances < 1].max() for graph in drawn) <= 0.25 + 1e-6
    np.testing.assert_allclose(np.mean([graph.nnz for graph in drawn]), chances.sum(), rtol=0.01)
    assert chances.sum() <= 2 * 2 * (40 + 30)


def test_with_more_neighbours_than_there_are_the_graph_is_whole() -> None:
    shards, edges = Shards((40, 30)), popular_edges()
    sampled = sampled_user_item_graph(Edges(*edges), shards, 40, np.random.default_rng(0))
    assert (sampled != user_item_graph(Edges(*edges), shards)).nnz == 0


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_rows_of_the_ranks_are_those_of_the_whole_graph(world_size: int) -> None:
    shards, edges = Shards((40, 30)), popular_edges()
    whole, sampled = user_item_graph(Edges(*edges), shards), sampled_user_item_graph(Edges(*edges), shards, 2, seeded())
    for rank in range(world_size):
        own = Shards((40, 30), rank, world_size)
        rows = np.concatenate([np.arange(part.start, part.stop) for part in own.parts()])
        assert (user_item_graph(Edges(*edges), own) != whole[rows]).nnz == 0
        assert (sampled_user_item_graph(Edges(*edges), own, 2, seeded()) != sampled[rows]).nnz == 0


def seeded() -> np.random.Generator:
    return np.random.default_rng(7)


def test_the_graph_does_not_depend_on_the_order_of_the_pairs() -> None:
    met = np.random.default_rng(2).random((30, 20)) < 0.2
    users, items = np.nonzero(met)
    order = np.random.default_rng(3).permutation(len(users))
    sorted_graph, graph = (
        user_item_graph(Edges(users[rows], items[rows]), Shards((30, 20))) for rows in (slice(None), order)
    )
    assert graph.has_sorted_indices and graph.indices.dtype == graph.indptr.dtype == np.int32
    assert (graph != sorted_graph).nnz == 0 and (graph != graph.T).nnz == 0
    degrees = np.maximum(np.concatenate([met.sum(1), met.sum(0)]), 1)
    dense = np.block([[np.zeros((30, 30)), met], [met.T, np.zeros((20, 20))]]) / np.sqrt(np.outer(degrees, degrees))
    np.testing.assert_allclose(graph.toarray(), dense, rtol=1e-6)
