"""Start the ranks of a job under torchrun's elastic agent, and tell what ended them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from crane_core.config import Runtime
from crane_core.errors import (
    ArtifactError,
    ConfigError,
    CraneError,
    DataError,
    TrainingError,
    TrainingStopped,
    error_from,
    error_of,
)
from crane_core.ranks import ranks
from jobs.logs import start_logging
from jobs.ml.device import use_device
from jobs.ml.nodes import Node
from jobs.ml.rendezvous import ADDRESS, BACKEND, register, stay_on_this_machine
from jobs.runner import Job

MAX_RESTARTS = 1
"""Times that the ranks are started again within one attempt at the stage."""
SHUTDOWN_SECONDS = 600
"""Seconds that ranks asked to stop may take for their step and its checkpoint before they are killed."""
FINAL = (ConfigError, DataError, ArtifactError, TrainingError)
"""Errors of a rank that end the job as they would end it with one rank."""
RESUMES = "Start the same command again: it goes on from what is finished."


def on_ranks(work: Callable[..., None], job: Job, *arguments: Any) -> None:
    """Call `work(store URI, run id, configuration, job.work, *arguments)` on every rank and wait for all.

    One rank is this process; more than one run under torchrun's elastic agent, and `work` must be importable.

    Raises:
        TrainingError: a rank was lost again after the restart.
        TrainingStopped: somebody asked for it.
    """
    start_ranks(work, job.stage.name, (job.store.storage.uri, job.run_id, job.config, job.work, *arguments))


def start_ranks(work: Callable[..., None], stage: str, arguments: tuple[Any, ...]) -> None:
    """Run this node's ranks to their end.

    Args:
        work: called on every rank.
        stage: names the group of ranks.
        arguments: of `work`; a store URI, a run id and the configuration come first.

    Raises:
        CraneError: what ended them.
    """
    _, run_id, config, *_ = arguments
    node = Node.here()
    on_this_node = num_processes(config.runtime)
    num_ranks = node.num_nodes * on_this_node
    if num_ranks == 1:
        work(*arguments)
        return
    register()
    launch = LaunchConfig(
        min_nodes=node.num_nodes,
        max_nodes=node.num_nodes,
        nproc_per_node=on_this_node,
        run_id=f"{run_id}-{stage}",
        rdzv_backend="c10d" if node.num_nodes > 1 else BACKEND,
        rdzv_endpoint=node.endpoint,
        rdzv_configs={"is_host": node.rank == 0} if node.num_nodes > 1 else {},
        local_addr=None if node.num_nodes > 1 else ADDRESS,
        max_restarts=MAX_RESTARTS,
        start_method="spawn",
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(launch, _run_rank)(work, *arguments)
    except SignalException as error:
        raise TrainingStopped(f"The ranks were asked to stop ({error.sigval.name}).", RESUMES) from error
    except ChildFailedError as error:
        raise _error_of_rank(error, stage, num_ranks) from error


def _run_rank(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` in the process of a rank, and leave what it raises beside torchrun's own error file."""
    try:
        work(*arguments)
    except Exception as exception:
        error = error_of(exception, RESUMES)
        _beside(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(error.as_dict()))
        raise


def _beside(error_file: str) -> Path:
    """Return the file of a rank's error as data: torchrun overwrites its own with a text."""
    return Path(error_file).with_name("raised.json")


def _error_of_rank(error: ChildFailedError, stage: str, num_ranks: int) -> CraneError:
    """Return what ended the ranks: what the first one to fail has raised, or its loss."""
    lost, failure = error.get_first_failure()
    file = _beside(failure.error_file)
    raised = error_from(json.loads(file.read_text())) if file.exists() else None
    if raised is not None and type(raised) in FINAL:
        return type(raised)(f"Rank {lost} of {num_ranks}: {raised.found}", raised.remedy)
    told = f"{raised.name}: {raised.found}" if raised else failure.message
    return TrainingError(
        f"Rank {lost} of {num_ranks} was lost and so was its restart: exit code {failure.exitcode} ({told}).",
        f"Read the traceback of the rank in the log of jobs.{stage}, on stderr. If there is none, dmesg tells whether "
        f"the kernel has killed it for its memory. {RESUMES}",
    )


def num_processes(runtime: Runtime) -> int:
    """Return the number of ranks on this machine: the pod of a stage may have fewer devices than a training's nodes."""
    if not runtime.device.startswith("cuda"):
        return runtime.world_size
    return min(runtime.world_size, max(torch.cuda.device_count(), 1))


@contextmanager
def rank(runtime: Runtime) -> Iterator[torch.device]:
    """Set up logging, the device and the process group of a rank, and take the group down at the end."""
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
