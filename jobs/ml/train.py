"""Train one model to its best validation recall: `python -m jobs.ml.train --store URI --run RUN_ID --part crane`.

Parts: `crane`, and `lightgcn`, the baseline with the same settings. With `runtime.world_size` above 1 the ranks run
under torchrun's elastic agent. Killed at any moment, the next attempt goes on from the last checkpoint and ends with
the same result.

Leaves `embeddings.safetensors` (`user_embeddings` and `item_embeddings`, scores are their dot products),
`weights.safetensors`, and `curve.json`, one entry per epoch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from crane_core.config import RunConfig, Runtime
from crane_core.content import load_content
from crane_core.dataset import load_interactions
from crane_core.errors import ConfigError
from crane_core.model import Crane, LightGCN
from crane_core.training import Trainer
from jobs.runner import Job, Result, open_store, run_stage, start_logging


def run(job: Job) -> Result:
    runtime = job.config.runtime
    arguments = (job.store.storage.uri, job.run_id, job.part, job.config, job.work, job.out)
    if runtime.world_size == 1:
        train_rank(*arguments)
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
        elastic_launch(launch, train_rank)(*arguments)
    return Result(json.loads((job.work / "summary.json").read_text()))


def train_rank(store_uri: str, run_id: str, part: str, config: RunConfig, work: Path, out: Path) -> None:
    """What every rank does; rank 0 writes the results."""
    start_logging()
    device = use_device(config.runtime)
    if config.runtime.world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    store = open_store(store_uri)
    interactions = load_interactions(store.artifact(run_id, "etl.interactions"))
    model: LightGCN
    if part == "crane":
        content = load_content(store.artifact(run_id, "ml.refine"), store.artifact(run_id, "ml.graph"), device)
        model = Crane(interactions.num_users, interactions.num_items, content, config.train)
    else:
        model = LightGCN(interactions.num_users, interactions.num_items, config.train)
    trainer = Trainer(model, interactions, config.train, work, device)
    summary = trainer.run()
    if trainer.rank == 0:
        weights = trainer.best_weights()
        model.load_state_dict(weights)
        users, items = trainer.embeddings()
        rows = {"user_embeddings": users.contiguous(), "item_embeddings": items.contiguous()}
        save_file(rows, out / "embeddings.safetensors")
        save_file(weights, out / "weights.safetensors")
        (out / "curve.json").write_text(json.dumps(trainer.progress.curve))
        (work / "summary.json").write_text(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()


def use_device(runtime: Runtime) -> torch.device:
    """Set the number of threads and return this rank's device.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    if not runtime.device.startswith("cuda"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"runtime.device is {runtime.device!r} but torch {torch.__version__} sees no CUDA device.",
            "Set runtime.device=cpu, or install a CUDA build of torch on a machine with a GPU.",
        )
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.train", run, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
