"""The item graph: merging of shards and normalisation by hand."""

import numpy as np
import pytest

from crane_core.errors import ArtifactError
from crane_core.graph.item_graph import build_graph, merge_shards


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
