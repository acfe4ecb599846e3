"""Growth of RCA: rows that are new or changed are found, copied and laid over those of the earlier run."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from crane_core.refine.growth import load_selected, outgrown, overlay, touched, write_selected
from tests.worlds.catalogs import catalog


def test_touched_rows_are_found_and_copied(tmp_path: Path) -> None:
    before, now = catalog(200), catalog(203, changed=(7,))
    gone = now[1].present.copy()
    gone[9] = ~gone[9]
    profiles = np.concatenate([now[0].profiles, np.ones((1, 6), np.float32)])
    profiles[4] += 1
    counts = now[0].counts.copy()
    counts[5] = 2
    now = [
        replace(now[0], profiles=profiles, counts=np.append(counts, 1)),
        replace(
            now[1], present=gone, profiles=np.append(now[1].profiles, [[0] * 5], 0), counts=np.append(now[1].counts, 1)
        ),
    ]
    rows = touched(before, now)
    assert rows.items.tolist() == [7, 9, 200, 201, 202] and rows.users.tolist() == [4, 5, 30]
    write_selected(now, rows, tmp_path)
    picked = load_selected(now, tmp_path)
    np.testing.assert_array_equal(picked[0].items, now[0].items[rows.items])
    np.testing.assert_array_equal(picked[1].present, gone[rows.items])
    np.testing.assert_array_equal(picked[0].profiles, profiles[rows.users])


def test_growth_ends_where_most_features_are_others_or_the_catalog_has_doubled() -> None:
    assert not outgrown(np.arange(5), 10, 10, 10) and outgrown(np.arange(6), 10, 10, 10)
    new = np.arange(10, 20)
    assert not outgrown(new, 10, 10, 20) and outgrown(np.arange(20, 21), 20, 10, 21)


def test_replaced_and_new_rows_are_laid_over_the_earlier_ones(tmp_path: Path) -> None:
    before = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "before.npy", before)
    np.save(tmp_path / "rows.npy", np.float32([[-1, -1], [-2, -2], [-3, -3]]))
    overlay(tmp_path / "before.npy", np.array([1, 6, 7]), tmp_path / "rows.npy", 8, tmp_path / "target.npy")
    found = np.load(tmp_path / "target.npy")
    expected = np.concatenate([before, np.float32([[-2, -2], [-3, -3]])])
    expected[1] = -1
    np.testing.assert_array_equal(found, expected)
