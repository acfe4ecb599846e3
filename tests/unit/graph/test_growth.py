"""Growth: the same bytes as a search from nothing, for a fraction of the comparisons, and what it costs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crane_core.config import Knn, Refine
from crane_core.dataset.modalities import Modality
from crane_core.errors import ArtifactError
from crane_core.graph import growth
from crane_core.graph.candidates import unpack
from crane_core.graph.drift import drift
from crane_core.graph.exact import search
from crane_core.graph.growth import grow_neighbours
from crane_core.graph.lists import find_neighbours
from crane_core.refine import growth as refine_growth
from crane_core.refine.catalog import refine_catalog
from crane_core.refine.growth import choose_anchors, load_selected, outgrown, touched, write_selected
from crane_core.refine.refiner import Refiner, project_items

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
        grown = grow_neighbours(rows, before, *lists, queries, config, work=work)
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
    grow_neighbours(rows, before, neighbours, similarities, range(len(rows)), EXACT)
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
    grown = grow_neighbours(rows, before, *search(before, range(size), 6), range(len(rows)), EXACT)
    assert grown.num_searched == len(rows)
    np.testing.assert_array_equal(grown.neighbours, search(rows, range(len(rows)), 6)[0])


def test_what_does_not_grow_is_refused() -> None:
    before = yesterday()
    neighbours, similarities = search(before, range(len(before)), 6)
    for rows, lists in ((before[:-1], neighbours), (before[:, :4], neighbours), (before, neighbours[:-1])):
        with pytest.raises(ArtifactError, match="do not grow"):
            grow_neighbours(rows, before, lists, similarities, range(len(rows)), EXACT)


def test_approximate_lists_grow_into_approximate_ones() -> None:
    """What is new is found as well as a search from nothing finds it."""
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(40, 8))
    rows = (centres[generator.integers(40, size=4000)] + 0.3 * generator.normal(size=(4000, 8))).astype(np.float32)
    before = rows[:3900]
    config = Knn(k=6, mode="approx", num_probes=6)
    lists_before = find_neighbours(before, range(3900), config)
    grown = grow_neighbours(rows, before, *lists_before, range(len(rows)), config)
    anew = find_neighbours(rows, range(len(rows)), config)[0]
    exact = search(rows, range(len(rows)), 6)[0]
    recalls = [(each[:, :, None] == exact[:, None, :]).any(axis=2).mean() for each in (grown.neighbours, anew)]
    assert grown.num_searched == 100
    assert recalls[0] > recalls[1] - 0.005 > 0.9


def catalog(num_items: int, changed: tuple[int, ...] = (), shift: float = 0.0) -> list[Modality]:
    """Items numbered alike whatever their number; a shift makes those from 200 on another kind."""
    generator = np.random.default_rng(3)
    modalities = []
    for name, width in (("text", 6), ("image", 5)):
        items = generator.normal(size=(400, width)).astype(np.float32)
        profiles = generator.normal(size=(30, width)).astype(np.float32)
        present = generator.random(400) > 0.1
        items[~present] = 0
        items[200:] += np.float32(shift)
        items[list(changed)] += 1
        modalities.append(Modality(name, items[:num_items], present[:num_items], profiles, np.ones(30, np.int32)))
    return modalities


@pytest.mark.parametrize("phi", ["softmax", "tanh", "linear", "block", "landmark"])
def test_drift_is_what_keeping_the_keys_costs(phi: str) -> None:
    """With anchors for every item, the share of neighbours in which two whole refinements differ."""
    config = Refine(phi=phi, embedding_dim=8, num_recursions=2, seed=1)
    refiner = Refiner([6, 5], [1.0, 1.0], config)
    then, now = catalog(200), catalog(300, changed=(3, 4), shift=1.5)
    anchors = choose_anchors(200, 0)
    assert anchors.tolist() == list(range(200))
    with torch.no_grad():
        projected = project_items(refiner, then, anchors)
        _, kept = refiner.rca(projected, project_items(refiner, now, np.arange(300)))
        own = refine_catalog(refiner, now, 512)[0]
        lists = [search(refiner.fuse(rows).numpy(), range(300), 5)[0] for rows in (kept, own)]
    differ = 1 - (lists[0][:, :, None] == lists[1][:, None, :]).any(axis=2).mean()
    found = drift(refiner, anchors, projected.numpy(), 200, now, 5, 512)
    assert found == pytest.approx(differ) and found > 0
    assert drift(refiner, anchors, projected.numpy(), 200, catalog(200), 5, 64) == 0


def test_drift_from_a_sample_is_near_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    refiner = Refiner([6, 5], [1.0, 1.0], Refine(phi="softmax", embedding_dim=8, num_recursions=2))
    now, found = catalog(300, shift=1.5), {}
    for size in (100, 200):
        monkeypatch.setattr(refine_growth, "ANCHORS", size)
        anchors = choose_anchors(200, 0)
        with torch.no_grad():
            projected = project_items(refiner, catalog(200), anchors).numpy()
        found[size] = drift(refiner, anchors, projected, 200, now, 5, 64)
    assert found[200] > 0.05 and found[100] == pytest.approx(found[200], rel=0.5)


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


def test_approximate_lists_grow_alike_for_any_number_of_shards() -> None:
    """Also where most of a shard is new, 40 rows of 60."""
    rows = np.random.default_rng(2).normal(size=(900, 8)).astype(np.float32)
    config = Knn(k=6, mode="approx", num_probes=2)
    lists = find_neighbours(rows[:800], range(800), config)
    whole = grow_neighbours(rows, rows[:800], *lists, range(900), config)
    shards = [grow_neighbours(rows, rows[:800], *lists, range(60 * s, 60 * s + 60), config) for s in range(15)]
    np.testing.assert_array_equal(np.concatenate([shard.neighbours for shard in shards]), whole.neighbours)
    assert sum(shard.num_searched for shard in shards) == whole.num_searched == 100
