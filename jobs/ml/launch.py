"""Work on one or many ranks, and the training that `ml.behaviour` and `ml.train` share."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from crane_core.config import RunConfig, Runtime
from crane_core.dataset.interactions import Interactions, load_interactions
from crane_core.errors import ArtifactError, ConfigError, DataError, TrainingError, TrainingStopped
from crane_core.model.lightgcn import LightGCN
from crane_core.ranks import ranks
from crane_core.stages import STAGES
from crane_core.storage.artifacts import Artifact, ArtifactStore
from crane_core.storage.tensors import load_tensors
from crane_core.training.memory import naming_out_of_memory
from crane_core.training.trainer import Hooks, Trainer
from jobs.ml.device import use_device
from jobs.ml.rendezvous import ADDRESS, BACKEND, register, stay_on_this_machine
from jobs.runner import Job, Result, entry_of, identify, open_store, produce, run_job, scratch, start_logging

PUBLICATION_SECONDS = 1800.0
"""How long the other nodes wait after training for the first one's artifact."""
MAX_RESTARTS = 1
"""How often the ranks are started again within one attempt at the stage."""
SHUTDOWN_SECONDS = 600
"""How long ranks asked to stop may take for the step at work and its checkpoint before they are killed."""
_REFUSALS = {each.__name__: each for each in (ConfigError, DataError, ArtifactError, TrainingError)}
"""What a rank may end with for good, by the name that reaches its agent."""

logger = logging.getLogger(__name__)

Build = Callable[[ArtifactStore, str, Interactions, RunConfig, torch.device], LightGCN]
"""Makes the model on a rank from the store, the run id, the interactions, the configuration and the device."""


@dataclass(frozen=True)
class Node:
    """This machine among those of a training, as torchrun's variables `PET_*` say; alone where they are not set.

    Attributes:
        rank: 0 does the stage, the others lend it their devices.
        num_nodes: machines of the training.
        endpoint: where several meet, `host:port` on the first.
    """

    rank: int
    num_nodes: int
    endpoint: str

    @classmethod
    def here(cls) -> Node:
        """Read the variables.

        Raises:
            ConfigError: they contradict each other.
        """
        values = {name: os.environ.get(f"PET_{name}", "") for name in ("NNODES", "NODE_RANK", "MASTER_ADDR")}
        if values["NNODES"] in ("", "1"):
            return cls(0, 1, "")
        try:
            node = cls(
                int(values["NODE_RANK"]),
                int(values["NNODES"]),
                f"{values['MASTER_ADDR']}:{int(os.environ.get('PET_MASTER_PORT', '29400'))}",
            )
        except ValueError:
            node = cls(-1, 0, "")
        if not (0 <= node.rank < node.num_nodes and values["MASTER_ADDR"]):
            raise ConfigError(
                f"PET_NNODES={values['NNODES']!r}, PET_NODE_RANK={values['NODE_RANK']!r} and "
                f"PET_MASTER_ADDR={values['MASTER_ADDR']!r} describe no node of a training.",
                "Set them as torchrun expects them, or none of them.",
            )
        return node


def run_training(name: str, run: Callable[[Job], Result], build: Build, argv: Sequence[str] | None = None) -> int:
    """Entry point of a training job on every node: the first one does the stage, the others join its training.

    The nodes share the scratch folder of the store: the checkpoints lie there.
    """

    def work(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
        if Node.here().rank > 0:
            return _join(name, build, arguments, config, store)
        return produce(STAGES[name], arguments.run, arguments.part, config, store, run)

    return run_job(name, work, argv)


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


def on_ranks(work: Callable[..., None], job: Job, *arguments: Any) -> None:
    """Call `work(store URI, run id, configuration, job.work, *arguments)` on every rank and wait for all.

    One rank is this process; more than one run under torchrun's elastic agent, and `work` must be importable.

    Raises:
        TrainingError: a rank was lost again after the restart.
        TrainingStopped: somebody asked for it.
    """
    _launch(work, job.stage.name, (job.store.storage.uri, job.run_id, job.config, job.work, *arguments))


def _launch(work: Callable[..., None], stage: str, arguments: tuple[Any, ...]) -> None:
    """Run this node's ranks to their end, and say what ended them."""
    _, run_id, config, *_ = arguments
    node = Node.here()
    num_processes = _num_processes(config.runtime)
    num_ranks = node.num_nodes * num_processes
    if num_ranks == 1:
        work(*arguments)
        return
    register()
    launch = LaunchConfig(
        min_nodes=node.num_nodes,
        max_nodes=node.num_nodes,
        nproc_per_node=num_processes,
        run_id=f"{run_id}-{stage}",
        rdzv_backend="c10d" if node.num_nodes > 1 else BACKEND,
        rdzv_endpoint=node.endpoint,
        rdzv_configs={"is_host": node.rank == 0} if node.num_nodes > 1 else {},
        local_addr=None if node.num_nodes > 1 else ADDRESS,
        max_restarts=MAX_RESTARTS,
        start_method="spawn",
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    resumes = "Start the same command again: it goes on from what is finished."
    try:
        elastic_launch(launch, work)(*arguments)
    except SignalException as error:
        raise TrainingStopped(f"The ranks were asked to stop ({error.sigval.name}).", resumes) from error
    except ChildFailedError as error:
        lost, failure = error.get_first_failure()
        # An exception arrives as a mapping: "DataError: what was found. Remedy: what to do."
        message = failure.message.get("message", "") if isinstance(failure.message, dict) else failure.message
        *_, last = ["no message", *(message or "").strip().splitlines()]
        kind, _, text = last.partition(": ")
        found, _, remedy = text.partition(" Remedy: ")
        refusal = _REFUSALS.get(kind)
        if refusal and remedy:
            raise refusal(f"Rank {lost} of {num_ranks}: {found}", remedy) from error
        raise TrainingError(
            f"Rank {lost} of {num_ranks} was lost and so was its restart: exit code {failure.exitcode} ({last}).",
            f"Look for its error in the log, and for the kernel's out-of-memory killer. {resumes}",
        ) from error


def _num_processes(runtime: Runtime) -> int:
    """Ranks on this machine: the pod of a stage may have fewer devices than the nodes of a training."""
    if not runtime.device.startswith("cuda"):
        return runtime.world_size
    return min(runtime.world_size, max(torch.cuda.device_count(), 1))


def _join(
    name: str, build: Build, arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore
) -> dict[str, Any]:
    """Lend this node's devices to a training whose first node publishes; the entry is the one it leaves too."""
    started = time.monotonic()
    _, fingerprint = identify(STAGES[name], arguments.run, arguments.part, config, store)
    found = store.find(name, fingerprint)
    status = "found" if found else "joined"
    if found is None:
        logger.info("join stage=%s fingerprint=%s node=%d", name, fingerprint, Node.here().rank)
        work = scratch(store.storage.uri) / name / f"{fingerprint}.work"
        _launch(_train_rank, name, (store.storage.uri, arguments.run, config, work, build))
        deadline = time.monotonic() + PUBLICATION_SECONDS
        while found is None:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"The training ended {PUBLICATION_SECONDS:.0f} s ago and its first node has published nothing.",
                    "Look at the first node's log.",
                )
            time.sleep(1.0)
            found = store.find(name, fingerprint)
    return entry_of(found, status, round(time.monotonic() - started, 3))


@contextmanager
def rank(runtime: Runtime) -> Iterator[torch.device]:
    """What every rank begins and ends with: logging, its device, the process group."""
    start_logging()
    device = use_device(runtime)
    if dist.is_torchelastic_launched():
        if os.environ["GROUP_WORLD_SIZE"] == "1":
            stay_on_this_machine()
        # The agent's store outlives a restart: without a prefix the ranks would read the addresses of those before.
        store, number, num_ranks = next(dist.rendezvous("env://"))
        attempt = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=attempt, rank=number, world_size=num_ranks)
        if ranks()[0] > 0:
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


def _live_curve(
    store_uri: str, run_id: str, config: RunConfig, work: Path
) -> AbstractContextManager[Callable[[Mapping[str, float]], None] | None]:
    """What shows the epochs in MLflow, on rank 0 and where it is asked for."""
    if not config.runtime.live_curves or ranks()[0] > 0:
        return nullcontext()
    # Imported where it is wanted: MLflow takes longer to import than a small model to train.
    from crane_core.release.registry import open_registry

    return open_registry(config.runtime, store_uri).watch(f"{run_id} {work.parent.name}", work.stem)


@record
def _train_rank(store_uri: str, run_id: str, config: RunConfig, work: Path, build: Build) -> None:
    """What every rank does; rank 0 leaves the results in `work`."""
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
