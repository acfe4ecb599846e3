"""The training that `ml.behaviour` and `ml.train` share: run it on the ranks, watch it, publish its rows."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crane_core.config import RunConfig
from crane_core.dataset.interactions import Interactions, load_interactions
from crane_core.errors import ConfigError
from crane_core.model.fold_in import FoldIn
from crane_core.model.lightgcn import LightGCN
from crane_core.ranks import ranks
from crane_core.storage.artifacts import Artifact, ArtifactStore
from crane_core.storage.tensors import load_tensors
from crane_core.training.memory import naming_out_of_memory
from crane_core.training.trainer import Hooks, Trainer
from jobs.ml.launch import on_ranks, rank, start_ranks
from jobs.ml.nodes import Training
from jobs.runner import Job
from jobs.stores import open_store

logger = logging.getLogger(__name__)

Build = Callable[[ArtifactStore, str, Interactions, RunConfig, torch.device], LightGCN]
"""Makes the model on a rank from the store, the run id, the interactions, the configuration and the device."""


def train(job: Job, build: Build) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Train a model to its best validation recall and write `weights.safetensors` and `curve.json` into `job.out`.

    With `runtime.world_size` above 1 the ranks run under torchrun's elastic agent, which starts them all again from the
    last checkpoint when one is lost, once. Killed at any moment, the next attempt goes on from the last checkpoint and
    ends with the same result; asked to end by SIGTERM, the training finishes its step and writes one. A rank that alone
    gets SIGTERM counts as lost: all write a checkpoint after the step, and start again from it.

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
    save_file(load_tensors(job.work / "best.safetensors"), job.out / "weights.safetensors")
    rows = load_tensors(job.work / "rows.safetensors")
    return summary, rows["users"], rows["items"]


def lend_ranks(name: str, training: Training, build: Build) -> None:
    """Run this node's ranks in a training of the stage `name` that another node has started."""
    start_ranks(_train_rank, name, (*training, build))


def save_embeddings(
    folder: Path, users: Tensor, items: Tensor, fold_in: FoldIn | None = None, likeness: Tensor | None = None
) -> None:
    """Write `embeddings.safetensors`: scores are dot products of `user_embeddings` and `item_embeddings`.

    With a fold-in also `history_rows` and `history_constant`, its arrays; with `likeness`, float32 [num_items, d],
    rows of that name, whose cosines say how alike items are.
    """
    rows = {"user_embeddings": users.contiguous(), "item_embeddings": items.contiguous()}
    if likeness is not None:
        rows["likeness"] = likeness.contiguous()
    if fold_in is not None:
        rows |= {name: torch.from_numpy(array) for name, array in fold_in.arrays().items()}
    save_file(rows, folder / "embeddings.safetensors")


def load_embeddings(trained: Artifact) -> tuple[Tensor, Tensor]:
    """Users [num_users, d] and items [num_items, d] of a trained model."""
    rows = load_tensors(trained.file("embeddings.safetensors"))
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


@contextmanager
def _live_curve(
    store_uri: str, run_id: str, config: RunConfig, work: Path
) -> Iterator[Callable[[Mapping[str, float]], None] | None]:
    """Yield what shows the epochs in MLflow: on rank 0, and where `runtime.live_curves` is set.

    Where the registry does not answer, the training goes on without: it needs none before `ml.register`.
    """
    with ExitStack() as stack:
        watch = None
        if config.runtime.live_curves and ranks()[0] == 0:
            # Imported where it is wanted: MLflow takes longer to import than a small model to train.
            from crane_core.release.registry import open_registry

            try:
                registry = open_registry(config.runtime, store_uri)
                watch = stack.enter_context(registry.watch(f"{run_id} {work.parent.name}", work.stem))
            except ConfigError as error:
                logger.warning("no_live_curve run=%s error=%s", run_id, error)
        yield watch


def _train_rank(store_uri: str, run_id: str, config: RunConfig, work: Path, build: Build) -> None:
    """Train on this rank; rank 0 leaves the results in `work`."""
    with naming_out_of_memory(), rank(config.runtime) as device:
        store = open_store(store_uri)
        interactions = load_interactions(store.artifact(run_id, "etl.interactions"))
        model = build(store, run_id, interactions, config, device)
        with _stop_on_sigterm() as stopping, _live_curve(store_uri, run_id, config, work) as watch:
            trainer = Trainer(model, interactions, config, work, device, Hooks(stopping, watch))
            summary = trainer.run()
        users, items = trainer.best_rows()
        if trainer.rank == 0:
            save_file({"users": users.contiguous(), "items": items.contiguous()}, work / "rows.safetensors")
            (work / "summary.json").write_text(json.dumps(summary | {"curve": trainer.progress.curve}))
