"""Processes of tests that share one import of torch and MLflow, five seconds of processor time each."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from torch.distributed.launcher.api import LaunchConfig

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "jobs.ml.stages.behaviour", "jobs.ml.promote", __name__]
"""Imported once in the server that processes are forked from; otherwise each process takes seconds to import torch."""
CONTEXT.set_forkserver_preload(PRELOADED)


def on_ranks(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call a function of a module in every rank of a group, as `function(rank, *arguments)`, and wait for all."""
    mp.start_processes(function, arguments, nprocs=world_size, start_method="forkserver")


class JobProcess:
    """A job that runs at once in a process of its own.

    Args:
        module: module of the job, `jobs.<group>.<stage>`.
        argv: its flags.
        folder: where its stdout and stderr go.
        environment: further variables.
        prepare: called before the job, for faults to plant; importable.
    """

    def __init__(
        self,
        module: str,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self.process = CONTEXT.Process(target=_work, args=(module, argv, folder, environment or {}, prepare))
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float = 300) -> int:
        """Return the exit code, -n after signal n."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.said()}"
        return self.process.exitcode

    def printed(self) -> str:
        """Return what it has written to stdout."""
        return (self._folder / "stdout").read_text()

    def said(self) -> str:
        """Return what it has written to stderr."""
        path = self._folder / "stderr"
        return path.read_text() if path.exists() else ""


def forkserver_ranks(**given: object) -> LaunchConfig:
    """A `LaunchConfig` that takes the ranks of this process from the fork server."""
    return LaunchConfig(**given | {"start_method": "forkserver"})


def forked_ranks(**given: object) -> LaunchConfig:
    """A `LaunchConfig` that forks the ranks of a `JobProcess`, whose torch has done nothing yet."""
    return LaunchConfig(**given | {"start_method": "fork"})


def _work(
    module: str, argv: Sequence[str], folder: Path, environment: Mapping[str, str], prepare: Callable[[], None] | None
) -> None:
    os.environ.update(environment)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    if prepare:
        prepare()
    sys.exit(import_module(module).main(argv))
