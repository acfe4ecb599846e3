"""The machines of a training: the first does the stage, the others lend it their devices."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ConfigError, TrainingError
from crane_core.stages import STAGES
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job
from jobs.runner import Job, Result, entry_of, identify, produce
from jobs.stores import scratch

PUBLICATION_SECONDS = 1800.0
"""Seconds that the other nodes wait after training for the artifact of the first node."""

logger = logging.getLogger(__name__)

Training = tuple[str, str, RunConfig, Path]
"""Store URI, run id, configuration and work folder of a training."""


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
                "Set PET_NNODES to the number of nodes, PET_NODE_RANK to 0..PET_NNODES-1, PET_MASTER_ADDR to the host "
                "of node 0 and PET_MASTER_PORT to a number; or unset all four to train on this machine.",
            )
        return node


def run_training(
    name: str, run: Callable[[Job], Result], lend: Callable[[Training], None], argv: Sequence[str] | None = None
) -> int:
    """Entry point of a training job on every node: the first one does the stage, the others join its training.

    The nodes share the scratch folder of the store: the checkpoints lie there.

    Args:
        name: the stage.
        run: does the stage.
        lend: runs this node's ranks in the training of the first node.
        argv: flags, the process's own when None.
    """

    def work(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
        if Node.here().rank > 0:
            return _join(name, lend, arguments, config, store)
        return produce(STAGES[name], arguments.run, arguments.part, config, store, run)

    return run_job(name, work, argv)


def _join(
    name: str, lend: Callable[[Training], None], arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore
) -> dict[str, Any]:
    """Lend this node's devices to a training whose first node publishes; the entry is the one it leaves too."""
    started = time.monotonic()
    _, fingerprint = identify(STAGES[name], arguments.run, arguments.part, config, store)
    found = store.find(name, fingerprint)
    status = "found" if found else "joined"
    if found is None:
        logger.info("join stage=%s fingerprint=%s node=%d", name, fingerprint, Node.here().rank)
        lend((store.storage.uri, arguments.run, config, scratch(store.storage.uri) / name / f"{fingerprint}.work"))
        deadline = time.monotonic() + PUBLICATION_SECONDS
        while found is None:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"The training ended {PUBLICATION_SECONDS:.0f} s ago and its first node has published nothing.",
                    f"Read the log of jobs.{name} on the node with PET_NODE_RANK=0, then start it again on all.",
                )
            time.sleep(1.0)
            found = store.find(name, fingerprint)
    return entry_of(found, status, round(time.monotonic() - started, 3))
