"""Milliseconds of one product of the normalised user-item graph with dense rows, by kernel.

    python -m tests.bench.bench_propagation --users 30000 --items 41000 --interactions 800000

Every product is first checked against scipy in float64. Then the kernels take turns; the best time of each counts. The
last line on stdout is one JSON object: `milliseconds` and `max_rel_difference` of each kernel. numba is no dependency
of ours: where it is installed, its kernel is measured too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from crane_core.model.propagation import SymmetricGraph
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, user_item_graph
from tests.bench.device import device_name, synthetic

LIMITS = {"embedding bag, bf16": 0.02}
"""Largest difference to float64 over the largest value; `LIMIT` for all others."""
LIMIT = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=30_000)
    parser.add_argument("--items", type=int, default=41_000)
    parser.add_argument("--interactions", type=int, default=800_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train = synthetic(args.users, args.items, args.interactions).train
    matrix = user_item_graph(Edges(train.users(), train.items), Shards((args.users, args.items)))
    rows = torch.randn(matrix.shape[0], args.dim, generator=torch.Generator().manual_seed(0))
    expected = matrix.astype(np.float64) @ rows.double().numpy()
    largest = np.abs(expected).max()
    products, differences = kernels(matrix, rows, args.threads), {}
    for name, product in products.items():
        found = product()
        found = found.double().numpy() if isinstance(found, Tensor) else found
        differences[name] = float(np.abs(found - expected).max() / largest)
        if not differences[name] < LIMITS.get(name, LIMIT):
            print(f"{name} is off by {differences[name]}.", file=sys.stderr)
            return 1
    seconds = dict.fromkeys(products, float("inf"))
    for _ in range(args.repeats):
        for name, product in products.items():
            started = time.perf_counter()
            product()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    result = {
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "max_rel_difference": differences,
        "interactions": len(train.items),
        "command": "python -m tests.bench.bench_propagation " + " ".join(sys.argv[1:]),
        "device": device_name(torch.device("cpu")),
    }
    print(json.dumps(result))
    return 0


def kernels(matrix: sp.csr_array, rows: Tensor, threads: int) -> dict[str, Callable[[], Tensor | np.ndarray]]:
    """By name, what multiplies the matrix with the rows."""
    dense, places = rows.numpy(), matrix.tocoo()
    coo = torch.sparse_coo_tensor(np.stack([places.row, places.col]), places.data, matrix.shape).coalesce()
    graph = SymmetricGraph(matrix, torch.device("cpu"))
    narrow = rows.bfloat16()

    def csr(width: torch.dtype) -> Tensor:
        arrays = (torch.from_numpy(array).to(width) for array in (matrix.indptr, matrix.indices))
        return torch.sparse_csr_tensor(*arrays, torch.from_numpy(matrix.data), matrix.shape)

    found: dict[str, Callable[[], Tensor | np.ndarray]] = {
        "torch.sparse.mm, COO": partial(torch.sparse.mm, coo, rows),
        "torch CSR (MKL), int32": partial(torch.matmul, csr(torch.int32), rows),
        "torch CSR (MKL), int64": partial(torch.matmul, csr(torch.int64), rows),
        "scipy CSR": lambda: matrix @ dense,
        "embedding bag, float32": lambda: graph.multiply(rows),
        "embedding bag, bf16": lambda: graph.multiply(narrow),
    }
    if threads > 1:
        bounds = np.searchsorted(matrix.indptr, np.linspace(0, matrix.nnz, threads + 1)[1:-1])
        blocks = [matrix[start:stop] for start, stop in zip([0, *bounds], [*bounds, matrix.shape[0]], strict=True)]
        pool = ThreadPoolExecutor(threads)
        found["scipy CSR, blocks of rows on threads"] = lambda: np.concatenate(
            list(pool.map(lambda block: block @ dense, blocks))
        )
    if importlib.util.find_spec("numba"):
        found["numba, rows on threads"] = with_numba(matrix, dense, threads)
    return found


def with_numba(matrix: sp.csr_array, dense: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """The same product, compiled by numba."""
    import numba

    numba.set_num_threads(threads)

    @numba.njit(parallel=True, fastmath=True)
    def multiply(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(indptr) - 1, rows.shape[1]), dtype=np.float32)
        for row in numba.prange(len(out)):
            for entry in range(indptr[row], indptr[row + 1]):
                for column in range(rows.shape[1]):
                    out[row, column] += values[entry] * rows[indices[entry], column]
        return out

    return partial(multiply, matrix.indptr, matrix.indices, matrix.data, dense)


if __name__ == "__main__":
    raise SystemExit(main())
