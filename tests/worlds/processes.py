"""Processes of their own for tests that kill some or train on several ranks, without an interpreter start for each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing

# Adam imports torch._dynamo at its first use.
PRELOADED = ["torch._dynamo", "jobs.cli", "jobs.commands.experiments"]


def forkserver() -> ForkServerContext:
    """Return a context whose processes are forked from one that has imported torch and has run no gradient."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(rank: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run `rank(rank, world_size, *arguments)` in a process for each rank, and wait for all."""
    forkserver()
    torch.multiprocessing.start_processes(rank, (world_size, *arguments), world_size, start_method="forkserver")
