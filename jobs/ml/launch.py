"""Training on one or many ranks: what `ml.behaviour` and `ml.train` share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from crane_core.config import RunConfig
from crane_core.dataset import Interactions, load_interactions
from crane_core.model import LightGCN
from crane_core.store import Artifact, ArtifactStore
from crane_core.training import Trainer
from jobs.ml.device import use_device
from jobs.runner import Job, open_store, start_logging

Build = Callable[[ArtifactStore, str, Interactions, RunConfig, torch.device], LightGCN]
"""Makes the model on a rank from the store, the run id, the interactions, the configuration and the device."""


def train(job: Job, build: Build) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Train a model to its best validation recall and write `weights.safetensors` and `curve.json` into `job.out`.

    With `runtime.world_size` above 1 the ranks run under torchrun's elastic agent. Killed at any moment, the next
    attempt goes on from the last checkpoint and ends with the same result.

    Args:
        job: the stage at work.
        build: makes the model; importable, since every rank calls it in a process of its own.

    Returns:
        The trainer's summary, and the final rows of users [num_users, d] and items [num_items, d].
    """
    runtime = job.config.runtime
    arguments = (job.store.storage.uri, job.run_id, job.config, job.work, build)
    if runtime.world_size == 1:
        _train_rank(*arguments)
    else:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=runtime.world_size,
            run_id=job.run_id,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=1,
            start_method="spawn",
        )
        elastic_launch(launch, _train_rank)(*arguments)
    summary = json.loads((job.work / "summary.json").read_text())
    (job.out / "curve.json").write_text(json.dumps(summary.pop("curve")))
    save_file(load_file(job.work / "best.safetensors"), job.out / "weights.safetensors")
    rows = load_file(job.work / "rows.safetensors")
    return summary, rows["users"], rows["items"]


def save_embeddings(folder: Path, users: Tensor, items: Tensor) -> None:
    """Write `embeddings.safetensors`: scores are dot products of `user_embeddings` and `item_embeddings`."""
    rows = {"user_embeddings": users.contiguous(), "item_embeddings": items.contiguous()}
    save_file(rows, folder / "embeddings.safetensors")


def load_embeddings(trained: Artifact) -> tuple[Tensor, Tensor]:
    """Users [num_users, d] and items [num_items, d] of a trained model."""
    rows = load_file(trained.file("embeddings.safetensors"))
    return rows["user_embeddings"], rows["item_embeddings"]


def _train_rank(store_uri: str, run_id: str, config: RunConfig, work: Path, build: Build) -> None:
    """What every rank does; rank 0 leaves the results in `work`."""
    start_logging()
    device = use_device(config.runtime)
    if config.runtime.world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            logging.getLogger().setLevel(logging.WARNING)
    store = open_store(store_uri)
    interactions = load_interactions(store.artifact(run_id, "etl.interactions"))
    model = build(store, run_id, interactions, config, device)
    trainer = Trainer(model, interactions, config.train, work, device)
    summary = trainer.run()
    users, items = trainer.best_rows()
    if trainer.rank == 0:
        save_file({"users": users.contiguous(), "items": items.contiguous()}, work / "rows.safetensors")
        (work / "summary.json").write_text(json.dumps(summary | {"curve": trainer.progress.curve}))
    if dist.is_initialized():
        dist.destroy_process_group()
