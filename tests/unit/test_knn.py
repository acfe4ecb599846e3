"""kNN: equal to brute force for every sharding, ties and degenerate rows included."""

import itertools

import numpy as np
import pytest

from crane_core.errors import ArtifactError
from crane_core.knn import brute_force, search, unit_rows


def reference(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair in float64, ordered by similarity and then by index."""
    unit = unit_rows(rows).astype(np.float64)
    similarity = np.array([[float((a * b).sum()) for b in unit] for a in unit]).astype(np.float32)
    np.fill_diagonal(similarity, -np.inf)
    order = np.array([np.lexsort((np.arange(len(unit)), -line)) for line in similarity])[:, :k]
    return order, np.take_along_axis(similarity, order, 1)


def make_rows(kind: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(150, 8)).astype(np.float32)
    if kind == "clustered":
        return rows[:10].repeat(15, axis=0) + 0.01 * rows
    if kind == "duplicates":
        return rows[generator.integers(5, size=150)]
    if kind == "zeros":
        rows[::3] = 0
    return rows


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicates", "zeros"])
def test_any_sharding_equals_brute_force(kind: str) -> None:
    rows = make_rows(kind)
    expected, expected_similarity = reference(rows, 10)
    unit = unit_rows(rows)
    for num_shards, key_block in ((1, 1000), (2, 64), (7, 13), (150, 150)):
        cuts = [len(rows) * i // num_shards for i in range(num_shards + 1)]
        shards = [search(unit, start, stop, 10, key_block) for start, stop in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate([s[0] for s in shards]), expected)
        np.testing.assert_array_equal(np.concatenate([s[1] for s in shards]), expected_similarity)
    np.testing.assert_array_equal(brute_force(unit, np.arange(len(rows)), 10), expected)


def test_fewer_items_than_k() -> None:
    unit = unit_rows(np.eye(3, dtype=np.float32))
    neighbours, similarities = search(unit, 0, 3, 10)
    assert neighbours.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert similarities.tolist() == [[0, 0]] * 3


def test_one_item_has_no_neighbour() -> None:
    neighbours, similarities = search(unit_rows(np.ones((1, 4), dtype=np.float32)), 0, 1, 10)
    assert neighbours.shape == similarities.shape == (1, 0)


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = np.ones((4, 2), dtype=np.float32)
    rows[2, 1] = np.nan
    with pytest.raises(ArtifactError, match="1 of 4 rows are not finite"):
        unit_rows(rows)
