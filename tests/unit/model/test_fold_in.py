"""Rows made of a history: by hand, in parts, and back from a file."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest

from crane_core.model.fold_in import CONSTANT, ROWS, Block, FoldIn, History, same_for_all, side_by_side, summed

ITEMS = np.float32([[1, 0, 2], [0, 4, 1], [3, 3, 0]])


def history(*events: tuple[int, int, float, float]) -> History:
    users, items, weights, ages = (np.array(column) for column in zip(*events, strict=True))
    return History(users, items, weights, ages)


def test_a_row_by_hand() -> None:
    blocks = (Block(1, 2.0), Block(2, None, 0.5))
    fold_in = FoldIn(ITEMS, np.float32([10, 0, 0]), blocks)
    found = fold_in.fold(history((0, 0, 1.0, 2.0), (0, 2, 3.0, 4.0), (2, 1, 4.0, 0.0)), 3)
    # User 0: weights 1 and 3, halved once and twice; in the second block the sum over the root of 4.
    np.testing.assert_allclose(found[0], [10 + 0.5 * 1 + 0.75 * 3, (0 + 3 * 3) / 2, (2 + 0) / 2])
    np.testing.assert_allclose(found[1], [10, 0, 0])
    np.testing.assert_allclose(found[2], [10, 4 * 4 / 2, 4 * 1 / 2])


def test_without_times_nothing_decays() -> None:
    fold_in = summed(ITEMS, 0.5)
    users, items = np.array([0, 0]), np.array([0, 1])
    np.testing.assert_allclose(fold_in.fold(History(users, items, np.ones(2)), 1), [[1, 4, 3]])


def test_the_parts_of_the_items_add_up_to_the_row() -> None:
    generator = np.random.default_rng(0)
    blocks = (Block(2, 3.0, 0.5), Block(1, None, 1.0), Block(3, 7.0))
    fold_in = FoldIn(generator.normal(size=(9, 6)).astype(np.float32), np.ones(6, np.float32), blocks)
    users = np.sort(generator.integers(0, 4, 20))
    events = History(users, generator.integers(0, 9, 20), generator.random(20) + 0.5, generator.uniform(0, 30, 20))
    parts = np.repeat(fold_in.factors(events, 4), [2, 1, 3], axis=1) * fold_in.rows[events.items]
    total = np.tile(fold_in.constant, (4, 1))
    np.add.at(total, users, parts)
    np.testing.assert_allclose(fold_in.fold(events, 4), total, rtol=1e-5)


def test_parts_side_by_side_make_the_rows_side_by_side() -> None:
    events = history((0, 0, 1.0, 1.0), (1, 2, 2.0, 3.0))
    parts = [summed(ITEMS, 1.0).times(3.0), same_for_all(np.float32([1]), 3), summed(ITEMS[:, :1], None)]
    whole = side_by_side(parts)
    np.testing.assert_allclose(whole.fold(events, 2), np.hstack([part.fold(events, 2) for part in parts]))
    np.testing.assert_allclose(parts[0].fold(events, 2), 3 * summed(ITEMS, 1.0).fold(events, 2))
    np.testing.assert_array_equal(whole.of_items(np.array([2, 0])).rows, whole.rows[[2, 0]])


def test_it_is_the_same_after_a_file() -> None:
    end = datetime(2026, 3, 1, tzinfo=UTC)
    fold_in = FoldIn(ITEMS, np.float32([1, 2, 3]), (Block(2, 3.0), Block(1, None, 0.5)), 2.5, end)
    again = FoldIn.of(fold_in.arrays(), json.loads(json.dumps(fold_in.facts())))
    assert (again.blocks, again.weight, again.end) == (fold_in.blocks, 2.5, end)
    np.testing.assert_array_equal(again.rows, ITEMS)
    assert FoldIn.of(fold_in.arrays(), fold_in.facts() | {"end": None}).end is None


@pytest.mark.parametrize("columns", [[[0, 2]], [[0, 1], [2, 3]], [[0, 2], [2, 4]], []])
def test_blocks_that_do_not_cover_the_columns_are_refused(columns: list[list[int]]) -> None:
    blocks = [{"columns": each, "half_life": None, "power": 0} for each in columns]
    with pytest.raises(ValueError, match="columns"):
        FoldIn.of({ROWS: ITEMS, CONSTANT: np.ones(3)}, {"weight": 1, "end": None, "blocks": blocks})


def test_a_constant_of_another_width_is_refused() -> None:
    facts = summed(ITEMS, None).facts()
    with pytest.raises(ValueError, match="constant"):
        FoldIn.of({ROWS: ITEMS, CONSTANT: np.ones(2)}, facts)
