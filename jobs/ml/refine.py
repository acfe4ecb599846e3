"""Fit RCA and run the whole catalog through it: `python -m jobs.ml.refine --store URI --run RUN_ID`.

Leaves `items.npy` [num_items, M, d] and `users.npy` [num_users, M, d] refined rows, `fused_items.npy` and
`fused_users.npy` [n, d], the weights `rca.safetensors`, and `fit.json` with the curve and the monitors.

With `refine.max_drift` it also leaves what a later run grows from, `keys-1.npy` and so on, `anchors.npy` and
`anchor_items.npy`; and a run that grows (`etl.base_run`) refines new and changed rows alone.

Killed at any moment, the next attempt repeats at most the fit, or the chunks of `refine.chunk_size` rows that the
ranks were at: what is written stays in the work folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.distributed.elastic.multiprocessing.errors import record

from crane_core.config import RunConfig
from crane_core.dataset.interactions import load_interactions
from crane_core.dataset.modalities import Modality, load_modalities, profile_spreads
from crane_core.errors import DataError
from crane_core.graph.drift import drift
from crane_core.ranks import ranks
from crane_core.refine.attention import Keys
from crane_core.refine.catalog import keys_file, refine_to_files, refined_files
from crane_core.refine.fit import fit
from crane_core.refine.growth import choose_anchors, load_selected, outgrown, touched, write_selected
from crane_core.refine.refiner import Refiner, project_items
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.local import LocalStorage
from crane_core.storage.matrix import blocks, open_matrix
from crane_core.storage.tensors import load_tensors
from jobs.ml.device import use_device
from jobs.ml.growth import REFINE_FROM, Base, base_contents, find_base
from jobs.ml.launch import on_ranks, rank
from jobs.runner import Job, Result, run_stage
from jobs.stores import open_store

logger = logging.getLogger(__name__)


def source(config: RunConfig, store: ArtifactStore) -> list[str | int] | None:
    """Identity of what the run may grow from, and of what its drift is counted in."""
    contents = base_contents(config, store, *REFINE_FROM)
    return None if contents is None else [*contents, config.knn.k]


def run(job: Job) -> Result:
    config = job.config.refine
    modalities = load_modalities(job.input("etl.features"), job.input("etl.profiles"))
    base = find_base(job, modalities)
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
    refiner = load_refiner(job.config, [m.items.shape[1] for m in modalities], job.work)
    for name, path in refined_files(job.work, config.num_recursions).items():
        # A second name and no copy: killed before the artifact is published, the work is still whole.
        (job.out / f"{name}.npy").hardlink_to(path)
        fuse(refiner, path, job.out / f"fused_{name}.npy", config.chunk_size)
    shutil.copy(job.work / "rca.safetensors", job.out)
    report = json.loads((job.work / "fit.json").read_text()) | {"mean_cosine": likeness}
    (job.out / "fit.json").write_text(json.dumps(report))
    if config.max_drift > 0:
        for number in range(1, config.num_recursions + 1):
            keys_file(job.out, number).hardlink_to(keys_file(job.work, number))
        anchors = choose_anchors(len(modalities[0].items), config.seed)
        np.save(job.out / "anchor_items.npy", anchors)
        with torch.no_grad():
            np.save(job.out / "anchors.npy", project_items(refiner, modalities, anchors).numpy())


def grow(job: Job, base: Base, modalities: list[Modality]) -> dict[str, Any] | None:
    """Take over the rows that stay and refine the others; None past the bounds of change and drift.

    Returns:
        `drift`, and how many items and users were refined.
    """
    config, dims = job.config.refine, [m.items.shape[1] for m in modalities]
    refiner = load_refiner(job.config, dims, base.refined.path)
    kept = [f"keys-{number}.npy" for number in range(1, config.num_recursions + 1)]
    kept += ["rca.safetensors", "fit.json", "anchors.npy", "anchor_items.npy"]
    anchors, then = (open_matrix(base.refined.file(name)) for name in ("anchor_items.npy", "anchors.npy"))
    num_built = base.refined.facts.get("growth", {}).get("num_built", len(base.modalities[0].items))
    rows = touched(base.modalities, modalities)
    counts = {"num_items": len(rows.items), "num_users": len(rows.users)}
    num_items, run_id = len(modalities[0].items), job.config.etl.base_run
    if outgrown(rows.items, len(base.modalities[0].items), num_built, num_items):
        logger.warning("build_anew base=%s %s total=%d num_built=%d", run_id, counts, num_items, num_built)
        return None
    found = drift(refiner, anchors, then, num_built, modalities, job.config.knn.k, config.chunk_size)
    logger.info("grow base=%s drift=%.4f %s", run_id, found, counts)
    if found > config.max_drift:
        logger.warning("build_anew drift=%.4f max_drift=%.4f", found, config.max_drift)
        return None
    shutil.copy(base.refined.file("rca.safetensors"), job.work)
    write_selected(modalities, rows, job.work / "touched")
    keys = [keys_file(base.refined.path, number) for number in range(1, config.num_recursions + 1)]
    on_ranks(_refine_rank, job, keys)
    num_rows = {"items": num_items, "users": len(modalities[0].profiles)}
    for name, path in refined_files(job.work, config.num_recursions).items():
        fused = job.work / f"fused-{name}.npy"
        fuse(refiner, path, fused, config.chunk_size)
        for made, target in ((path, f"{name}.npy"), (fused, f"fused_{name}.npy")):
            overlay(base.refined.file(target), getattr(rows, name), made, num_rows[name], job.out / target)
    for name in kept:
        shutil.copy(base.refined.file(name), job.out)
    return {"base": run_id, "drift": found, "num_built": num_built, **counts}


def overlay(before: Path, which: np.ndarray, rows: Path, num_rows: int, target: Path) -> None:
    """Write the rows of a file with some of them replaced and new ones appended, a block at a time.

    Args:
        before: [m, ...], the file.
        which: int, numbers of the replaced and new rows; every number from m on is among them.
        rows: [len(which), ...], file of these rows.
        num_rows: rows of the target.
        target: file to write.
    """
    old, new = open_matrix(before), open_matrix(rows)
    np.lib.format.open_memmap(target, "w+", old.dtype, (num_rows, *old.shape[1:]))
    for block in blocks(len(old), old[:1].nbytes):
        np.load(target, mmap_mode="r+")[block] = old[block]
    for block in blocks(len(which), old[:1].nbytes):
        np.load(target, mmap_mode="r+")[which[block]] = new[block]


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
    refiner, report = fit(modalities, interactions.train, job.config.profiles.aggregate, job.config.refine, device)
    weights = {name: value.cpu().contiguous() for name, value in refiner.state_dict().items()}
    save_file(weights, job.work / "rca.safetensors")
    LocalStorage(job.work).write("fit.json", json.dumps(report).encode())


def load_refiner(config: RunConfig, dims: list[int], folder: Path) -> Refiner:
    """The fitted refiner."""
    refiner = Refiner(dims, [1.0] * len(dims), config.refine)
    refiner.load_state_dict(load_tensors(folder / "rca.safetensors"))
    return refiner.eval()


@record
def _refine_rank(store_uri: str, run_id: str, config: RunConfig, work: Path, keys: list[Path] | None) -> None:
    """What every rank does with its share of the catalog, or of the selected rows where keys are given."""
    with rank(config.runtime) as device:
        store = open_store(store_uri)
        modalities = load_modalities(store.artifact(run_id, "etl.features"), store.artifact(run_id, "etl.profiles"))
        refiner = load_refiner(config, [m.items.shape[1] for m in modalities], work).to(device)
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
    return run_stage("ml.refine", run, source, argv)


if __name__ == "__main__":
    raise SystemExit(main())
