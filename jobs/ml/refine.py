"""Fit RCA and run the whole catalog through it: `python -m jobs.ml.refine --store URI --run RUN_ID`.

Leaves `items.npy` [num_items, M, d] and `users.npy` [num_users, M, d] refined rows, `fused_items.npy` and
`fused_users.npy` [n, d], the weights `rca.safetensors`, and `fit.json` with the curve and the monitors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import numpy as np
from safetensors.torch import save_file

from crane_core.content import load_modalities
from crane_core.dataset import load_interactions
from crane_core.errors import DataError
from crane_core.monitors import profile_spreads
from crane_core.refine import fit, refine_catalog
from jobs.ml.device import use_device
from jobs.runner import Job, Result, run_stage

logger = logging.getLogger(__name__)


def run(job: Job) -> Result:
    use_device(job.config.runtime)
    config = job.config.refine
    interactions = load_interactions(job.input("etl.interactions"))
    if len(interactions.train.items) == 0:
        raise DataError("There is no training interaction.", "Widen the window or loosen etl.k_core.")
    modalities = load_modalities(job.input("etl.features"), job.input("etl.profiles"))
    refiner, report = fit(modalities, interactions.train, job.config.profiles.aggregate, config)
    items, users, likeness = refine_catalog(refiner, modalities, config.chunk_size)
    for number, cosine in enumerate(likeness):
        logger.info("rows_alike recursion=%d mean_cosine=%.3f", number, cosine)
    np.save(job.out / "items.npy", items.numpy())
    np.save(job.out / "users.npy", users.numpy())
    np.save(job.out / "fused_items.npy", refiner.fuse(items).detach().numpy())
    np.save(job.out / "fused_users.npy", refiner.fuse(users).detach().numpy())
    save_file({name: value.contiguous() for name, value in refiner.state_dict().items()}, job.out / "rca.safetensors")
    report["mean_cosine"] = likeness
    report["profile_spread"] = profile_spreads(modalities)
    (job.out / "fit.json").write_text(json.dumps(report))
    return Result({"modalities": [m.name for m in modalities], "shape": list(items.shape), "mean_cosine": likeness})


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.refine", run, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
