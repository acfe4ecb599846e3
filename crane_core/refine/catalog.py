"""Run the whole catalog through a fitted refiner in chunks.

`refine_catalog` works in memory, for experiments. `refine_to_files` works from file to file, on one or many ranks and
with restart, for catalogs of any size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from crane_core.dataset.modalities import Modality
from crane_core.numerics.kmeans import row_chunks
from crane_core.progress import track
from crane_core.ranks import ranks
from crane_core.refine.attention import Correlation, GramKeys, Keys
from crane_core.refine.recursion import Recursion, RecursiveCrossModalAttention
from crane_core.refine.refiner import Refiner, project_items, to_device, user_rows
from crane_core.storage.local import LocalStorage
from crane_core.storage.matrix import open_matrix

logger = logging.getLogger(__name__)


@torch.no_grad()
def refine_catalog(refiner: Refiner, modalities: list[Modality], chunk_size: int) -> tuple[Tensor, Tensor, list[float]]:
    """Run every item and every user through the refiner, a chunk of rows at a time, in memory.

    Besides the rows that it returns, it holds the keys of one recursion, [num_items, d], and one chunk.

    Args:
        refiner: fitted, on the CPU.
        modalities: features and profiles.
        chunk_size: rows per chunk.

    Returns:
        item rows float32 [num_items, M, d], user rows float32 [num_users, M, d], and the mean cosine between the
        fused rows of sampled items, before the first and after each recursion. Near 1, all rows are alike.

    Raises:
        DataError: a feature is not finite.
    """
    num_items, num_users = len(modalities[0].items), len(modalities[0].profiles)
    shape = (len(modalities), refiner.fusion.shape[1])
    items, users = torch.empty(num_items, *shape), torch.empty(num_users, *shape)
    for name, rows in (("users", users), ("items", items)):
        project = _projection(refiner, modalities, name)
        for part in _tracked(row_chunks(len(rows), chunk_size), f"project_{name}"):
            rows[part] = project(part)
    likeness = [_mean_cosine(items[_sample(num_items)], refiner)]
    for _ in refine_rows(refiner.rca, items, users, chunk_size):
        likeness.append(_mean_cosine(items[_sample(num_items)], refiner))
    return items, users, likeness


@torch.no_grad()
def refine_rows(rca: RecursiveCrossModalAttention, items: Tensor, users: Tensor, chunk_size: int) -> Iterator[Keys]:
    """Replace the rows by the refined rows, in place and one recursion at a time.

    Args:
        rca: weights and phi.
        items: float32 [num_items, M, d].
        users: float32 [num_users, M, d].
        chunk_size: rows per chunk.

    Yields:
        the keys of each recursion, after it.
    """
    for number, recursion in enumerate(rca.recursions, start=1):
        assert isinstance(recursion, Recursion)
        # With the keys made, a refined row depends on itself and the keys only, so it may replace the row.
        keys = _prepare(recursion, rca.correlation, items.__getitem__, len(items), chunk_size)
        for name, rows in (("users", users), ("items", items)):
            for part in _tracked(row_chunks(len(rows), chunk_size), f"rca_{number}_{name}"):
                rows[part] = recursion.refine(rows[part], keys, chunk_size)
        yield keys


@torch.no_grad()
def refine_to_files(
    refiner: Refiner,
    modalities: list[Modality],
    chunk_size: int,
    folder: Path,
    frozen: Callable[[int], Keys] | None = None,
    keep_keys: bool = False,
) -> list[float]:
    """Run every item and every user through the refiner from file to file; every rank calls it.

    Step 0 projects, step r is recursion r. Each step reads the files of the step before and writes its own, a chunk at
    a time. A rank therefore holds the keys of one recursion, [num_items, d], and one chunk, whatever the size of the
    catalog. Each rank takes a share of the chunks. Once per recursion the ranks gather the keys, or for `linear` add
    their Gram matrices.

    A call that was killed can be repeated with the same arguments on any number of ranks. It skips the steps that are
    complete and the chunks of the next step that are written.

    Args:
        refiner: fitted, the same on every rank, on the rank's device.
        modalities: features and profiles.
        chunk_size: rows per chunk.
        folder: shared by the ranks. Holds `refined_files` of two steps and the state for a restart.
        frozen: returns the keys of a recursion, counted from 1. Without it the keys are made from the items.
        keep_keys: write the source of the keys, for `Correlation.restore`, to `keys_file`.

    Returns:
        The mean cosine before the first and after each recursion, as `refine_catalog`.

    Raises:
        DataError: a feature is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _FileRun(refiner, modalities, chunk_size, folder, frozen, keep_keys)
    state = LocalStorage(folder)
    likeness: list[float] = []
    for step in range(len(refiner.rca.recursions) + 1):
        done = state.read(f"step-{step}.json")
        if done:
            likeness = json.loads(done)
            continue
        run.write_step(step, state)
        items = open_matrix(refined_files(folder, step)["items"])
        sample = torch.from_numpy(items[_sample(len(items)).numpy()])
        likeness = [*likeness, _mean_cosine(sample.to(refiner.fusion.device), refiner)]
        if ranks()[0] == 0:
            state.write(f"step-{step}.json", json.dumps(likeness).encode())
    return likeness


def refined_files(folder: Path, step: int) -> dict[str, Path]:
    """Return the files with the rows of a step, `items` and `users`: float32 [n, M, d].

    The step after the next one overwrites them.
    """
    return {name: folder / f"{name}-{step % 2}.npy" for name in ("items", "users")}


def keys_file(folder: Path, recursion: int) -> Path:
    """Return the file with the source of the keys of a recursion, float32 [m, d]."""
    return folder / f"keys-{recursion}.npy"


@dataclass(frozen=True)
class _FileRun:
    """The arguments of `refine_to_files`, and one step of it."""

    refiner: Refiner
    modalities: list[Modality]
    chunk_size: int
    folder: Path
    frozen: Callable[[int], Keys] | None
    keep_keys: bool

    def write_step(self, step: int, state: LocalStorage) -> None:
        """Write this rank's chunks of a step that are not written yet; return when every rank has done so."""
        rank, num_ranks = ranks()
        sizes = {"users": len(self.modalities[0].profiles), "items": len(self.modalities[0].items)}
        chunks = [(name, part) for name in sizes for part in row_chunks(sizes[name], self.chunk_size)]
        mine = range(len(chunks) * rank // num_ranks, len(chunks) * (rank + 1) // num_ranks)
        targets, written = refined_files(self.folder, step), self.folder / f"step-{step}.written"
        if rank == 0 and not written.exists():
            shape = (len(self.modalities), self.refiner.fusion.shape[1])
            for name, size in sizes.items():
                np.lib.format.open_memmap(targets[name], "w+", np.float32, (size, *shape))
            state.write(written.name, bytes(len(chunks)))
        if num_ranks > 1:
            dist.barrier()
        transform = self._transform(step)
        flags = np.memmap(written, bool, "r+")
        left = [number for number in mine if not flags[number]]
        if len(left) < len(mine):
            logger.info("resume step=%d written=%d total=%d", step, len(mine) - len(left), len(mine))
        for number in _tracked(left, f"rca_{step}" if step else "project"):
            name, part = chunks[number]
            # Mapped anew for each chunk: pages of the chunks before then no longer count as resident memory.
            np.load(targets[name], mmap_mode="r+")[part] = transform(name, part).cpu().numpy()
            flags[number] = True
        if num_ranks > 1:
            dist.barrier()

    def _transform(self, step: int) -> Callable[[str, slice], Tensor]:
        """Return the function from `items` or `users` and a chunk to its rows after a step, float32 [n, M, d]."""
        if step == 0:
            projections = {name: _projection(self.refiner, self.modalities, name) for name in ("items", "users")}
            return lambda name, part: projections[name](part)
        recursion = self.refiner.rca.recursions[step - 1]
        assert isinstance(recursion, Recursion)
        sources, device = refined_files(self.folder, step - 1), self.refiner.fusion.device

        def read(name: str, part: slice) -> Tensor:
            return to_device(device, np.array(open_matrix(sources[name])[part]))

        if self.frozen:
            keys = self.frozen(step)
        else:
            correlation, num_items = self.refiner.rca.correlation, len(self.modalities[0].items)
            keys = _prepare(recursion, correlation, lambda part: read("items", part), num_items, self.chunk_size)
            if self.keep_keys and ranks()[0] == 0:
                np.save(keys_file(self.folder, step), keys.source.cpu().numpy())
        return lambda name, part: recursion.refine(read(name, part), keys, self.chunk_size)


def _prepare(
    recursion: Recursion,
    correlation: Correlation,
    items: Callable[[slice], Tensor],
    num_items: int,
    chunk_size: int,
) -> Keys:
    """Make the keys of a recursion. On several ranks, each reads a share of the items and sends its keys to the others.

    Args:
        recursion: its weights.
        correlation: phi.
        items: reads a slice of the items, float32 [n, M, d] on the device.
        num_items: m.
        chunk_size: rows read at a time.
    """
    rank, num_ranks = ranks()
    shares = [slice(num_items * r // num_ranks, num_items * (r + 1) // num_ranks) for r in range(num_ranks)]
    mine = row_chunks(shares[rank].stop, chunk_size, shares[rank].start)
    width = recursion.joint.shape[1]
    if correlation.phi == "linear":
        # In float64, so that the split into chunks and ranks does not change the float32 result.
        products = recursion.joint.new_zeros((width, width), dtype=torch.float64)
        for part in mine:
            joint = recursion.joint_rows(items(part)).double()
            products.addmm_(joint.T, joint)
        if num_ranks > 1:
            dist.all_reduce(products)
        return GramKeys.of(products, num_items, recursion.joint.dtype)
    keys = recursion.joint.new_empty((num_items, width))
    for part in mine:
        keys[part] = recursion.joint_rows(items(part))
    if num_ranks == 1:
        return correlation.prepare(keys)
    for source, share in enumerate(shares):
        if share.start < share.stop:
            dist.broadcast(keys[share], source)
    return correlation.prepare(keys, agree=lambda tensor: dist.broadcast(tensor, 0))


def _tracked(work: list[Any], event: str) -> Iterator[Any]:
    return track(work, len(work), event, logger)


def _projection(refiner: Refiner, modalities: list[Modality], name: str) -> Callable[[slice], Tensor]:
    """Return the function from a slice of `items` or `users` to their projections, float32 [n, M, d]."""
    if name == "items":
        return lambda part: project_items(refiner, modalities, part)
    return lambda part: refiner.project(*user_rows(modalities, part, refiner))


def _sample(length: int, most: int = 2000) -> Tensor:
    """Spread rows evenly over the catalog: int64 [n]."""
    return torch.linspace(0, length - 1, min(most, length)).long()


def _mean_cosine(rows: Tensor, refiner: Refiner) -> float:
    """Return the mean cosine between the fused rows of different items, given as float32 [n, M, d]."""
    picked = F.normalize(refiner.fuse(rows), dim=1)
    size = len(picked)
    return float((picked.sum(0).square().sum() - size) / (size * (size - 1))) if size > 1 else 1.0
