"""Interactions read from Parquet shards in blocks, and membership queries on item lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.dataset import interactions as dataset
from crane_core.dataset.interactions import ItemLists, load_interactions
from crane_core.errors import ArtifactError
from crane_core.schema import ITEM_IDX, SPLIT, USER_IDX
from crane_core.storage.artifacts import Artifact

NUM_USERS, NUM_ITEMS = 60, 40


def written(folder: Path, num_shards: int = 3, most: int = NUM_ITEMS) -> tuple[Artifact, np.ndarray]:
    """Write random pairs in random order into some files; return the artifact and user, item, split, int [n, 3]."""
    generator = np.random.default_rng(5)
    keys = np.flatnonzero(generator.random(NUM_USERS * most) < 0.2)
    users, items = np.divmod(generator.permutation(keys), most)
    pairs = np.stack([users, items, generator.integers(3, size=len(keys))], axis=1)
    pairs = pairs[users % 9 > 0]
    for number, part in enumerate(np.array_split(pairs, num_shards)):
        columns = zip((USER_IDX, ITEM_IDX, SPLIT), part.T, (pa.int32(), pa.int32(), pa.int8()), strict=True)
        (folder / "interactions").mkdir(exist_ok=True)
        table = pa.table({name: pa.array(values, kind) for name, values, kind in columns})
        pq.write_table(table, folder / "interactions" / f"part-{number}.parquet")
    facts = {"num_users": NUM_USERS, "num_items": NUM_ITEMS}
    return Artifact(folder, {"facts": facts, "files": {"interactions/part-0.parquet": {}}}), pairs


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_blocks_of_any_size_give_the_lists(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ROWS", block)
    artifact, pairs = written(tmp_path)
    found = load_interactions(artifact)
    for split, lists in enumerate((found.train, found.validation, found.test)):
        users, items, _ = pairs[pairs[:, 2] == split].T
        expected = ItemLists.from_pairs(users, items, NUM_USERS)
        assert lists.items.dtype == np.int32 and lists.indptr.dtype == np.int64
        assert np.array_equal(lists.indptr, expected.indptr) and np.array_equal(lists.items, expected.items)


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
