import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.dataset.interactions import ItemLists
from crane_core.serving.export import (
    RECOMMENDATIONS,
    SIMILAR,
    write_popular,
    write_recommendations,
    write_similar,
)
from crane_core.serving.model_folder import Recommender

NUM_USERS, NUM_ITEMS, DIM, K = 40, 30, 6, 8


@pytest.fixture(scope="module")
def world():
    generator = np.random.default_rng(0)
    users = generator.normal(size=(NUM_USERS, DIM)).astype(np.float32)
    items = generator.normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    pairs = [(user, item) for user in range(NUM_USERS) for item in generator.choice(NUM_ITEMS, 5, replace=False)]
    seen = ItemLists.from_pairs(*(np.array(side) for side in zip(*pairs, strict=True)), NUM_USERS)
    user_ids = np.array([f"u{(7 * i) % NUM_USERS:02d}" for i in range(NUM_USERS)], dtype=object)
    item_ids = np.array([f"i{(11 * i) % NUM_ITEMS:02d}" for i in range(NUM_ITEMS)], dtype=object)
    return users, items, seen, user_ids, item_ids


def served(users, items, seen, user_ids, item_ids) -> Recommender:
    titles = pa.chunked_array([item_ids])
    return Recommender(pa.chunked_array([user_ids]), pa.chunked_array([item_ids]), titles, users, items, seen)


def test_recommendations_equal_brute_force(world, tmp_path):
    users, items, seen, user_ids, item_ids = world
    path = tmp_path / "r.parquet"
    assert write_recommendations(path, served(*world), K) == NUM_USERS * K
    table = pq.read_table(path)
    assert table.schema.equals(RECOMMENDATIONS)
    rows = table.to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["user_id"], row["rank"]))
    for user in range(NUM_USERS):
        scores = users[user] @ items.T
        scores[seen.items[seen.indptr[user] : seen.indptr[user + 1]]] = -np.inf
        order = np.argsort(-scores)[:K]
        mine = [row for row in rows if row["user_id"] == user_ids[user]]
        assert [row["item_id"] for row in mine] == item_ids[order].tolist()
        assert [row["rank"] for row in mine] == list(range(1, K + 1))
        np.testing.assert_allclose([row["score"] for row in mine], scores[order], rtol=1e-5)


def test_memory_bound_does_not_change_the_lists(world, tmp_path):
    write_recommendations(tmp_path / "a.parquet", served(*world), K)
    write_recommendations(tmp_path / "b.parquet", served(*world), K, score_bytes=4 * NUM_ITEMS * 3)
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups == -(-NUM_USERS // 3)
    left, right = (pq.read_table(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert left.drop(["score"]).equals(right.drop(["score"]))


def test_who_has_seen_almost_everything_gets_a_shorter_list(tmp_path):
    seen = ItemLists.from_pairs(np.array([0, 0, 1]), np.array([0, 1, 2]), 2)
    ids = np.array(["x", "y", "z"], dtype=object)
    ones = np.ones((3, 2), dtype=np.float32)
    model = served(ones[:2], ones, seen, np.array(["b", "a"], dtype=object), ids)
    write_recommendations(tmp_path / "r.parquet", model, 5)
    rows = [tuple(row.values()) for row in pq.read_table(tmp_path / "r.parquet").to_pylist()]
    assert rows == [("a", 1, "x", 2.0), ("a", 2, "y", 2.0), ("b", 1, "z", 2.0)]


@pytest.mark.parametrize("block", [7, 100])
def test_similar_items_equal_brute_force(world, tmp_path, block):
    _, items, _, _, item_ids = world
    assert write_similar(tmp_path / "s.parquet", served(*world), 4, block=block) == NUM_ITEMS * 4
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.equals(SIMILAR)
    rows = table.to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["item_id"], row["rank"]))
    unit = items / np.linalg.norm(items, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    for item in range(NUM_ITEMS):
        order = np.argsort(-cosines[item])[:4]
        mine = [row for row in rows if row["item_id"] == item_ids[item]]
        assert [row["similar_item_id"] for row in mine] == item_ids[order].tolist()
        np.testing.assert_allclose([row["similarity"] for row in mine], cosines[item, order], rtol=1e-5)


def test_popular_items_by_count_then_index(tmp_path):
    seen = ItemLists.from_pairs(np.array([0, 1, 2, 2]), np.array([2, 2, 0, 1]), 3)
    ids = np.array(["a", "b", "c", "d"], dtype=object)
    write_popular(tmp_path / "p.parquet", served(np.ones((3, 2)), np.ones((4, 2)), seen, ids[:3], ids), 3)
    rows = [tuple(row.values()) for row in pq.read_table(tmp_path / "p.parquet").to_pylist()]
    assert rows == [(1, "c", 2.0), (2, "a", 1.0), (3, "b", 1.0)]
