"""The kNN search beside a peer: time, and recall against brute force.

    python -m tests.bench.bench_knn --items 100000 --mode exact --queries 8192 --shards 4
    python -m tests.bench.bench_knn --items 200000 --mode approx --peers pynndescent faiss_ivf faiss_hnsw
    python -m tests.bench.bench_knn --items 2000000 --dim 128 --queries 1000 --limit-mb 400 --memory-mb 64

The rows look like those of a catalog: clusters of power-law sizes, the directions inside each of falling variance, one
row in fifty a copy of another. They are memory-mapped. The check comes first: an exact search must agree with brute
force in every neighbour of a sample of rows, an approximate one must reach `--min-recall`. The last line on stdout is
one JSON object:

- `seconds`, `recall`: of the search, shard by shard; fitting the lists is included once.
- `peer`, `peer_seconds`, `peer_recall`: in exact mode faiss's flat index used plainly, in turn with the search shard
  by shard, so that what else the machine does burdens both. In approximate mode the slowest to beat: the fastest peer
  whose recall is at least that of the search, else the one with the best recall; `peers` has all of them.
- `cpu_seconds`, `peer_cpu_seconds`: time of the processor, for a machine that others use too.
- `limit_bytes`, with `--limit-mb`: what the process was allowed beyond its libraries (RLIMIT_DATA, which counts
  anonymous memory), less than the features of `feature_bytes`. No peer runs then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from crane_core.graph.candidates import SearchResources, unit_rows
from crane_core.graph.exact import brute_force, search
from crane_core.graph.faiss_search import use_threads
from crane_core.graph.lists import build_lists, search_lists
from tests.bench.device import origin, status_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--queries", type=int, help="rows searched for; all when absent")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--mode", choices=["exact", "approx"], default="exact")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-lists", type=int)
    parser.add_argument("--num-probes", type=int, nargs="+", default=[8])
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=["pynndescent"])
    parser.add_argument("--min-recall", type=float, default=0.95)
    parser.add_argument("--sample", type=int, default=300, help="rows compared with brute force")
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--limit-mb", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    result |= origin("bench_knn", torch.device(args.device))
    result["versions"]["faiss"] = faiss.__version__
    print(json.dumps(result))
    return 0


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = write_rows(folder / "rows.npy", args.items, args.dim)
    num_queries = args.queries or args.items
    cuts = [num_queries * i // args.shards for i in range(args.shards + 1)]
    shards = [range(*cut) for cut in itertools.pairwise(cuts)]
    sample = np.sort(np.random.default_rng(1).choice(num_queries, min(args.sample, num_queries), replace=False))
    truth = brute_force(rows, sample, args.k)
    memory = args.memory_mb << 20
    result: dict[str, Any] = {"items": args.items, "queries": num_queries, "feature_bytes": rows.nbytes}
    if args.limit_mb:
        search(rows, range(100), args.k, keys=range(1000))
        held = status_bytes("/proc/self/status", "VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (held + (args.limit_mb << 20), -1))
        result["limit_bytes"] = args.limit_mb << 20
    if args.mode == "exact":
        device = torch.device(args.device)
        flat = None if args.limit_mb else faiss.IndexFlatIP(args.dim)
        clocks = {"": Clock(), "peer_": Clock()}
        found, peers = [], []
        if flat:
            with clocks["peer_"]:
                unit = unit_rows(rows)
                flat.add(unit)
        for shard in shards:
            with clocks[""]:
                found.append(search(rows, shard, args.k, resources=SearchResources(device, memory))[0])
            if flat:
                with clocks["peer_"]:
                    peers.append(flat.search(unit[shard.start : shard.stop], args.k + 1)[1])
        result |= {"seconds": clocks[""].seconds, "cpu_seconds": clocks[""].cpu_seconds}
        result["recall"] = recall(np.concatenate(found)[sample], truth)
        if result["recall"] < 1:
            raise SystemExit(f"The search is wrong: recall {result['recall']} against brute force.")
        result |= {"peer": None, "peer_seconds": None, "peer_recall": None}
        if flat:
            result["peer"] = "faiss IndexFlatIP"
            result |= {"peer_seconds": clocks["peer_"].seconds, "peer_cpu_seconds": clocks["peer_"].cpu_seconds}
            result["peer_recall"] = recall(without_self(np.concatenate(peers)[sample], sample, args.k), truth)
        return result
    attempts = {}
    with Clock() as fitting:
        lists = build_lists(rows, args.num_lists, 0, memory, folder)
    for num_probes in args.num_probes:
        with Clock() as clock:
            found = [search_lists(lists, shard, args.k, num_probes, memory=memory)[0] for shard in shards]
        attempts[f"num_probes={num_probes}"] = {
            "seconds": fitting.seconds + clock.seconds,
            "cpu_seconds": fitting.cpu_seconds + clock.cpu_seconds,
            "recall": recall(np.concatenate(found)[sample], truth),
        }
        print(json.dumps(attempts), file=sys.stderr)
    result |= {"lists_seconds": fitting.seconds, "attempts": attempts}
    enough = [each for each in attempts.values() if each["recall"] >= args.min_recall]
    if not enough:
        raise SystemExit(f"Recall is below {args.min_recall}: {attempts}.")
    result |= min(enough, key=lambda each: each["seconds"])
    measured: dict[str, Any] = {}
    unit = None if args.limit_mb else unit_rows(rows)
    for peer in args.peers if unit is not None else ():
        for setting, build in PEERS[peer](unit, args.k, args.threads).items():
            with Clock() as clock:
                neighbours = build()
            measured[f"{peer} {setting}"] = {
                "seconds": clock.seconds,
                "cpu_seconds": clock.cpu_seconds,
                "recall": recall(without_self(neighbours[sample], sample, args.k), truth),
            }
            print(json.dumps(measured), file=sys.stderr)
    result["peers"] = measured
    better = {name: each for name, each in measured.items() if each["recall"] >= result["recall"]}
    peer = (
        min(better, key=lambda name: better[name]["seconds"])
        if better
        else max(measured, key=lambda name: measured[name]["recall"], default=None)
    )
    result["peer"] = peer
    for key in ("seconds", "cpu_seconds", "recall"):
        result[f"peer_{key}"] = measured[peer][key] if peer else None
    return result


def write_rows(path: Path, num_rows: int, dim: int, num_clusters: int = 1000) -> np.ndarray:
    """Write the rows, float32 [num_rows, dim], and map them."""
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, num_clusters + 1)
    cluster = generator.choice(num_clusters, size=num_rows, p=share / share.sum())
    centres = generator.normal(size=(num_clusters, dim)).astype(np.float32)
    bases = [np.linalg.qr(generator.normal(size=(dim, dim)))[0].astype(np.float32) for _ in range(num_clusters)]
    scale = (1.5 * np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, dim))
    for start in range(0, num_rows, 65536):
        labels = cluster[start : start + 65536]
        block = centres[labels]
        for each in np.unique(labels):
            members = np.flatnonzero(labels == each)
            block[members] += (generator.standard_normal((len(members), dim), np.float32) * scale) @ bases[each]
        copied = generator.choice(len(labels), size=len(labels) // 50, replace=False)
        block[copied] = block[generator.integers(len(labels), size=len(copied))]
        rows[start : start + 65536] = block
    rows.flush()
    return np.load(path, mmap_mode="r")


class Clock:
    """Adds up the seconds spent inside, and those of the processor."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Clock:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]


def recall(neighbours: np.ndarray, truth: np.ndarray) -> float:
    return float((neighbours[:, :, None] == truth[:, None, :]).any(axis=2).mean())


def without_self(neighbours: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The first k of k + 1 that are not the query itself."""
    return np.stack([line[line != query][:k] for line, query in zip(neighbours, queries, strict=True)])


Build = Callable[[], np.ndarray]


def pynndescent(unit: np.ndarray, k: int, threads: int) -> dict[str, Build]:
    import numba
    from pynndescent import NNDescent

    numba.set_num_threads(threads)

    def build(rows: np.ndarray, num_neighbours: int) -> np.ndarray:
        index = NNDescent(rows, metric="cosine", n_neighbors=num_neighbours, n_jobs=threads, random_state=0)
        return index.neighbor_graph[0][:, : k + 1]

    build(unit[:3000], k + 1)  # compiles
    return {f"n_neighbors={count}": lambda count=count: build(unit, count) for count in (k + 1, 2 * k, 3 * k)}


def faiss_ivf(unit: np.ndarray, k: int, threads: int) -> dict[str, Build]:
    def build(num_probes: int) -> np.ndarray:
        num_lists = round(2 * len(unit) ** 0.5)
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(unit.shape[1]), unit.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT
        )
        index.train(unit[np.random.default_rng(0).choice(len(unit), min(len(unit), 48 * num_lists), replace=False)])
        index.add(unit)
        index.nprobe = num_probes
        return index.search(unit, k + 1)[1]

    return {f"nprobe={count}": lambda count=count: build(count) for count in (8, 16)}


def faiss_ivfpq(unit: np.ndarray, k: int, threads: int) -> dict[str, Build]:
    def build(num_probes: int) -> np.ndarray:
        index = faiss.index_factory(
            unit.shape[1],
            f"IVF{round(2 * len(unit) ** 0.5)},PQ{unit.shape[1] // 2}x4fs,RFlat",
            faiss.METRIC_INNER_PRODUCT,
        )
        index.train(unit)
        index.add(unit)
        index.k_factor = 4
        faiss.extract_index_ivf(index.base_index).nprobe = num_probes
        return index.search(unit, k + 1)[1]

    return {f"nprobe={count}": lambda count=count: build(count) for count in (16, 32)}


def faiss_hnsw(unit: np.ndarray, k: int, threads: int) -> dict[str, Build]:
    def build(depth: int) -> np.ndarray:
        index = faiss.IndexHNSWFlat(unit.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = index.hnsw.efSearch = depth
        index.add(unit)
        return index.search(unit, k + 1)[1]

    return {f"ef={count}": lambda count=count: build(count) for count in (40,)}


def faiss_nndescent(unit: np.ndarray, k: int, threads: int) -> dict[str, Build]:
    def build(size: int) -> np.ndarray:
        index = faiss.IndexNNDescentFlat(unit.shape[1], size, faiss.METRIC_L2)
        index.add(unit)
        graph = faiss.vector_to_array(index.nndescent.final_graph).reshape(len(unit), -1)
        return np.concatenate([np.arange(len(unit))[:, None], graph[:, :k]], axis=1)

    return {f"K={count}": lambda count=count: build(count) for count in (32,)}


PEERS = {each.__name__: each for each in (pynndescent, faiss_ivf, faiss_ivfpq, faiss_hnsw, faiss_nndescent)}


if __name__ == "__main__":
    raise SystemExit(main())
