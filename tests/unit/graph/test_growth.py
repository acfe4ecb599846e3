"""Growth: the same bytes as a search from nothing, for a fraction of the comparisons, and what it costs."""

from pathlib import Path

import numpy as np
import pytest

from crane_core.config import Knn
from crane_core.errors import ArtifactError
from crane_core.graph import growth
from crane_core.graph.candidates import unpack
from crane_core.graph.exact import search
from crane_core.graph.growth import BaseGraph, grow_neighbours
from crane_core.graph.lists import find_neighbours

EXACT = Knn(k=6, mode="exact")


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
    lists = search(before, range(len(before)), 6)
    expected = search(rows, range(len(rows)), 6)
    config = EXACT.model_copy(update={"memory": memory})
    num_searched = 0
    for queries in (range(130), range(130, 390), range(390, len(rows))):
        work = tmp_path / str(queries.start)
        work.mkdir()
        grown = grow_neighbours(rows, BaseGraph(before, *lists), queries, config, work=work)
        np.testing.assert_array_equal(grown.neighbours, expected[0][queries])
        np.testing.assert_array_equal(grown.similarities, expected[1][queries])
        assert grown.num_touched == new + len(changed)
        num_searched += grown.num_searched
    assert new + len(changed) <= num_searched < len(rows) / 2


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
    monkeypatch.setattr(
        "crane_core.graph.lists.search", lambda rows, queries, k, **given: unpack(count(rows, queries, k, top=None))
    )
    grow_neighbours(rows, BaseGraph(before, neighbours, similarities), range(len(rows)), EXACT)
    new = {200, *range(400, 405)}
    lost = set(np.flatnonzero((neighbours == 200).any(axis=1)).tolist())
    assert lost
    assert pairs == [(new | lost, None), (set(range(405)) - new - lost, new)]


@pytest.mark.parametrize(("size", "share"), [(400, 0.01), (5, 0.9)])
def test_past_the_bound_and_for_longer_lists_everything_is_searched(
    size: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "MAX_SEARCHED", share)
    before = yesterday()[:size]
    rows = today(before, 12, ())
    grown = grow_neighbours(rows, BaseGraph(before, *search(before, range(size), 6)), range(len(rows)), EXACT)
    assert grown.num_searched == len(rows)
    np.testing.assert_array_equal(grown.neighbours, search(rows, range(len(rows)), 6)[0])


def test_what_does_not_grow_is_refused() -> None:
    before = yesterday()
    neighbours, similarities = search(before, range(len(before)), 6)
    for rows, lists in ((before[:-1], neighbours), (before[:, :4], neighbours), (before, neighbours[:-1])):
        with pytest.raises(ArtifactError, match="do not grow"):
            grow_neighbours(rows, BaseGraph(before, lists, similarities), range(len(rows)), EXACT)


def test_approximate_lists_grow_into_approximate_ones() -> None:
    """New rows are found as well as by a search from nothing."""
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(40, 8))
    rows = (centres[generator.integers(40, size=4000)] + 0.3 * generator.normal(size=(4000, 8))).astype(np.float32)
    before = rows[:3900]
    config = Knn(k=6, mode="approx", num_probes=6)
    lists_before = find_neighbours(before, range(3900), config)
    grown = grow_neighbours(rows, BaseGraph(before, *lists_before), range(len(rows)), config)
    anew = find_neighbours(rows, range(len(rows)), config)[0]
    exact = search(rows, range(len(rows)), 6)[0]
    recalls = [(each[:, :, None] == exact[:, None, :]).any(axis=2).mean() for each in (grown.neighbours, anew)]
    assert grown.num_searched == 100
    assert recalls[0] > recalls[1] - 0.005 > 0.9


def test_approximate_lists_grow_alike_for_any_number_of_shards() -> None:
    """Also where most of a shard is new, 40 rows of 60."""
    rows = np.random.default_rng(2).normal(size=(900, 8)).astype(np.float32)
    config = Knn(k=6, mode="approx", num_probes=2)
    lists = find_neighbours(rows[:800], range(800), config)
    base = BaseGraph(rows[:800], *lists)
    whole = grow_neighbours(rows, base, range(900), config)
    shards = [grow_neighbours(rows, base, range(60 * s, 60 * s + 60), config) for s in range(15)]
    np.testing.assert_array_equal(np.concatenate([shard.neighbours for shard in shards]), whole.neighbours)
    assert sum(shard.num_searched for shard in shards) == whole.num_searched == 100
