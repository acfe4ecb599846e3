"""Approximate kNN: recall, and the same result for every split of the work."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crane_core.config import Knn
from crane_core.errors import ArtifactError
from crane_core.graph import lists as lists_module
from crane_core.graph.candidates import Candidates, unit_rows
from crane_core.graph.exact import brute_force, search
from crane_core.graph.lists import build_lists, find_neighbours, search_lists


def clustered(num_rows: int = 4000, dim: int = 16) -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(40, dim))
    labels = (40 * generator.random(num_rows) ** 3).astype(int)
    rows = (centres[labels] + 0.4 * generator.normal(size=(num_rows, dim))).astype(np.float32)
    rows[generator.choice(num_rows, 300, replace=False)] = rows[0]
    rows[generator.choice(num_rows, 60, replace=False)] = 0
    return rows


def share_found(neighbours: np.ndarray, truth: np.ndarray) -> float:
    return float((neighbours[:, :, None] == truth[:, None, :]).any(axis=2).mean())


def test_more_probes_find_more_and_all_of_them_everything() -> None:
    rows = clustered()
    lists = build_lists(rows, 50, seed=0)
    truth = brute_force(rows, np.arange(len(rows)), 10)
    recalls = [share_found(search_lists(lists, range(len(rows)), 10, probes)[0], truth) for probes in (1, 4, 16)]
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] > 0.98
    exact = search(rows, range(len(rows)), 10)
    every = search_lists(lists, range(len(rows)), 10, 50)
    np.testing.assert_array_equal(every[0], exact[0])
    np.testing.assert_array_equal(every[1], exact[1])


def test_any_sharding_gives_the_same_neighbours(tmp_path: Path) -> None:
    rows = clustered()
    expected = search_lists(build_lists(rows, 50, 0), range(len(rows)), 10, 3)
    for num_shards, memory in ((1, 1 << 20), (3, 4 << 20), (50, 1 << 30)):
        work = tmp_path / str(num_shards)
        work.mkdir()
        lists = build_lists(rows, 50, 0, memory, work)
        cuts = [len(rows) * i // num_shards for i in range(num_shards + 1)]
        shards = [search_lists(lists, range(*cut), 10, 3, memory=memory) for cut in itertools.pairwise(cuts)]
        for found, each in zip(zip(*shards, strict=True), expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(found), each)


def test_a_query_finds_exactly_what_its_lists_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def roughly(queries: Tensor, keys: Tensor, width: int, memory: int) -> Candidates:
        """Search with errors as large as those of float32 sums of 16 products."""
        error = 16 * 2.0**-24 * torch.where(torch.arange(len(keys)) % 2 == 0, 1, -1)
        values, found = (queries @ keys.T + error).topk(width, dim=1)
        return Candidates(values, found, values[:, -1])

    monkeypatch.setattr(lists_module, "top_faiss", roughly)
    rows = clustered(1000)
    rows[:60] = rows[7] + 4e-4 * np.random.default_rng(1).normal(size=(60, 16))
    lists = build_lists(rows, 20, seed=0)
    neighbours, similarities = search_lists(lists, range(1000), 5, 1)
    unit = unit_rows(rows).astype(np.float64)
    owner = np.empty(1000, dtype=int)
    for number in range(20):
        start, stop = lists.keys.bounds[lists.bounds[number : number + 2]]
        owner[lists.keys.ids[start:stop]] = number
    np.testing.assert_array_equal(owner, (unit @ lists.centroids.T.astype(np.float64)).argmax(axis=1))
    for row in range(1000):
        inside = np.flatnonzero((owner == owner[row]) & (np.arange(1000) != row))
        if len(inside) >= 5:
            values = (unit[inside] @ unit[row]).astype(np.float32)
            order = np.lexsort((inside, -values))[:5]
            assert neighbours[row].tolist() == inside[order].tolist()
            assert similarities[row].tolist() == values[order].tolist()


def test_lists_too_short_for_k_are_made_up_for() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    found = search_lists(build_lists(rows, 40, 0), range(60), 10, 1)
    assert (found[0] >= 0).all() and (found[0] < 60).all()
    assert all(len(set(line)) == 10 for line in found[0].tolist())
    assert search_lists(build_lists(rows[:4], 40, 0), range(4), 10, 1)[0].shape == (4, 3)
    assert search_lists(build_lists(rows[:1], 40, 0), range(1), 10, 1)[0].shape == (1, 0)


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    rows = clustered()
    lists = build_lists(rows, 50, 0, work=tmp_path)
    expected = search_lists(lists, range(100, 3000), 10, 3, memory=1 << 20, work=tmp_path)
    first, *others = sorted(tmp_path.glob("[0-9]*.npy"))
    kept = np.load(others[0])
    first.unlink()
    again = search_lists(lists, range(100, 3000), 10, 3, memory=1 << 20, work=tmp_path)
    np.testing.assert_array_equal(again, expected)
    np.save(others[0], kept[:, ::-1])
    changed = search_lists(lists, range(100, 3000), 10, 3, memory=1 << 20, work=tmp_path)
    assert (changed[0] != expected[0]).any(), "a block that is done is read"


def test_the_size_of_the_catalog_chooses_the_search() -> None:
    rows = clustered(1000)
    exact = search(rows, range(1000), 5)[0]
    for config, approximate in (
        (Knn(k=5, exact_items=1000, num_probes=1), False),
        (Knn(k=5, exact_items=999, num_probes=1), True),
        (Knn(k=5, mode="approx", num_probes=1), True),
        (Knn(k=5, mode="exact", exact_items=0), False),
    ):
        found = find_neighbours(rows, range(1000), config)[0]
        assert np.array_equal(found, exact) is not approximate


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = clustered(400)[:100]
    rows[5, 0] = np.inf
    with pytest.raises(ArtifactError, match="1 of 100 rows are not finite"):
        build_lists(rows, 10, 0)
