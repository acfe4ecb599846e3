"""The item graph: merging, normalisation, certificate."""

import numpy as np
import pytest

from crane_core.dataset import ItemLists
from crane_core.errors import ArtifactError
from crane_core.graph import (
    build_graph,
    certify,
    co_interaction_lift,
    merge_shards,
    stratified_sample,
    user_item_graph,
)


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
    graph = user_item_graph(np.array([0, 0, 1]), np.array([0, 1, 1]), 2, 3).toarray()
    expected = np.zeros((5, 5))
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(2 * 1)
    expected[0, 3] = expected[3, 0] = 1 / np.sqrt(2 * 2)
    expected[1, 3] = expected[3, 1] = 1 / np.sqrt(1 * 2)
    np.testing.assert_allclose(graph, expected, rtol=1e-6)


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
