"""Work on one or many ranks, and the training that `ml.behaviour` and `ml.train` share."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from crane_core.config import RunConfig, Runtime
from crane_core.dataset import Interactions, load_interactions
from crane_core.errors import TrainingError, TrainingStopped
from crane_core.model import LightGCN
from crane_core.store import Artifact, ArtifactStore
from crane_core.training import Trainer
from jobs.ml.device import use_device
from jobs.runner import Job, open_store, start_logging

MAX_RESTARTS = 1
"""How often the ranks are started again within one attempt at the stage."""

Build = Callable[[ArtifactStore, str, Interactions, RunConfig, torch.device], LightGCN]
"""Makes the model on a rank from the store, the run id, the interactions, the configuration and the device."""


def train(job: Job, build: Build) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Train a model to its best validation recall and write `weights.safetensors` and `curve.json` into `job.out`.

    With `runtime.world_size` above 1 the ranks run under torchrun's elastic agent, which starts them all again from the
    last checkpoint when one is lost, once. Killed at any moment, the next attempt goes on from the last checkpoint and
    ends with the same result; asked to end by SIGTERM, the training finishes its step and writes one.

    Args:
        job: the stage at work.
        build: makes the model; importable, since every rank calls it in a process of its own.

    Returns:
        The trainer's summary, and the final rows of users [num_users, d] and items [num_items, d].

    Raises:
        TrainingError: training cannot go on, or a rank was lost again after the restart.
        TrainingStopped: somebody asked for it.
    """
    on_ranks(_train_rank, job, build)
    summary = json.loads((job.work / "summary.json").read_text())
    (job.out / "curve.json").write_text(json.dumps(summary.pop("curve")))
    save_file(load_file(job.work / "best.safetensors"), job.out / "weights.safetensors")
    rows = load_file(job.work / "rows.safetensors")
    return summary, rows["users"], rows["items"]


def on_ranks(work: Callable[..., None], job: Job, *arguments: Any) -> None:
    """Call `work(store URI, run id, configuration, job.work, *arguments)` on every rank and wait for all.

    One rank is this process; more than one run under torchrun's elastic agent, and `work` must be importable.

    Raises:
        TrainingError: a rank was lost again after the restart.
        TrainingStopped: somebody asked for it.
    """
    given = (job.store.storage.uri, job.run_id, job.config, job.work, *arguments)
    world_size = job.config.runtime.world_size
    if world_size == 1:
        work(*given)
        return
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=job.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        start_method="spawn",
    )
    resumes = "Start the same command again: it goes on from what is finished."
    try:
        elastic_launch(launch, work)(*given)
    except SignalException as error:
        raise TrainingStopped(f"The ranks were asked to stop ({error.sigval.name}).", resumes) from error
    except ChildFailedError as error:
        lost, failure = error.get_first_failure()
        raise TrainingError(
            f"Rank {lost} of {launch.max_nodes * launch.nproc_per_node} was lost and so was its restart: exit code "
            f"{failure.exitcode} ({failure.message.splitlines()[-1] if failure.message else 'no message'}).",
            f"Look for its error in the log, and for the kernel's out-of-memory killer. {resumes}",
        ) from error


@contextmanager
def rank(runtime: Runtime) -> Iterator[torch.device]:
    """What every rank begins and ends with: logging, its device, the process group."""
    start_logging()
    device = use_device(runtime)
    if runtime.world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            logging.getLogger().setLevel(logging.WARNING)
    yield device
    if dist.is_initialized():
        dist.destroy_process_group()


def save_embeddings(folder: Path, users: Tensor, items: Tensor) -> None:
    """Write `embeddings.safetensors`: scores are dot products of `user_embeddings` and `item_embeddings`."""
    rows = {"user_embeddings": users.contiguous(), "item_embeddings": items.contiguous()}
    save_file(rows, folder / "embeddings.safetensors")


def load_embeddings(trained: Artifact) -> tuple[Tensor, Tensor]:
    """Users [num_users, d] and items [num_items, d] of a trained model."""
    rows = load_file(trained.file("embeddings.safetensors"))
    return rows["user_embeddings"], rows["item_embeddings"]


@contextmanager
def _stop_on_sigterm() -> Iterator[Event]:
    """The event that SIGTERM sets while the block runs."""
    stopping = Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


def _live_curve(
    store_uri: str, run_id: str, config: RunConfig, work: Path
) -> AbstractContextManager[Callable[[Mapping[str, float]], None] | None]:
    """What shows the epochs in MLflow, on rank 0 and where it is asked for."""
    if not config.runtime.live_curves or (dist.is_initialized() and dist.get_rank() > 0):
        return nullcontext()
    # Imported where it is wanted: MLflow takes longer to import than a small model to train.
    from crane_core.registry import open_registry

    return open_registry(config.runtime, store_uri).watch(f"{run_id} {work.parent.name}", work.stem)


@record
def _train_rank(store_uri: str, run_id: str, config: RunConfig, work: Path, build: Build) -> None:
    """What every rank does; rank 0 leaves the results in `work`."""
    with rank(config.runtime) as device:
        store = open_store(store_uri)
        interactions = load_interactions(store.artifact(run_id, "etl.interactions"))
        model = build(store, run_id, interactions, config, device)
        with _stop_on_sigterm() as stopping, _live_curve(store_uri, run_id, config, work) as watch:
            trainer = Trainer(model, interactions, config.train, work, device, stopping, watch)
            summary = trainer.run()
        users, items = trainer.best_rows()
        if trainer.rank == 0:
            save_file({"users": users.contiguous(), "items": items.contiguous()}, work / "rows.safetensors")
            (work / "summary.json").write_text(json.dumps(summary | {"curve": trainer.progress.curve}))
