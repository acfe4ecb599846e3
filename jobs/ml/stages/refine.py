"""Fit RCA and run the whole catalog through it: the work of `jobs.ml.refine`."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crane_core.config import RunConfig
from crane_core.dataset.interactions import load_interactions
from crane_core.dataset.modalities import Modality, load_modalities, profile_spreads
from crane_core.errors import DataError
from crane_core.graph.drift import drift
from crane_core.ranks import ranks
from crane_core.refine.attention import Keys
from crane_core.refine.catalog import keys_file, refine_to_files, refined_files
from crane_core.refine.fit import fit
from crane_core.refine.fitted import WEIGHTS, fuse_file, load_refiner, save_refiner
from crane_core.refine.growth import Anchors, Base, load_selected, outgrown, overlay, touched, write_selected
from crane_core.storage.local import LocalStorage
from crane_core.storage.matrix import open_matrix
from jobs.ml.device import use_device
from jobs.ml.growth import refine_base
from jobs.ml.launch import on_ranks, rank
from jobs.runner import Job, Result
from jobs.stores import open_store

logger = logging.getLogger(__name__)


def run(job: Job) -> Result:
    config = job.config.refine
    modalities = load_modalities(job.input("etl.features"), job.input("etl.profiles"))
    base = refine_base(job, modalities)
    growth = grow(job, base, modalities) if base else None
    if growth is None:
        build(job, modalities)
    report = json.loads((job.out / "fit.json").read_text())
    report |= {"profile_spread": profile_spreads(modalities)}
    (job.out / "fit.json").write_text(json.dumps(report))
    shape = [len(modalities[0].items), len(modalities), config.embedding_dim]
    facts = {"modalities": [m.name for m in modalities], "shape": shape, "mean_cosine": report["mean_cosine"]}
    return Result(facts | ({"growth": growth} if growth else {}))


def build(job: Job, modalities: list[Modality]) -> None:
    """Fit RCA and refine the whole catalog."""
    config = job.config.refine
    fit_once(job)
    on_ranks(_refine_rank, job, None)
    likeness = json.loads((job.work / "likeness.json").read_text())
    for number, cosine in enumerate(likeness):
        logger.info("rows_alike recursion=%d mean_cosine=%.3f", number, cosine)
    refiner = load_refiner(_dims(modalities), config, job.work)
    for name, path in refined_files(job.work, config.num_recursions).items():
        # A hard link and no copy: the work folder stays complete if the job is killed before it publishes.
        (job.out / f"{name}.npy").hardlink_to(path)
        fuse_file(refiner, path, job.out / f"fused_{name}.npy", config.chunk_size)
    shutil.copy(job.work / WEIGHTS, job.out)
    report = json.loads((job.work / "fit.json").read_text()) | {"mean_cosine": likeness}
    (job.out / "fit.json").write_text(json.dumps(report))
    if config.max_drift > 0:
        for number in range(1, config.num_recursions + 1):
            keys_file(job.out, number).hardlink_to(keys_file(job.work, number))
        Anchors.choose(refiner, modalities, config.seed).write(job.out)


def grow(job: Job, base: Base, modalities: list[Modality]) -> dict[str, Any] | None:
    """Keep the rows that stay the same and refine the others; None beyond the limits of change and drift.

    Returns:
        `drift`, and how many items and users were refined.
    """
    config, run_id = job.config.refine, job.config.etl.base_run
    num_rows = {"items": len(modalities[0].items), "users": len(modalities[0].profiles)}
    rows = touched(base.modalities, modalities)
    counts = {"num_items": len(rows.items), "num_users": len(rows.users)}
    if outgrown(rows.items, len(base.modalities[0].items), base.num_built, num_rows["items"]):
        logger.warning("build_anew base=%s %s total=%d num_built=%d", run_id, counts, num_rows["items"], base.num_built)
        return None
    refiner = load_refiner(_dims(modalities), config, base.refined.path)
    found = drift(refiner, Anchors.load(base), modalities, job.config.knn.k, config.chunk_size)
    logger.info("grow base=%s drift=%.4f %s", run_id, found, counts)
    if found > config.max_drift:
        logger.warning("build_anew drift=%.4f max_drift=%.4f", found, config.max_drift)
        return None
    shutil.copy(base.refined.file(WEIGHTS), job.work)
    write_selected(modalities, rows, job.work / "touched")
    keys = [keys_file(base.refined.path, number) for number in range(1, config.num_recursions + 1)]
    on_ranks(_refine_rank, job, keys)
    for name, path in refined_files(job.work, config.num_recursions).items():
        fused = job.work / f"fused-{name}.npy"
        fuse_file(refiner, path, fused, config.chunk_size)
        for made, target in ((path, f"{name}.npy"), (fused, f"fused_{name}.npy")):
            overlay(base.refined.file(target), getattr(rows, name), made, num_rows[name], job.out / target)
    base.copy_fit(job.out, config.num_recursions)
    return {"base": run_id, "drift": found, "num_built": base.num_built, **counts}


def fit_once(job: Job) -> None:
    """Leave `rca.safetensors` and `fit.json` in the work folder, unless an earlier attempt has."""
    if (job.work / "fit.json").exists():
        logger.info("resume the fit is done")
        return
    interactions = load_interactions(job.input("etl.interactions"))
    if len(interactions.train.items) == 0:
        raise DataError("There is no training interaction.", "Set window.start earlier or etl.k_core lower.")
    modalities = load_modalities(job.input("etl.features"), job.input("etl.profiles"))
    device = use_device(job.config.runtime)
    aggregate = job.config.profiles.aggregate
    refiner, report = fit(
        modalities, interactions.train, aggregate, job.config.refine, device, weights=interactions.weights
    )
    save_refiner(refiner, job.work)
    LocalStorage(job.work).write("fit.json", json.dumps(report).encode())


def _refine_rank(store_uri: str, run_id: str, config: RunConfig, work: Path, keys: list[Path] | None) -> None:
    """Refine one rank's share of the catalog, or of the selected rows if keys are given."""
    with rank(config.runtime) as device:
        store = open_store(store_uri)
        modalities = load_modalities(store.artifact(run_id, "etl.features"), store.artifact(run_id, "etl.profiles"))
        refiner = load_refiner(_dims(modalities), config.refine, work).to(device)
        frozen = None
        if keys is not None:
            modalities = load_selected(modalities, work / "touched")

            def frozen(recursion: int) -> Keys:
                source = torch.from_numpy(np.array(open_matrix(keys[recursion - 1])))
                return refiner.rca.correlation.restore(source.to(device))

        keep_keys = config.refine.max_drift > 0
        likeness = refine_to_files(refiner, modalities, config.refine.chunk_size, work, frozen, keep_keys)
        if ranks()[0] == 0:
            LocalStorage(work).write("likeness.json", json.dumps(likeness).encode())


def _dims(modalities: list[Modality]) -> list[int]:
    return [modality.items.shape[1] for modality in modalities]
