"""kNN: equal to brute force for every way of cutting the work up, ties and degenerate rows included."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from crane_core.errors import ArtifactError
from crane_core.graph import candidates, exact, faiss_search
from crane_core.graph.candidates import pack, unit_rows, unpack
from crane_core.graph.exact import brute_force, nearest, search


def reference(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair in float64, ordered by similarity and then by index."""
    unit = unit_rows(rows).astype(np.float64)
    similarity = np.array([[float((a * b).sum()) for b in unit] for a in unit]).astype(np.float32)
    np.fill_diagonal(similarity, -np.inf)
    order = np.array([np.lexsort((np.arange(len(unit)), -line)) for line in similarity])[:, :k]
    return order, np.take_along_axis(similarity, order, 1)


def make_rows(kind: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(150, 8)).astype(np.float32)
    if kind == "clustered":
        return rows[:10].repeat(15, axis=0) + 0.01 * rows
    if kind == "near_ties":
        return rows[:3].repeat(50, axis=0) + 1e-4 * rows
    if kind == "duplicates":
        return rows[generator.integers(5, size=150)]
    if kind == "some_duplicates":
        rows[40:80] = rows[0]
    if kind == "zeros":
        rows[::3] = 0
    return rows


ALONE = os.environ | {"PYTHONPATH": str(Path(exact.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
KINDS = ["random", "clustered", "near_ties", "duplicates", "some_duplicates", "zeros"]


@pytest.mark.parametrize("top", [faiss_search.top_faiss, exact.top_torch])
@pytest.mark.parametrize("kind", KINDS)
def test_any_sharding_equals_brute_force(kind: str, top: candidates.Top) -> None:
    rows = make_rows(kind)
    expected, expected_similarity = reference(rows, 10)
    for num_shards, memory in ((1, 1 << 30), (2, 200_000), (7, 500_000), (150, 1 << 20)):
        cuts = [len(rows) * i // num_shards for i in range(num_shards + 1)]
        shards = [nearest(rows, range(*cut), 10, memory=memory, top=top) for cut in itertools.pairwise(cuts)]
        neighbours, similarities = unpack(np.concatenate(shards))
        np.testing.assert_array_equal(neighbours, expected)
        np.testing.assert_array_equal(similarities, expected_similarity)
    np.testing.assert_array_equal(brute_force(rows, np.arange(len(rows)), 10, memory=100_000), expected)


def test_few_rows_are_compared_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    everything = candidates.compare_all
    monkeypatch.setattr(candidates, "compare_all", lambda *given: compared.append(len(given[1])) or everything(*given))
    for kind, most in (("random", 0), ("duplicates", 0), ("some_duplicates", 0), ("zeros", 1)):
        rows = np.concatenate([make_rows(kind), 1 + np.random.default_rng(1).normal(size=(100, 8))])
        compared.clear()
        search(rows, range(len(rows)), 5)
        assert sum(compared) <= most, kind


def test_a_dot_product_of_unit_rows_is_exact_in_any_order() -> None:
    generator = np.random.default_rng(0)
    for dim in (3, 64, 1000):
        left, right = unit_rows(generator.normal(size=(2, dim)))
        products = left.astype(np.float64) * right.astype(np.float64)
        orders = {float(np.add.reduce(products[generator.permutation(dim)])) for _ in range(20)}
        assert orders == {float(left.astype(np.float64) @ right.astype(np.float64))}


def test_packed_neighbours_keep_similarity_and_row_and_sort_by_both() -> None:
    similarities = np.array([0.5, -0.25, 0.0, -0.0, 1.0, 0.5, -1.0], dtype=np.float32)
    keys = np.array([7, 1, 5, 4, 2**31 - 2, 3, 0], dtype=np.int32)
    packed = np.sort(pack(torch.from_numpy(similarities), torch.from_numpy(keys)).numpy())
    found, values = unpack(packed)
    assert found.tolist() == [2**31 - 2, 3, 7, 4, 5, 1, 0]
    assert values.tolist() == [1.0, 0.5, 0.5, 0.0, 0.0, -0.25, -1.0]


@pytest.mark.parametrize("top", [faiss_search.top_faiss, exact.top_torch])
def test_candidates_are_the_best_scores(top: candidates.Top) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(size, 8, generator=generator) for size in (70, 333))
    scores = queries @ keys.T
    values, found = top(queries, keys, 15, 50_000)
    torch.testing.assert_close(values, scores.topk(15, dim=1).values)
    torch.testing.assert_close(scores.gather(1, found), values)


def test_queries_and_keys_may_be_some_rows() -> None:
    rows = make_rows("clustered")
    queries, keys = np.array([3, 17, 149]), np.arange(0, 150, 2)
    unit = unit_rows(rows).astype(np.float64)
    similarity = (unit[queries] @ unit[keys].T).astype(np.float32)
    neighbours, _ = search(rows, queries, 4, keys=keys)
    for line, query, values in zip(neighbours, queries, similarity, strict=True):
        order = keys[np.lexsort((keys, -values))]
        assert line.tolist() == order[order != query][:4].tolist()
    halves = [
        nearest(rows, range(150), 6, keys=part, top=faiss_search.top_faiss) for part in (range(70, 150), range(70))
    ]
    merged = unpack(np.sort(np.concatenate(halves, axis=1), axis=1)[:, :6])
    np.testing.assert_array_equal(merged, search(rows, range(150), 6))


def test_fewer_items_than_k() -> None:
    neighbours, similarities = search(np.eye(3, dtype=np.float32), range(3), 10)
    assert neighbours.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert similarities.tolist() == [[0, 0]] * 3


def test_a_shard_without_queries_has_lists_as_long_as_the_others() -> None:
    """More shards than items, and no more items than neighbours."""
    rows = np.eye(3, dtype=np.float32)
    shards = [search(rows, range(3 * s // 7, 3 * (s + 1) // 7), 10) for s in range(7)]
    np.testing.assert_array_equal(np.concatenate([shard[0] for shard in shards]), [[1, 2], [0, 2], [0, 1]])


def test_one_item_has_no_neighbour() -> None:
    neighbours, similarities = search(np.ones((1, 4), dtype=np.float32), range(1), 10)
    assert neighbours.shape == similarities.shape == (1, 0)


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = np.ones((4, 2), dtype=np.float32)
    rows[2, 1] = np.nan
    with pytest.raises(ArtifactError, match="1 of 4 rows are not finite"):
        search(rows, range(2), 1)


SEARCH = """
import os, resource, sys
from pathlib import Path
import numpy as np
from crane_core.graph.exact import search
rows = np.load("rows.npy", mmap_mode="r")
if limit := int(sys.argv[2]):
    search(rows, range(10), 5, keys=range(1000))
    held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
    try:
        np.ones(rows.shape, dtype=np.float32)
    except MemoryError:
        print("the rows do not fit")
work = Path(sys.argv[4]) if sys.argv[4] else None
found = search(rows, range(int(sys.argv[5])), 5, memory=int(sys.argv[3]), work=work)
np.save(sys.argv[1], np.stack([found[0], found[1].view(np.int32)]))
"""


def command(name: str, limit: int, memory: int, work: str, queries: int) -> list[str]:
    return [sys.executable, "-c", SEARCH, f"{name}.npy", str(limit), str(memory), work, str(queries)]


@pytest.mark.slow
def test_rows_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (400_000, 256))
    rows[::200] = np.random.default_rng(0).normal(size=(2000, 256))
    rows.flush()
    for name, limit, memory in (("free", 0, 1 << 30), ("bounded", 250 << 20, 32 << 20)):
        ended = subprocess.run(
            command(name, limit, memory, "", 500), check=True, capture_output=True, text=True, cwd=tmp_path, env=ALONE
        )
        assert ("the rows do not fit" in ended.stdout) == bool(limit)
    np.testing.assert_array_equal(np.load(tmp_path / "bounded.npy"), np.load(tmp_path / "free.npy"))


@pytest.mark.slow
def test_a_search_killed_with_signal_9_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(6000, 64)).astype(np.float32))
    work = tmp_path / "work"
    work.mkdir()
    arguments = (0, 1 << 20, "work", 6000)
    process = subprocess.Popen(command("killed", *arguments), cwd=tmp_path, env=ALONE)
    while len(list(work.glob("*.npy"))) < 3:
        assert process.poll() is None, "the search ended before it was killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in work.glob("*.npy")}
    assert len(done) < -(-6000 // 243)
    subprocess.run(command("killed", *arguments), check=True, cwd=tmp_path, env=ALONE)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was done is not done again"
    found = np.load(tmp_path / "killed.npy")
    expected = search(np.load(tmp_path / "rows.npy"), range(6000), 5)
    np.testing.assert_array_equal(found, np.stack([expected[0], expected[1].view(np.int32)]))
