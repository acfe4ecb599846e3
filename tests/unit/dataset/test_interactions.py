"""Interactions read from Parquet shards in blocks, and membership queries on item lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.dataset import interactions as dataset
from crane_core.dataset.interactions import Interactions, ItemLists, load_interactions
from crane_core.errors import ArtifactError
from crane_core.schema import EVENT_TIME, ITEM_IDX, SPLIT, USER_IDX, WEIGHT
from crane_core.storage.artifacts import Artifact

NUM_USERS, NUM_ITEMS = 60, 40


def written(folder: Path, num_shards: int = 3, most: int = NUM_ITEMS, **facts: Any) -> tuple[Artifact, np.ndarray]:
    """Write random pairs in random order into some files; return the artifact and user, item, split, int [n, 3].

    Item i of user u weighs i + 1 and was met (u + i) / 4 days before 2026-01-10.
    """
    generator = np.random.default_rng(5)
    keys = np.flatnonzero(generator.random(NUM_USERS * most) < 0.2)
    users, items = np.divmod(generator.permutation(keys), most)
    pairs = np.stack([users, items, generator.integers(3, size=len(keys))], axis=1)
    pairs = pairs[users % 9 > 0]
    for number, part in enumerate(np.array_split(pairs, num_shards)):
        columns = zip((USER_IDX, ITEM_IDX, SPLIT), part.T, (pa.int32(), pa.int32(), pa.int8()), strict=True)
        (folder / "interactions").mkdir(exist_ok=True)
        table = {name: pa.array(values, kind) for name, values, kind in columns}
        met = np.datetime64("2026-01-10", "us") - (part[:, 0] + part[:, 1]) * np.timedelta64(6, "h")
        table |= {WEIGHT: pa.array(part[:, 1] + 1, pa.float32()), EVENT_TIME: pa.array(met, pa.timestamp("us", "UTC"))}
        table = pa.table(table)
        pq.write_table(table, folder / "interactions" / f"part-{number}.parquet")
    facts |= {"num_users": NUM_USERS, "num_items": NUM_ITEMS}
    return Artifact(folder, {"facts": facts, "files": {"interactions/part-0.parquet": {}}}), pairs


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_blocks_of_any_size_give_the_lists(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ROWS", block)
    cutoffs = {"validation": "2026-01-10T00:00:00+00:00"}
    artifact, pairs = written(tmp_path, cutoffs=cutoffs)
    found = load_interactions(artifact)
    assert found.weights is not None and found.ages is not None
    assert np.array_equal(found.weights, found.train.items + 1)
    assert np.array_equal(found.ages, (found.train.users() + found.train.items) / 4)
    for split, lists in enumerate((found.train, found.validation, found.test)):
        users, items, _ = pairs[pairs[:, 2] == split].T
        expected = ItemLists.from_pairs(users, items, NUM_USERS)
        assert lists.items.dtype == np.int32 and lists.indptr.dtype == np.int64
        assert np.array_equal(lists.indptr, expected.indptr) and np.array_equal(lists.items, expected.items)


def test_without_a_temporal_split_there_are_no_ages(tmp_path: Path) -> None:
    artifact, _ = written(tmp_path, cutoffs={"validation": None})
    found = load_interactions(artifact)
    assert found.ages is None
    assert np.array_equal(found.decayed(None), found.train.items + 1)


def test_what_an_interaction_counts_falls_with_its_age() -> None:
    train = ItemLists.from_pairs(np.array([0, 0, 1]), np.array([0, 2, 2]), 2)
    nothing = ItemLists(np.zeros(3, dtype=np.int64), np.empty(0, dtype=np.int32))
    weights, ages = (np.array(values, dtype=np.float32) for values in ([1, 4, 2], [6, 3, 0]))
    log = Interactions(2, 3, train, nothing, nothing, weights=weights, ages=ages)
    assert log.decayed(3.0).tolist() == [0.25, 2, 2]
    assert log.popularity(3.0).tolist() == [0.25, 0, 4]
    assert log.popularity().tolist() == [1, 0, 6]
    assert log.item_counts().tolist() == [1, 0, 2]


def test_an_index_outside_the_maps_is_named(tmp_path: Path) -> None:
    artifact, _ = written(tmp_path, most=NUM_ITEMS + 1)
    with pytest.raises(ArtifactError, match=rf"item_idx outside 0\.\.{NUM_ITEMS - 1}"):
        load_interactions(artifact)


def test_who_holds_what() -> None:
    generator = np.random.default_rng(1)
    met = generator.random((30, 50)) < generator.random((30, 1))
    met[::4] = False
    met[1::4] = True
    lists = ItemLists.from_pairs(*np.nonzero(met), 30)
    users, items = np.divmod(generator.permutation(30 * 50), 50)
    assert np.array_equal(lists.holds(users, items), met[users, items])
    assert lists.holds(users[:0], items[:0]).tolist() == []
