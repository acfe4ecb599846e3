"""Train the behavioural view, LightGCN: `python -m jobs.ml.behaviour --store URI --run RUN_ID`.

It is CRANE's first half and the baseline CRANE is compared with. It needs no content, so it runs beside the refine,
knn and graph stages. Leaves `embeddings.safetensors`, `weights.safetensors` and `curve.json`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crane_core.config import RunConfig
from crane_core.dataset.interactions import Interactions
from crane_core.model.lightgcn import LightGCN
from crane_core.storage.artifacts import ArtifactStore
from jobs.ml.training import run_training, save_embeddings, train
from jobs.runner import Job, Result


def build(
    store: ArtifactStore, run_id: str, interactions: Interactions, config: RunConfig, device: torch.device
) -> LightGCN:
    return LightGCN(interactions.num_users, interactions.num_items, config)


def run(job: Job) -> Result:
    summary, users, items = train(job, build)
    save_embeddings(job.out, users, items)
    return Result(summary)


def main(argv: Sequence[str] | None = None) -> int:
    return run_training("ml.behaviour", run, build, argv)


if __name__ == "__main__":
    raise SystemExit(main())
