"""Processes of a distributed training in a test."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["torch._dynamo", "crane_core.training.trainer", "crane_core.refine.catalog"]
"""Imported once in the server that the ranks are forked from: a rank that imports torch itself takes seconds for it."""


def on_ranks(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call a function of a module in every rank of a group, as `function(rank, *arguments)`, and wait for all."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(function, arguments, nprocs=world_size, start_method="forkserver")
