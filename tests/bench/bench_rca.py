"""RCA over a whole catalog: time, memory and error of each phi, beside the matmul floor and the naive form.

    python -m tests.bench.bench_rca --items 20000 --kernel softmax

The data are normal rows, or with `--clusters` normal rows around that many centres, some far more often than others,
as embeddings of a catalog are. The weights are those of a fresh model. The first run warms up and is checked: after
every recursion a sample of rows is computed again in float64 from the rows the recursion started with. The last line
on stdout is one JSON object:

- `seconds`: all recursions over all items and users, best of `--repeats`.
- `peak_bytes`: beyond the rows, which are refined in place, and the weights. On a CPU the growth of the resident
  set (VmHWM of Linux, reset before the run), on CUDA that of the allocator. It includes one recursion's joint rows,
  `key_bytes` (`linear` and `landmark` hold them for a moment only, `block` twice); the rest follows the chunk size.
- `max_rel_error`: largest error of the attention's output over its largest value, against float64 softmax, tanh
  or linear over every key. `own_rel_error` is that against the form's own definition: for `block` and `landmark`
  over the same keys only. `rows_rel_error` is that of the refined rows, residual included, by its own definition.
  `rms_rel_error` is the first one as root mean squares instead of largest values.
- `naive_seconds`: rows x items in memory, softmax for the sparse forms; null where it does not fit, or was not asked.
- `gemm_floor_seconds`: the same floating point operations as plain products into buffers that stay in the cache.
- `cpu_seconds`, `gemm_floor_cpu_seconds`: the same as time of the processor, for a machine that others use too.
- `backward`: with `--backward`, forward and backward of the attention of one modality in one pass: `seconds`,
  `cpu_seconds`, `peak_bytes` with output and gradients, `naive_seconds` and `naive_peak_bytes` of autograd through the
  dense form, `gemm_floor_cpu_seconds` of the seven products of softmax and tanh, and the `rel_error` of the gradients
  of a sample of queries and of all keys under them.
- `files`: with `--files`, the same recursions behind a projection as `ml.refine` runs them, from memory-mapped
  features to files: `seconds`, `peak_bytes` of anonymous memory beyond what was held before, `row_bytes` of the rows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crane_core.config import Refine
from crane_core.dataset.modalities import Modality
from crane_core.refine.attention import Correlation, GramKeys, Keys, ListedKeys, attend
from crane_core.refine.catalog import refine_rows, refine_to_files
from crane_core.refine.recursion import Recursion, RecursiveCrossModalAttention
from crane_core.refine.refiner import Refiner
from crane_core.storage.matrix import open_matrix
from tests.bench.device import free_bytes, measure, origin, status_bytes

OWN_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error against its own definition that a run passes with, by precision."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--kernel", choices=["softmax", "tanh", "linear", "block", "landmark"], default="softmax")
    parser.add_argument("--recursions", type=int, default=3)
    parser.add_argument("--modalities", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-lists", type=int)
    parser.add_argument("--num-probes", type=int, default=8)
    parser.add_argument("--landmarks", type=int)
    parser.add_argument("--chunk-size", type=int, default=16384)
    parser.add_argument("--precision", choices=list(OWN_LIMIT), default="float32")
    parser.add_argument("--clusters", type=int, help="centres of the data; none when absent")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--no-naive", dest="naive", action="store_false")
    parser.add_argument("--sample", type=int, default=200, help="rows checked in float64")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, help="torch's choice when absent")
    args = parser.parse_args()
    if args.backward and args.kernel not in ("softmax", "tanh"):
        parser.error("--backward measures softmax and tanh")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    correlation = Correlation(args.kernel, args.num_lists, args.num_probes, args.landmarks, precision=args.precision)
    rca = RecursiveCrossModalAttention(args.modalities, args.dim, args.recursions, correlation, generator).to(device)
    items, users = (rows.to(device) for rows in make_rows(args, generator))

    errors, pairs = check(rca, items.clone(), users.clone(), args)
    limit = OWN_LIMIT[args.precision]
    if not errors["own_rel_error"] < limit or not errors["rows_rel_error"] < limit:
        print(f"The result is wrong: {errors}, expected below {limit}.", file=sys.stderr)
        return 1
    runs, floors = [], []
    edges = fastest_edges(device, args.dim)
    for _ in range(args.repeats):  # in turn, so that what else the machine does burdens both
        rows = items.clone(), users.clone()
        runs.append(measure(device, lambda rows=rows: exhaust(rca, *rows, args.chunk_size)))
        floors.append(measure(device, lambda: matmuls(rca, items, users, pairs, edges)))
    naive = None
    if args.naive and 3 * 4 * max(args.items, args.users) * args.items < free_bytes(device) / 2:
        naive = measure(device, lambda: run_naively(rca, items.clone(), users.clone()))[0]
    result = {
        "seconds": min(seconds for seconds, _, _ in runs),
        "cpu_seconds": min(seconds for _, seconds, _ in runs),
        "peak_bytes": max(peak for _, _, peak in runs),
        "key_bytes": items[0, 0].nbytes * args.items,
        **errors,
        "naive_seconds": naive,
        "gemm_floor_seconds": min(seconds for seconds, _, _ in floors),
        "gemm_floor_cpu_seconds": min(seconds for _, seconds, _ in floors),
        "pairs": pairs,
        "backward": backward(items, correlation, edges, limit, args) if args.backward else None,
        "files": to_files(items, users, device, args) if args.files else None,
        **origin("bench_rca", device),
    }
    print(json.dumps(result))
    return 0


def make_rows(args: argparse.Namespace, generator: torch.Generator) -> list[Tensor]:
    """Items and users, float32 [n, M, d]; users lie between two clusters."""
    shape = (args.modalities, args.dim)
    noise = [torch.randn(count, *shape, generator=generator) for count in (args.items, args.users)]
    if not args.clusters:
        return noise
    centres = torch.randn(args.clusters, *shape, generator=generator)
    shares = 1 / torch.arange(1, args.clusters + 1) ** 0.8

    def drawn(count: int) -> Tensor:
        return centres[torch.multinomial(shares, count, replacement=True, generator=generator)]

    items, users = drawn(args.items), (drawn(args.users) + drawn(args.users)) / 2
    return [items.add_(noise[0], alpha=0.5), users.add_(noise[1], alpha=0.5)]


def backward(
    items: Tensor, correlation: Correlation, edges: tuple[int, int], limit: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Forward and backward of the attention of the first modality to its own rows, times and error."""
    rows = items[:, 0].contiguous()
    picked = rows[torch.linspace(0, len(rows) - 1, min(args.sample, len(rows))).long()]
    weights = torch.randn_like(rows)

    def gradients(
        form: Callable[[Tensor, Tensor], Tensor], queries: Tensor, keys: Tensor, incoming: Tensor
    ) -> tuple[Tensor, Tensor]:
        queries, keys = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        form(queries, keys).backward(incoming)
        assert queries.grad is not None
        assert keys.grad is not None
        return queries.grad, keys.grad

    def tiled(queries: Tensor, keys: Tensor) -> Tensor:
        return attend(queries, keys, correlation, args.chunk_size)

    def dense(queries: Tensor, keys: Tensor) -> Tensor:
        return normalised(queries @ keys.T / keys.shape[1] ** 0.5, correlation.phi) @ keys

    incoming = weights[: len(picked)]
    found = gradients(tiled, picked, rows, incoming)
    expected = gradients(dense, picked.double(), rows.double(), incoming.double())
    error = max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))
    if not error < limit:
        raise ValueError(f"The gradients are wrong: relative error {error}, expected below {limit}.")
    seconds, cpu_seconds, peak = measure(items.device, lambda: gradients(tiled, rows, rows, weights))
    _, floor, _ = measure(items.device, lambda: score_products(items.device, args.dim, 7 * len(rows) ** 2 // 2, edges))
    naive: tuple[float | None, ...] = (None, None, None)
    if args.naive and 5 * 4 * len(rows) ** 2 < free_bytes(items.device) / 2:
        naive = measure(items.device, lambda: gradients(dense, rows, rows, weights))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "naive_seconds": naive[0],
        "naive_peak_bytes": naive[2],
        "gemm_floor_cpu_seconds": floor,
        "rel_error": error,
    }


def to_files(items: Tensor, users: Tensor, device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    config = Refine(
        embedding_dim=args.dim, phi=args.kernel, num_lists=args.num_lists, num_probes=args.num_probes,
        num_attention_landmarks=args.landmarks, num_recursions=args.recursions, chunk_size=args.chunk_size,
        precision=args.precision,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder, modalities = Path(name), []
        for number in range(args.modalities):
            for kind, rows in (("items", items), ("users", users)):
                np.save(folder / f"{kind}{number}.npy", rows[:, number].cpu().numpy())
            features, profiles = (open_matrix(folder / f"{kind}{number}.npy") for kind in ("items", "users"))
            present, counts = np.ones(len(items), dtype=bool), np.ones(len(users), dtype=np.int32)
            modalities.append(Modality(str(number), features, present, profiles, counts))
        refiner = Refiner([args.dim] * args.modalities, [1.0] * args.modalities, config).to(device)
        ctypes.CDLL(None).malloc_trim(0)
        before, highest, ended = status_bytes("/proc/self/status", "RssAnon"), [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                highest[0] = max(highest[0], status_bytes("/proc/self/status", "RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        refine_to_files(refiner, modalities, args.chunk_size, folder / "work")
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
    return {"seconds": seconds, "peak_bytes": highest[0] - before, "row_bytes": items.nbytes + users.nbytes}


def exhaust(rca: RecursiveCrossModalAttention, items: Tensor, users: Tensor, chunk_size: int) -> None:
    for _ in refine_rows(rca, items, users, chunk_size):
        pass


@torch.no_grad()
def check(
    rca: RecursiveCrossModalAttention, items: Tensor, users: Tensor, args: argparse.Namespace
) -> tuple[dict[str, float], int]:
    """Errors, and the (query, key) pairs the form computes in all."""
    worst = dict.fromkeys(("max_rel_error", "own_rel_error", "rows_rel_error", "rms_rel_error"), 0.0)
    pairs = 0
    picked = torch.linspace(0, args.items - 1, min(args.sample, args.items)).long().to(items.device)
    steps = refine_rows(rca, items, users, args.chunk_size)
    for recursion in rca.recursions:
        assert isinstance(recursion, Recursion)
        before, users_before = items.clone(), users.clone()
        keys = next(steps)
        exact = before.flatten(1).double() @ recursion.joint.double() + recursion.joint_bias.double()
        for modality in range(args.modalities):
            queries = before[picked, modality] @ recursion.correlation[modality]
            queries64 = before[picked, modality].double() @ recursion.correlation[modality].double()
            scores = queries64 @ exact.T / args.dim**0.5
            full = normalised(scores, rca.correlation.phi) @ exact
            seen = seen_by(keys, queries, rca, len(exact))
            own = full if seen is None else torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=1) @ exact
            found = keys.attend(queries, args.chunk_size)
            refined = before[picked, modality].double() + torch.relu(own @ recursion.hidden[modality].double())
            for name, value, expected in (
                ("max_rel_error", found, full),
                ("own_rel_error", found, own),
                ("rows_rel_error", items[picked, modality], refined),
            ):
                error = float((value - expected).abs().max() / expected.abs().max())
                worst[name] = max(worst[name], error)
            rms = float((found - full).norm() / full.norm())
            worst["rms_rel_error"] = max(worst["rms_rel_error"], rms)
            for rows in (before, users_before):
                pairs += count_pairs(keys, rows[:, modality] @ recursion.correlation[modality])
    return worst, pairs


def normalised(scores: Tensor, phi: str) -> Tensor:
    if phi == "tanh":
        return torch.tanh(scores) / scores.shape[1]
    return scores / scores.shape[1] if phi == "linear" else torch.softmax(scores, dim=1)


def seen_by(keys: Keys, queries: Tensor, rca: RecursiveCrossModalAttention, num_keys: int) -> Tensor | None:
    """bool [n, num_keys], the keys each query attends to; None when it is all."""
    if isinstance(keys, ListedKeys):
        cells = torch.empty_like(keys.order)
        for cell in range(len(keys.means)):
            cells[keys.order[keys.bounds[cell] : keys.bounds[cell + 1]]] = cell
        return torch.stack([torch.isin(cells, lists) for lists in keys.nearest(queries)])
    if rca.correlation.phi == "landmark":
        size = len(vars(keys)["keys"])
        seen = torch.zeros(num_keys, dtype=torch.bool, device=queries.device)
        seen[torch.randperm(num_keys, generator=torch.Generator().manual_seed(rca.correlation.seed))[:size]] = True
        return seen.expand(len(queries), -1)
    return None


def count_pairs(keys: Keys, queries: Tensor) -> int:
    if isinstance(keys, GramKeys):
        return 0
    if isinstance(keys, ListedKeys):
        sizes = torch.tensor(keys.bounds, device=queries.device).diff()
        return int(sizes[keys.nearest(queries)].sum())
    return len(queries) * len(vars(keys)["keys"])


@torch.no_grad()
def matmuls(
    rca: RecursiveCrossModalAttention, items: Tensor, users: Tensor, pairs: int, edges: tuple[int, int]
) -> None:
    """The products RCA consists of and nothing else, scores in one buffer of [edges]."""
    score_products(items.device, items.shape[2], pairs, edges)
    phi = rca.correlation.phi
    for recursion in rca.recursions:
        assert isinstance(recursion, Recursion)
        keys = items.flatten(1) @ recursion.joint
        if phi == "linear":
            gram = keys.T @ keys
        for rows in (users, items):
            for part in rows.split(16384):
                queries = part.transpose(0, 1) @ recursion.correlation
                if phi == "linear":
                    queries = queries @ gram
                queries @ recursion.hidden


def score_products(device: torch.device, dim: int, pairs: int, edges: tuple[int, int]) -> None:
    left, right = (torch.randn(edge, dim, device=device) for edge in edges)
    scores, total = torch.empty(*edges, device=device), torch.zeros_like(left)
    for _ in range(round(pairs / (edges[0] * edges[1]))):
        torch.mm(left, right.T, out=scores)
        total.addmm_(scores, right)


def fastest_edges(device: torch.device, dim: int) -> tuple[int, int]:
    candidates = [(512 * torch.get_num_threads(), 256), (1024, 512), (2048, 1024)]
    if device.type == "cuda":
        candidates = [(4096, 4096), (8192, 8192)]
    trials = [
        min(measure(device, lambda edges=edges: score_products(device, dim, 2**25, edges))[0] for _ in range(3))
        for edges in candidates
    ]
    return candidates[trials.index(min(trials))]


@torch.no_grad()
def run_naively(rca: RecursiveCrossModalAttention, items: Tensor, users: Tensor) -> None:
    for recursion in rca.recursions:
        assert isinstance(recursion, Recursion)
        keys = recursion.joint_rows(items)
        for rows in (users, items):
            for modality in range(rows.shape[1]):
                scores = rows[:, modality] @ recursion.correlation[modality] @ keys.T / keys.shape[1] ** 0.5
                attended = normalised(scores, rca.correlation.phi) @ keys
                rows[:, modality] += torch.relu(attended @ recursion.hidden[modality])


if __name__ == "__main__":
    raise SystemExit(main())
