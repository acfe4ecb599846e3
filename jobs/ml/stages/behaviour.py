"""Train LightGCN: the work of `jobs.ml.behaviour`."""

from __future__ import annotations

import torch

from crane_core.config import RunConfig
from crane_core.dataset.interactions import Interactions
from crane_core.model.lightgcn import LightGCN
from crane_core.storage.artifacts import ArtifactStore
from jobs.ml.nodes import Training
from jobs.ml.training import lend_ranks, save_embeddings, train
from jobs.runner import Job, Result


def build(
    store: ArtifactStore, run_id: str, interactions: Interactions, config: RunConfig, device: torch.device
) -> LightGCN:
    return LightGCN(interactions.num_users, interactions.num_items, config)


def run(job: Job) -> Result:
    summary, users, items = train(job, build)
    save_embeddings(job.out, users, items)
    return Result(summary)


def lend(training: Training) -> None:
    """Run this node's ranks in the training that another node has started."""
    lend_ranks("ml.behaviour", training, build)
