import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from crane_core.dataset.interactions import ItemLists
from crane_core.model.fold_in import Block, FoldIn, History
from crane_core.serving.export import (
    RECOMMENDATIONS,
    SIMILAR,
    write_popular,
    write_recommendations,
    write_similar,
)
from crane_core.serving.model_folder import Recommender, load_recommender
from crane_core.storage.artifacts import Artifact

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
    popularity = np.bincount(seen.items, minlength=len(item_ids)).astype(np.float32)
    return Recommender(
        pa.chunked_array([user_ids]), pa.chunked_array([item_ids]), titles, users, items, seen, popularity
    )


def test_recommendations_equal_brute_force(world, tmp_path):
    users, items, seen, user_ids, item_ids = world
    path = tmp_path / "r.parquet"
    assert write_recommendations(path, served(*world), K).num_rows == NUM_USERS * K
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
    assert rows == [("a", 1, "x", 2.0, None), ("a", 2, "y", 2.0, None), ("b", 1, "z", 2.0, None)]


def test_rows_name_the_item_that_they_are_for(tmp_path):
    """Reader r met x, which speaks for y; popularity, the last coordinate, is what brings z."""
    seen = ItemLists.from_pairs(np.array([0, 0]), np.array([0, 1]), 1)
    ids = np.array(["w", "x", "y", "z"], dtype=object)
    fold_in = FoldIn(np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]), np.float32([0, 0, 1]), (Block(3),))
    items = np.float32([[0, 0, 0], [0, 0, 0], [1, 3, 0.5], [0, 0, 1]])
    model = served(np.float32([[1, 1, 1]]), items, seen, np.array(["r"], dtype=object), ids)
    history = History(seen.users(), seen.items, np.ones(2))
    write_recommendations(tmp_path / "r", dataclasses.replace(model, fold_in=fold_in, history=history), 1)
    assert pq.read_table(tmp_path / "r").to_pylist()[0] == {
        "user_id": "r",
        "rank": 1,
        "item_id": "y",
        "score": 4.5,
        "because_item_id": "x",
    }
    write_recommendations(tmp_path / "both", dataclasses.replace(model, fold_in=fold_in, history=history), 2)
    # Of two unseen items popularity alone would have shown both.
    assert pq.read_table(tmp_path / "both")["because_item_id"].to_pylist() == [None, None]


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


def test_the_popularity_of_the_moment_decides_what_is_popular(tmp_path):
    seen = ItemLists.from_pairs(np.array([0, 1, 2, 2]), np.array([2, 2, 0, 1]), 3)
    ids = np.array(["a", "b", "c"], dtype=object)
    recommender = served(np.ones((3, 2)), np.ones((3, 2)), seen, ids, ids)
    now = dataclasses.replace(recommender, popularity=np.float32([0.5, 0.25, 0.125]))
    write_popular(tmp_path / "p.parquet", now, 2)
    rows = [tuple(row.values()) for row in pq.read_table(tmp_path / "p.parquet").to_pylist()]
    assert rows == [(1, "a", 0.5), (2, "b", 0.25)]


@pytest.mark.parametrize("seed", range(12))
def test_nobody_is_offered_what_they_have_met(seed, tmp_path):
    """Random logs of a refit run: every event is training, ids are in any order, and some items are tombstones."""
    world = np.random.default_rng(seed)
    num_users, num_items, dim = (int(world.integers(*bounds)) for bounds in ((1, 60), (2, 80), (1, 6)))
    met = world.random((num_users, num_items)) < world.choice([0.02, 0.2, 0.95])
    dead = world.random(num_items) < 0.2
    met[:, dead] = False
    users, items = np.nonzero(met)
    order = world.permutation(len(users))
    names = [
        world.permutation([f"{kind}{n}" for n in range(size)]) for kind, size in (("u", num_users), ("i", num_items))
    ]
    state = np.where(dead, "tombstone", np.where(met.any(0), "trained", "cold"))
    tables = {
        "interactions": {
            "user_idx": users[order],
            "item_idx": items[order],
            "split": np.zeros(len(users), np.int8),
            "weight": np.ones(len(users), np.float32),
            "event_time": np.full(len(users), np.datetime64("2026-01-05", "us")),
        },
        "users": {"user_idx": np.arange(num_users), "user_id": names[0]},
        "items": {"item_idx": np.arange(num_items), "item_id": names[1], "title": names[1], "state": state},
    }
    for name, columns in tables.items():
        (tmp_path / name).mkdir()
        pq.write_table(
            pa.table({column: pa.array(values) for column, values in columns.items()}), tmp_path / name / "0"
        )
    rows = {"user_embeddings": (num_users, dim), "item_embeddings": (num_items, dim)}
    # Few distinct values: ties are frequent.
    save_file(
        {name: world.integers(-2, 3, shape).astype(np.float32) for name, shape in rows.items()},
        tmp_path / "embeddings.safetensors",
    )
    facts = {"num_users": num_users, "num_items": num_items, "num_tombstones": {"items": int(dead.sum())}}
    artifact = Artifact(tmp_path, {"facts": facts, "files": dict.fromkeys([*tables, "embeddings.safetensors"])})
    write_recommendations(tmp_path / "lists", load_recommender(artifact, artifact), K, score_bytes=4 * num_items * 3)
    exported = {(row["user_id"], row["item_id"]) for row in pq.read_table(tmp_path / "lists").to_pylist()}
    assert exported.isdisjoint((names[0][user], names[1][item]) for user, item in zip(users, items, strict=True))
    # Everybody with an event gets all that is left of the catalog, up to k items; nobody else gets a list.
    left = (~met & ~dead).sum(1)
    assert len(exported) == sum(min(K, left[user]) for user in range(num_users) if met[user].any())
    assert {user for user, _ in exported} == {names[0][n] for n in range(num_users) if met[n].any() and left[n]}
