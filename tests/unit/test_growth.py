"""Growth: the same bytes as a search from nothing, for a fraction of the comparisons."""

from pathlib import Path

import numpy as np
import pytest

from crane_core import growth
from crane_core.errors import ArtifactError
from crane_core.growth import grow_neighbours
from crane_core.knn import search


def yesterday(num_rows: int = 400, dim: int = 8) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(num_rows, dim)).astype(np.float32)
    rows[50:60], rows[100:103] = rows[3], 0
    return rows


def today(rows: np.ndarray, new: int, changed: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(1)
    grown = np.concatenate([rows, generator.normal(size=(new, rows.shape[1])).astype(np.float32)])
    grown[list(changed)] = generator.normal(size=(len(changed), rows.shape[1]))
    if new:
        grown[-1] = rows[3]
    return grown


@pytest.mark.parametrize(("new", "changed"), [(0, ()), (12, ()), (0, (3, 55, 200)), (12, (0, 3, 101, 399)), (1, (7,))])
@pytest.mark.parametrize("memory", [1 << 30, 100_000])
def test_growth_equals_a_search_from_nothing(new: int, changed: tuple[int, ...], memory: int, tmp_path: Path) -> None:
    before = yesterday()
    rows = today(before, new, changed)
    grown = grow_neighbours(rows, before, *search(before, range(len(before)), 6), 6, 0.9, memory=memory, work=tmp_path)
    expected = search(rows, range(len(rows)), 6)
    np.testing.assert_array_equal(grown.neighbours, expected[0])
    np.testing.assert_array_equal(grown.similarities, expected[1])
    assert grown.num_touched == new + len(changed)
    assert grown.num_touched <= grown.num_searched < len(rows) / 2


def test_rows_that_lose_a_neighbour_are_searched_and_the_others_only_among_what_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = yesterday()
    neighbours, similarities = search(before, range(len(before)), 6)
    rows = today(before, 5, (200,))
    pairs, nearest = [], growth.nearest

    def count(rows, queries, k, **given):
        keys = given.get("keys")
        pairs.append((set(np.asarray(queries).tolist()), None if keys is None else set(np.asarray(keys).tolist())))
        return nearest(rows, queries, k, **given)

    monkeypatch.setattr(growth, "nearest", count)
    grow_neighbours(rows, before, neighbours, similarities, 6, 0.9)
    new = {200, *range(400, 405)}
    lost = set(np.flatnonzero((neighbours == 200).any(axis=1)).tolist())
    assert lost
    assert pairs == [(new | lost, None), (set(range(405)) - new - lost, new)]


@pytest.mark.parametrize(("size", "share"), [(400, 0.01), (5, 0.9)])
def test_past_the_bound_and_for_longer_lists_everything_is_searched(size: int, share: float) -> None:
    before = yesterday()[:size]
    rows = today(before, 12, ())
    grown = grow_neighbours(rows, before, *search(before, range(size), 6), 6, share)
    assert grown.num_searched == len(rows)
    np.testing.assert_array_equal(grown.neighbours, search(rows, range(len(rows)), 6)[0])


def test_what_does_not_grow_is_refused() -> None:
    before = yesterday()
    neighbours, similarities = search(before, range(len(before)), 6)
    for rows, lists in ((before[:-1], neighbours), (before[:, :4], neighbours), (before, neighbours[:-1])):
        with pytest.raises(ArtifactError, match="do not grow"):
            grow_neighbours(rows, before, lists, similarities, 6, 0.9)
