"""The item graph: merging, normalisation, certificate."""

import numpy as np
import pytest

from crane_core.dataset.interactions import ItemLists
from crane_core.errors import ArtifactError
from crane_core.graph.certificate import certify, co_interaction_lift, stratified_sample
from crane_core.graph.item_graph import build_graph, merge_shards
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import sampled_user_item_graph, user_item_graph


def shard(start: int, stop: int, k: int = 2) -> tuple[int, int, np.ndarray, np.ndarray]:
    neighbours = np.arange(start * k, stop * k, dtype=np.int32).reshape(-1, k)
    return start, stop, neighbours, neighbours.astype(np.float32)


def test_shards_merge_in_any_order() -> None:
    neighbours, similarities = merge_shards([shard(3, 5), shard(0, 3)], 5)
    np.testing.assert_array_equal(neighbours, np.arange(10).reshape(5, 2))
    np.testing.assert_array_equal(similarities, neighbours)


@pytest.mark.parametrize(
    "shards", [[shard(0, 3)], [shard(0, 3), shard(4, 5)], [shard(0, 3), shard(2, 5)], [shard(0, 3), shard(3, 5, k=1)]]
)
def test_missing_doubled_or_uneven_shards_are_refused(shards: list) -> None:
    with pytest.raises(ArtifactError, match=r"ml\.knn"):
        merge_shards(shards, 5)


def test_graph_by_hand() -> None:
    # 0 -> 1, 1 -> 0, 2 -> 0: edges {0, 1} and {0, 2}; degrees 2, 1, 1.
    graph = build_graph(np.array([[1], [0], [0]], dtype=np.int32)).toarray()
    edge = 1 / np.sqrt(2)
    np.testing.assert_allclose(graph, [[0, edge, edge], [edge, 0, 0], [edge, 0, 0]], rtol=1e-6)


def test_user_item_graph_by_hand() -> None:
    graph = user_item_graph(np.array([0, 0, 1]), np.array([0, 1, 1]), Shards((2, 3))).toarray()
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
    whole = user_item_graph(users, items, shards).toarray()
    drawn = [sampled_user_item_graph(users, items, shards, 2, np.random.default_rng(seed)) for seed in range(4000)]
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
    sampled = sampled_user_item_graph(*edges, shards, 40, np.random.default_rng(0))
    assert (sampled != user_item_graph(*edges, shards)).nnz == 0


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_rows_of_the_ranks_are_those_of_the_whole_graph(world_size: int) -> None:
    shards, edges = Shards((40, 30)), popular_edges()
    whole, sampled = user_item_graph(*edges, shards), sampled_user_item_graph(*edges, shards, 2, seeded())
    for rank in range(world_size):
        own = Shards((40, 30), rank, world_size)
        rows = np.concatenate([np.arange(part.start, part.stop) for part in own.parts()])
        assert (user_item_graph(*edges, own) != whole[rows]).nnz == 0
        assert (sampled_user_item_graph(*edges, own, 2, seeded()) != sampled[rows]).nnz == 0


def seeded() -> np.random.Generator:
    return np.random.default_rng(7)


def test_certificate_counts_what_is_missing() -> None:
    neighbours = np.array([[1, 2], [0, 2], [0, 3], [2, 9]], dtype=np.int32)
    truth = np.array([[1, 2], [0, 2], [0, 1], [2, 1]], dtype=np.int32)
    certificate = certify(neighbours, {"head": (np.array([0, 1]), truth[:2]), "tail": (np.array([2, 3]), truth[2:])}, 0)
    assert certificate["recall"]["mean"] == 0.75
    assert certificate["recall"]["low"] < 0.75 < certificate["recall"]["high"]
    assert certificate["strata"]["head"]["recall"] == 1.0
    assert certificate["strata"]["tail"]["recall"] == 0.5


def test_sample_covers_every_stratum() -> None:
    counts = np.array([0] * 10 + [1] * 40 + [50] * 10)
    sample = stratified_sample(counts, 15, seed=0)
    assert {name: len(rows) for name, rows in sample.items()} == {"head": 5, "tail": 5, "cold": 5}
    assert (counts[sample["cold"]] == 0).all()
    assert (counts[sample["head"]] == 50).all()
    assert len(stratified_sample(np.array([3]), 15, seed=0)["head"]) == 1


def test_lift_tells_a_graph_of_behaviour_from_garbage() -> None:
    users, items = np.divmod(np.arange(40 * 10), 10)
    items = (items + 10 * (users % 4)).astype(np.int32)
    train = ItemLists.from_pairs(users, items, 40)
    within = np.array([[(i // 10) * 10 + (i + 1) % 10] for i in range(40)], dtype=np.int32)
    across = np.array([[(i + 10) % 40] for i in range(40)], dtype=np.int32)
    assert co_interaction_lift(within, train, 40, seed=0)["lift"] > 3
    assert co_interaction_lift(across, train, 40, seed=0)["neighbours"] == 0
