"""The metrics report of a small test split, by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crane_core.config import Evaluate
from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import DataError
from crane_core.evaluation.ranking import Scorer
from crane_core.evaluation.summary import rank_test, summarise, summarise_unknown_users
from crane_core.schema import TEST, TRAIN

CONFIG = Evaluate(num_bootstrap=100, ks=(1, 20))
# Users 0 and 1 are tested, 2 is not; items 2 and 3 are cold, item 4 is a tombstone.
TRAINED = ItemLists.from_pairs(np.array([0, 1, 2]), np.array([0, 1, 0]), 3)
TESTED = ItemLists.from_pairs(np.array([0, 1]), np.array([1, 3]), 3)
NOTHING = ItemLists.from_pairs(np.empty(0, int), np.empty(0, int), 3)
INTERACTIONS = Interactions(3, 5, TRAINED, NOTHING, TESTED, np.array([4]))


def scorer(*scores: float) -> Scorer:
    return lambda users: torch.tensor([scores] * len(users), dtype=torch.float32)


MODELS = {"crane": scorer(0, 5, 1, 4, 9), "popularity": scorer(3, 2, 1, 0, 9)}


def test_the_report_by_hand() -> None:
    tested = rank_test(MODELS, INTERACTIONS, CONFIG)
    assert tested.users.tolist() == [0, 1]
    assert tested.ranked["crane"][:, :4].tolist() == [[1, 3, 2, -1], [3, 2, 0, -1]]
    report = summarise(tested, np.eye(5, dtype=np.float32), CONFIG)
    assert list(report) == ["users", "models", "differences", "slices", "cold_items", "evidence"]
    assert report["models"]["crane"]["recall@1"]["mean"] == 1
    assert report["models"]["popularity"]["recall@1"]["mean"] == 0.5
    assert report["models"]["crane"]["coverage@20"] == 1
    assert list(report["differences"]) == ["popularity"]
    assert report["differences"]["popularity"]["recall@1"]["mean"] == 0.5
    assert report["slices"]["cold_items"]["users"] == 1
    assert report["slices"]["cold_items"]["crane"]["recall@20"] == 1
    assert report["cold_items"]["items"] == 2 and report["cold_items"]["models"]["crane"]["mean"] == 1


def test_metrics_of_each_user_are_written(tmp_path: Path) -> None:
    path = tmp_path / "per_user.parquet"
    rank_test(MODELS, INTERACTIONS, CONFIG).write_per_user(path, pa.chunked_array([["ann", "bob", "cyd"]]))
    table = pq.read_table(path)
    assert table.column("user_id").to_pylist() == ["ann", "bob"]
    assert table.column("num_relevant").to_pylist() == [1, 1]
    assert table.column("popularity.recall@1").to_pylist() == [1, 0]


def test_without_a_test_item_there_is_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="None of the 3 known users"):
        rank_test(MODELS, Interactions(3, 5, TRAINED, TESTED, NOTHING), CONFIG)


def test_unknown_users_are_counted_and_get_popular_items(tmp_path: Path) -> None:
    rows = {
        "user_id": ["new", "new", "other", "ann", "new"],
        "item_idx": pa.array([0, 2, 1, None, 1], pa.int32()),
        "split": pa.array([TEST, TEST, TEST, TEST, TRAIN], pa.int8()),
        "reason": ["unknown_user", "unknown_user", "unknown_user", "unknown_item", "unknown_user"],
    }
    pq.write_table(pa.table(rows), tmp_path / "cold.parquet")
    found = summarise_unknown_users(tmp_path / "cold.parquet", INTERACTIONS, None, 1)
    assert found["rows"] == {"unknown_user": 3, "unknown_item": 1} and found["unknown_users"] == 2
    assert found["popularity"]["recall@20"] == 1
