"""Nearest neighbours of one shard of the items: `python -m jobs.ml.knn --store URI --run RUN_ID --part 0`.

Leaves `neighbours.npy` int32 and `similarities.npy` float32, both [rows, k]. Killed at any moment, the next attempt
goes on with the block of items it was at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crane_core.knn import use_threads
from crane_core.lists import find_neighbours
from crane_core.matrix import open_matrix
from jobs.ml.device import use_device
from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    device = use_device(job.config.runtime)
    use_threads(job.config.runtime.num_threads)
    config = job.config.knn
    rows = open_matrix(job.input("ml.refine").file("fused_items.npy"))
    num_items, shard = len(rows), int(job.part)
    start, stop = (num_items * (shard + i) // config.num_shards for i in (0, 1))
    neighbours, similarities = find_neighbours(rows, range(start, stop), config, device, job.work)
    np.save(job.out / "neighbours.npy", neighbours)
    np.save(job.out / "similarities.npy", similarities)
    return Result(
        {
            "start": start,
            "stop": stop,
            "num_items": num_items,
            "k": neighbours.shape[1],
            "approximate": config.approximate(num_items),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.knn", run, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
