"""Find the neighbours of one shard of the items: the work of `jobs.ml.knn`."""

from __future__ import annotations

from typing import Any

import numpy as np

from crane_core.graph.faiss_search import use_threads
from crane_core.graph.growth import grow_neighbours
from crane_core.graph.lists import find_neighbours
from crane_core.storage.matrix import open_matrix
from jobs.ml.device import use_device
from jobs.ml.growth import knn_base
from jobs.runner import Job, Result


def run(job: Job) -> Result:
    device = use_device(job.config.runtime)
    use_threads(job.config.runtime.num_threads)
    config = job.config.knn
    rows = open_matrix(job.input("ml.refine").file("fused_items.npy"))
    num_items, shard = len(rows), int(job.part)
    start, stop = (num_items * (shard + i) // config.num_shards for i in (0, 1))
    facts: dict[str, Any] = {"start": start, "stop": stop, "num_items": num_items}
    base = knn_base(job)
    if base is None:
        neighbours, similarities = find_neighbours(rows, range(start, stop), config, device, job.work)
    else:
        grown = grow_neighbours(rows, base, range(start, stop), config, device=device, work=job.work)
        neighbours, similarities = grown.neighbours, grown.similarities
        facts |= {"num_touched": grown.num_touched, "num_searched": grown.num_searched}
    np.save(job.out / "neighbours.npy", neighbours)
    np.save(job.out / "similarities.npy", similarities)
    return Result({**facts, "k": neighbours.shape[1], "approximate": config.approximate(num_items)})
