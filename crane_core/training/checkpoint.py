"""Checkpoints of a training: every rank writes the rows that it keeps, and one file names the newest complete set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crane_core.errors import ArtifactError
from crane_core.model.sharding import Shards
from crane_core.storage.local import sync
from crane_core.storage.tensors import load_tensors

POINTER = "checkpoint.json"
FORMAT = 2


class Checkpoint(NamedTuple):
    """The state that a training goes on from.

    Attributes:
        sharded: name to this rank's rows [num_local, ...].
        replicated: name to a tensor that is the same on every rank.
        state: JSON values.
    """

    sharded: dict[str, Tensor]
    replicated: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder that all ranks see.

    A kill at any moment leaves the newest complete checkpoint.

    Args:
        folder: of the training. `checkpoint.json` is replaced last and names the folder `checkpoint-{version}` with
            the tensors.
        shards: of the training that reads and writes; one of another world size reads the same rows.
    """

    def __init__(self, folder: Path, shards: Shards) -> None:
        self.folder = folder
        self.shards = shards

    def write(self, version: str, checkpoint: Checkpoint) -> None:
        """Write the parts of all ranks, name them the newest, then remove older ones. Every rank calls it."""
        target, shards = self.folder / f"checkpoint-{version}", self.shards
        target.mkdir(exist_ok=True)
        write_tensors(target / f"rank-{shards.rank}.safetensors", checkpoint.sharded)
        if shards.rank == 0:
            write_tensors(target / "replicated.safetensors", checkpoint.replicated)
        if shards.world_size > 1:
            dist.barrier()
        if shards.rank != 0:
            return
        pointer = {"format": FORMAT, "folder": target.name, "sizes": shards.sizes, "world_size": shards.world_size}
        spooled = self.folder / f".{POINTER}"
        spooled.write_text(json.dumps({**pointer, "state": checkpoint.state}))
        sync(spooled)
        spooled.replace(self.folder / POINTER)
        # Until the new name is on the disk, a machine that loses power may still want what is removed here.
        sync(self.folder)
        for other in self.folder.glob("checkpoint-*"):
            if other != target:
                shutil.rmtree(other)

    def read(self) -> Checkpoint | None:
        """Read the newest checkpoint, with the rows of this rank; None before the first.

        Raises:
            ArtifactError: it is of another format or of other numbers of rows, or damaged.
        """
        path = self.folder / POINTER
        if not path.exists():
            return None
        try:
            return self._read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtifactError(
                f"The checkpoint in {self.folder} is damaged: {type(error).__name__}: {error}.",
                f"Remove {self.folder} to train from the start.",
            ) from error

    def _read(self, path: Path) -> Checkpoint:
        pointer = json.loads(path.read_text())
        if pointer["format"] != FORMAT or tuple(pointer["sizes"]) != self.shards.sizes:
            raise ArtifactError(
                f"{path} has format {pointer['format']} and {pointer['sizes']} rows, expected {FORMAT} and "
                f"{list(self.shards.sizes)}.",
                f"Remove {self.folder} to train from the start.",
            )
        written = Shards(pointer["sizes"], 0, pointer["world_size"])
        target = self.folder / pointer["folder"]
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(target / f"rank-{rank}.safetensors", "pt"))
                for rank in range(written.world_size)
            ]
            sharded = {name: self._rows(name, files, written) for name in files[0].keys()}  # noqa: SIM118
        return Checkpoint(sharded, load_tensors(target / "replicated.safetensors"), pointer["state"])

    def _rows(self, name: str, files: list[Any], written: Shards) -> Tensor:
        """Read the rows of this rank from the files of the ranks that wrote them."""
        pieces = []
        for mine in self.shards.parts():
            for rank, file in enumerate(files):
                offset = 0
                for part in written.parts(rank):
                    start, stop = max(mine.start, part.start), min(mine.stop, part.stop)
                    if start < stop:
                        shift = offset - part.start
                        pieces.append(file.get_slice(name)[start + shift : stop + shift])
                    offset += part.stop - part.start
        return torch.cat(pieces)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is complete or absent, and synced to the disk when it appears."""
    spooled = path.with_name(f".{path.name}")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, spooled)
    sync(spooled)
    spooled.replace(path)
    sync(path.parent)
