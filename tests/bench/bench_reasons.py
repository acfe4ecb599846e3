"""Seconds of writing the recommendations, and a whole export, with and without the reasons of every row.

    python -m tests.bench.bench_reasons --users 5000 --items 50000

Rows are normal, histories random, and half of the rows' width decays. Popularity brings next to no row of a list, so
that nearly every row needs a reason: the most there can be to do. Both take turns over the same users. The last line
on stdout is one JSON object: the seconds of the processor (others use the machine, too), and the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from crane_core.config import Export
from crane_core.dataset.interactions import ItemLists
from crane_core.graph.candidates import CPU
from crane_core.model.fold_in import Block, FoldIn, History
from crane_core.serving.export import write_export, write_recommendations
from crane_core.serving.model_folder import Recommender


def recommender(num_users: int, num_items: int, dim: int, mean: int) -> Recommender:
    """Make a model with random rows and histories of geometric lengths."""
    generator = np.random.default_rng(0)
    sizes = generator.geometric(1 / mean, num_users).clip(max=num_items // 2)
    users = np.repeat(np.arange(num_users), sizes)
    pairs = np.unique(users * num_items + generator.integers(0, num_items, len(users)))
    seen = ItemLists.from_pairs(pairs // num_items, pairs % num_items, num_users)
    rows = [generator.standard_normal((size, dim), dtype=np.float32) for size in (num_users, num_items, num_items)]
    ages = generator.uniform(0, 90, len(pairs)).astype(np.float32)
    history = History(seen.users(), seen.items, np.ones(len(pairs), dtype=np.float32), ages)
    ids = [
        pa.chunked_array([[f"{kind}{n}" for n in range(size)]]) for kind, size in (("u", num_users), ("i", num_items))
    ]
    fold_in = FoldIn(rows[2], np.zeros(dim, np.float32), (Block(dim // 2, None, 0.5), Block(dim - dim // 2, 14.0)))
    popularity = np.bincount(seen.items, minlength=num_items).astype(np.float32)
    return Recommender(ids[0], ids[1], ids[1], rows[0], rows[1], seen, popularity, fold_in, history)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=129)
    parser.add_argument("--history", type=int, default=42, help="mean items per user")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    told = recommender(arguments.users, arguments.items, arguments.dim, arguments.history)
    variants = {"without": dataclasses.replace(told, history=None), "with": told}
    seconds = {part: {name: [] for name in variants} for part in ("recommendations", "export")}
    config = Export(k=arguments.k)
    for _ in range(1 + arguments.repeats):
        for name, model in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                write_recommendations(Path(folder) / "lists.parquet", model, arguments.k)
                seconds["recommendations"][name].append(time.process_time() - start)
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                write_export(Path(folder), model, config, CPU)
                seconds["export"][name].append(time.process_time() - start)
    # The first turn warms up.
    best = {part: {name: min(values[1:]) for name, values in times.items()} for part, times in seconds.items()}
    ratios = {part: times["with"] / times["without"] for part, times in best.items()}
    print(json.dumps({"command": " ".join(sys.argv), "seconds": best, "ratio": ratios}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
