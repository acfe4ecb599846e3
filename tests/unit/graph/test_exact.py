"""Exact kNN: equal to brute force for every split of the work, with ties and degenerate rows."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crane_core.errors import ArtifactError
from crane_core.graph import candidates, exact, faiss_search
from crane_core.graph.candidates import SearchResources, unit_rows, unpack
from crane_core.graph.exact import brute_force, nearest, search
from tests.worlds.planted import make_rows


def reference(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare every pair in float64; order by similarity and then by index."""
    unit = unit_rows(rows).astype(np.float64)
    similarity = np.array([[float((a * b).sum()) for b in unit] for a in unit]).astype(np.float32)
    np.fill_diagonal(similarity, -np.inf)
    order = np.array([np.lexsort((np.arange(len(unit)), -line)) for line in similarity])[:, :k]
    return order, np.take_along_axis(similarity, order, 1)


ALONE = os.environ | {"PYTHONPATH": str(Path(exact.__file__).parents[2]), "OMP_NUM_THREADS": "1"}

KINDS = ["random", "clustered", "near_ties", "duplicates", "some_duplicates", "zeros"]


@pytest.mark.parametrize("top", [faiss_search.top_faiss, exact.top_torch])
@pytest.mark.parametrize("kind", KINDS)
def test_any_sharding_equals_brute_force(kind: str, top: candidates.Top) -> None:
    rows = make_rows(kind)
    expected, expected_similarity = reference(rows, 10)
    for num_shards, memory in ((1, 1 << 30), (2, 200_000), (7, 500_000), (150, 1 << 20)):
        cuts = [len(rows) * i // num_shards for i in range(num_shards + 1)]
        resources = SearchResources(memory=memory)
        shards = [nearest(rows, range(*cut), 10, resources=resources, top=top) for cut in itertools.pairwise(cuts)]
        neighbours, similarities = unpack(np.concatenate(shards))
        np.testing.assert_array_equal(neighbours, expected)
        np.testing.assert_array_equal(similarities, expected_similarity)
    np.testing.assert_array_equal(brute_force(rows, np.arange(len(rows)), 10, memory=100_000), expected)


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
    """There are more shards than items, and fewer items than neighbours."""
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
from crane_core.graph.candidates import SearchResources
from crane_core.graph.candidates import SearchResources, unit_rows, unpack
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
found = search(rows, range(int(sys.argv[5])), 5, resources=SearchResources(memory=int(sys.argv[3]), work=work))
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
