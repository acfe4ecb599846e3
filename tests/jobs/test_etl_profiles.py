"""Profiles: sums by hand, and the same bits whatever the batches and partitions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from crane_core.storage import matrix
from jobs.etl.stages.profiles import segment_sums, sum_profiles, whole_users


def batches(users: list[int], items: list[int], sizes: list[int]) -> Iterator[pa.RecordBatch]:
    start = 0
    for size in sizes:
        columns = [pa.array(values[start : start + size], pa.int32()) for values in (users, items)]
        weights = pa.array([item / 2 for item in items[start : start + size]], pa.float32())
        yield pa.record_batch([*columns, weights], names=["user_idx", "item_idx", "weight"])
        start += size


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [2, 0, 3, 2], [4, 3], [0]])
def test_no_user_straddles_two_groups(sizes: list[int]) -> None:
    users, items = [0, 0, 0, 2, 2, 5, 6], [1, 2, 3, 1, 4, 0, 9]
    found = list(whole_users(batches(users, items, sizes)))
    assert all((group.weights == group.items / 2).all() for group in found)
    groups = [(list(group.users), list(group.items)) for group in found]
    seen = [set(group) for group, _ in groups]
    assert all(not (first & second) for n, first in enumerate(seen) for second in seen[n + 1 :])
    count = sum(sizes)
    assert [user for group, _ in groups for user in group] == users[:count]
    assert [item for _, group in groups for item in group] == items[:count]


def test_sums_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 3)).astype(np.float32)
    items = rng.integers(0, 50, 200).astype(np.int32)
    starts = np.array([0, 1, 90, 150])
    weights = rng.integers(1, 9, 200).astype(np.float32) / 4
    terms = rows[items].astype(np.float64) * weights[:, None]
    expected = [terms[a:b].sum(axis=0) for a, b in ((0, 1), (1, 90), (90, 150), (150, 200))]
    np.testing.assert_allclose(segment_sums(rows, items, weights, starts), expected, rtol=1e-14)


def test_a_sum_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of more rows than a block holds is summed in blocks of its own."""
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 16 * 10)
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((100, 2)) * 10.0 ** rng.integers(-6, 6, (100, 1))).astype(np.float32)
    lengths = [3, 37, 1, 10, 4, 25, 8]
    starts = np.cumsum([0, *lengths[:-1]])
    items = rng.integers(0, 100, sum(lengths)).astype(np.int32)
    weights = rng.random(len(items)).astype(np.float32)
    together = segment_sums(rows, items, weights, starts)
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = slice(start, start + length)
        alone = segment_sums(rows, items[own], weights[own], np.array([0]))
        assert alone[0].tobytes() == together[n].tobytes()
        terms = rows[items[own]].astype(np.float64) * weights[own, None]
        np.testing.assert_allclose(alone[0], terms.sum(axis=0))


@pytest.mark.spark
@pytest.mark.parametrize("mean", [False, True])
def test_profiles_are_the_same_bits_for_any_number_of_partitions(
    spark: SparkSession, tmp_path: Path, mean: bool
) -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((20, 3)).astype(np.float32)
    mask = rng.random(20) < 0.5
    rows[~mask] = 0
    np.save(tmp_path / "matrix.npy", rows)
    np.save(tmp_path / "mask.npy", mask)
    pairs = sorted({(int(user), int(item)) for user, item in rng.integers(0, (9, 20), (80, 2))})
    weights = {pair: (number % 3 + 1) / 2 for number, pair in enumerate(pairs)}
    met = [(*pair, weights[pair]) for pair in pairs[::-1]]
    train = spark.createDataFrame(met, "user_idx int, item_idx int, weight float")
    paths = [(str(tmp_path / "matrix.npy"), str(tmp_path / "mask.npy"))]
    found = [
        {row["user_idx"]: (row["sum_0"], row["count_0"]) for row in sum_profiles(train, paths, mean, parts).collect()}
        for parts in (1, 5)
    ]
    assert found[0] == found[1]
    for user in {user for user, _ in pairs}:
        items = [item for owner, item in pairs if owner == user]
        own = np.array([weights[user, item] for item in items])
        total, count = (own[:, None] * rows[items]).sum(axis=0), int(mask[items].sum())
        expected = total / (own[mask[items]].sum() or 1) if mean else total
        np.testing.assert_allclose(found[0][user][0], expected, rtol=1e-6, atol=1e-6)
        assert found[0][user][1] == count
