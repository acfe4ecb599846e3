"""Fit RCA and run the whole catalog through it: `python -m jobs.ml.refine --store URI --run RUN_ID`.

Leaves `items.npy` [num_items, M, d] and `users.npy` [num_users, M, d] refined rows, `fused_items.npy` and
`fused_users.npy` [n, d], the weights `rca.safetensors`, and `fit.json` with the curve and the monitors.

Killed at any moment, the next attempt repeats at most the fit, or the chunks of `refine.chunk_size` rows that the
ranks were at: what is written stays in the work folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.elastic.multiprocessing.errors import record

from crane_core.config import RunConfig
from crane_core.content import load_modalities
from crane_core.dataset import load_interactions
from crane_core.errors import DataError
from crane_core.matrix import open_matrix
from crane_core.monitors import profile_spreads
from crane_core.refine import Refiner, fit, refine_to_files, refined_files
from crane_core.storage.local import LocalStorage
from crane_core.tensors import load_tensors
from jobs.ml.device import use_device
from jobs.ml.launch import on_ranks, rank
from jobs.runner import Job, Result, open_store, run_stage

logger = logging.getLogger(__name__)


def run(job: Job) -> Result:
    config = job.config.refine
    modalities = load_modalities(job.input("etl.features"), job.input("etl.profiles"))
    fit_once(job)
    on_ranks(_refine_rank, job)
    likeness = json.loads((job.work / "likeness.json").read_text())
    for number, cosine in enumerate(likeness):
        logger.info("rows_alike recursion=%d mean_cosine=%.3f", number, cosine)
    refiner = load_refiner(job.config, [m.items.shape[1] for m in modalities], job.work)
    for name, path in refined_files(job.work, config.num_recursions).items():
        # A second name and no copy: killed before the artifact is published, the work is still whole.
        (job.out / f"{name}.npy").hardlink_to(path)
        fuse(refiner, path, job.out / f"fused_{name}.npy", config.chunk_size)
    shutil.copy(job.work / "rca.safetensors", job.out)
    report = json.loads((job.work / "fit.json").read_text())
    report |= {"mean_cosine": likeness, "profile_spread": profile_spreads(modalities)}
    (job.out / "fit.json").write_text(json.dumps(report))
    shape = [len(modalities[0].items), len(modalities), config.embedding_dim]
    return Result({"modalities": [m.name for m in modalities], "shape": shape, "mean_cosine": likeness})


def fit_once(job: Job) -> None:
    """Leave `rca.safetensors` and `fit.json` in the work folder, unless an earlier attempt has."""
    if (job.work / "fit.json").exists():
        logger.info("resume the fit is done")
        return
    interactions = load_interactions(job.input("etl.interactions"))
    if len(interactions.train.items) == 0:
        raise DataError("There is no training interaction.", "Widen the window or loosen etl.k_core.")
    modalities = load_modalities(job.input("etl.features"), job.input("etl.profiles"))
    device = use_device(job.config.runtime)
    refiner, report = fit(modalities, interactions.train, job.config.profiles.aggregate, job.config.refine, device)
    weights = {name: value.cpu().contiguous() for name, value in refiner.state_dict().items()}
    save_file(weights, job.work / "rca.safetensors")
    LocalStorage(job.work).write("fit.json", json.dumps(report).encode())


def load_refiner(config: RunConfig, dims: list[int], work: Path) -> Refiner:
    """The fitted refiner."""
    refiner = Refiner(dims, [1.0] * len(dims), config.refine)
    refiner.load_state_dict(load_tensors(work / "rca.safetensors"))
    return refiner.eval()


@record
def _refine_rank(store_uri: str, run_id: str, config: RunConfig, work: Path) -> None:
    """What every rank does with its share of the catalog."""
    with rank(config.runtime) as device:
        store = open_store(store_uri)
        modalities = load_modalities(store.artifact(run_id, "etl.features"), store.artifact(run_id, "etl.profiles"))
        refiner = load_refiner(config, [m.items.shape[1] for m in modalities], work).to(device)
        likeness = refine_to_files(refiner, modalities, config.refine.chunk_size, work)
        if not dist.is_initialized() or dist.get_rank() == 0:
            LocalStorage(work).write("likeness.json", json.dumps(likeness).encode())


@torch.no_grad()
def fuse(refiner: Refiner, source: Path, target: Path, chunk_size: int) -> None:
    """Fuse rows of a file into another, [n, M, d] to [n, d], a chunk at a time."""
    num_rows = len(open_matrix(source))
    np.lib.format.open_memmap(target, "w+", np.float32, (num_rows, refiner.fusion.shape[1]))
    for start in range(0, num_rows, chunk_size):
        part = slice(start, start + chunk_size)
        rows = torch.from_numpy(np.array(open_matrix(source)[part]))
        np.load(target, mmap_mode="r+")[part] = refiner.fuse(rows).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.refine", run, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
