"""Run the whole catalog through a fitted refiner in chunks.

In memory for experiments (`refine_catalog`), or from file to file, on one or many ranks and with restart
(`refine_to_files`), for catalogs of any size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
from crane_core.refine.fit import logger
from crane_core.refine.recursion import Recursion, RecursiveCrossModalAttention
from crane_core.refine.refiner import Refiner, project_items, to_device, user_rows
from crane_core.storage.local import LocalStorage
from crane_core.storage.matrix import open_matrix


@torch.no_grad()
def refine_catalog(refiner: Refiner, modalities: list[Modality], chunk_size: int) -> tuple[Tensor, Tensor, list[float]]:
    """Run every item and every user through the refiner, a chunk of rows at a time, in memory.

    Beyond the rows it returns it holds one recursion's keys, [num_items, d], and what a chunk needs.

    Args:
        refiner: fitted, on the CPU.
        modalities: features and profiles.
        chunk_size: rows per chunk.

    Returns:
        item rows float32 [num_items, M, d], user rows float32 [num_users, M, d], and the mean cosine between
        the fused rows of random items before the first and after each recursion: towards 1 the rows grow alike.

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
    """Replace the rows by the refined ones where they are, one recursion at a time.

    Args:
        rca: weights and phi.
        items: float32 [num_items, M, d].
        users: float32 [num_users, M, d].
        chunk_size: rows per chunk.

    Yields:
        the keys of the recursion just finished.
    """
    for number, recursion in enumerate(rca.recursions, start=1):
        assert isinstance(recursion, Recursion)
        # Once the keys are made, refining a row takes only itself and them.
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

    Step 0 projects, step r is recursion r. Each reads the files of the step before and writes its own, a chunk at a
    time, so that a rank holds one recursion's keys, [num_items, d], and what a chunk needs, whatever the size of the
    catalog. The chunks are dealt to the ranks; the keys are gathered, or the Gram matrices of `linear` added, once
    per recursion. Killed at any moment and called again with the same arguments, on any number of ranks, it goes on
    behind the last step that is whole and without the chunks of the next one that are written.

    Args:
        refiner: fitted, the same on every rank, on the rank's device.
        modalities: features and profiles.
        chunk_size: rows per chunk.
        folder: shared by the ranks; holds `refined_files` and the state to go on from, twice the rows in all.
        frozen: a recursion, counted from 1, to its keys; without it they are made of the items here.
        keep_keys: leave what `Correlation.restore` makes these keys from again in `keys_file`.

    Returns:
        The mean cosine before the first and after each recursion, as `refine_catalog`.

    Raises:
        DataError: a feature is not finite.
    """
    rank, num_ranks = ranks()
    device, shape = refiner.fusion.device, (len(modalities), refiner.fusion.shape[1])
    sizes = {"users": len(modalities[0].profiles), "items": len(modalities[0].items)}
    chunks = [(name, part) for name in sizes for part in row_chunks(sizes[name], chunk_size)]
    mine = range(len(chunks) * rank // num_ranks, len(chunks) * (rank + 1) // num_ranks)
    folder.mkdir(parents=True, exist_ok=True)
    state = LocalStorage(folder)
    likeness: list[float] = []
    for step in range(len(refiner.rca.recursions) + 1):
        done = state.read(f"step-{step}.json")
        if done:
            likeness = json.loads(done)
            continue
        targets, written = refined_files(folder, step), folder / f"step-{step}.written"
        if rank == 0 and not written.exists():
            for name, size in sizes.items():
                np.lib.format.open_memmap(targets[name], "w+", np.float32, (size, *shape))
            state.write(written.name, bytes(len(chunks)))
        if num_ranks > 1:
            dist.barrier()
        transform = _step(refiner, modalities, step, sizes["items"], chunk_size, folder, frozen, keep_keys)
        flags = np.memmap(written, bool, "r+")
        left = [number for number in mine if not flags[number]]
        if len(left) < len(mine):
            logger.info("resume step=%d written=%d total=%d", step, len(mine) - len(left), len(mine))
        for number in _tracked(left, f"rca_{step}" if step else "project"):
            name, part = chunks[number]
            # Mapped for this chunk alone: what was written leaves the resident memory with it.
            np.load(targets[name], mmap_mode="r+")[part] = transform(name, part).cpu().numpy()
            flags[number] = True
        if num_ranks > 1:
            dist.barrier()
        sample = torch.from_numpy(open_matrix(targets["items"])[_sample(sizes["items"]).numpy()])
        likeness = [*likeness, _mean_cosine(sample.to(device), refiner)]
        if rank == 0:
            state.write(f"step-{step}.json", json.dumps(likeness).encode())
    return likeness


def refined_files(folder: Path, step: int) -> dict[str, Path]:
    """Where `refine_to_files` leaves the rows of a step, `items` and `users`: float32 [n, M, d].

    The step after the next one takes its place.
    """
    return {name: folder / f"{name}-{step % 2}.npy" for name in ("items", "users")}


def keys_file(folder: Path, recursion: int) -> Path:
    """Where the source of a recursion's keys is left, float32 [m, d]."""
    return folder / f"keys-{recursion}.npy"


def _step(
    refiner: Refiner,
    modalities: list[Modality],
    step: int,
    num_items: int,
    chunk_size: int,
    folder: Path,
    frozen: Callable[[int], Keys] | None,
    keep_keys: bool,
) -> Callable[[str, slice], Tensor]:
    """What makes a chunk of a step: of `items` or `users`, float32 [n, M, d]."""
    if step == 0:
        projections = {name: _projection(refiner, modalities, name) for name in ("items", "users")}
        return lambda name, part: projections[name](part)
    recursion = refiner.rca.recursions[step - 1]
    assert isinstance(recursion, Recursion)
    sources, device = refined_files(folder, step - 1), refiner.fusion.device

    def read(name: str, part: slice) -> Tensor:
        return to_device(device, np.array(open_matrix(sources[name])[part]))

    if frozen:
        keys = frozen(step)
    else:
        keys = _prepare(recursion, refiner.rca.correlation, lambda part: read("items", part), num_items, chunk_size)
        if keep_keys and ranks()[0] == 0:
            np.save(keys_file(folder, step), keys.source.cpu().numpy())
    return lambda name, part: recursion.refine(read(name, part), keys, chunk_size)


def _prepare(
    recursion: Recursion,
    correlation: Correlation,
    items: Callable[[slice], Tensor],
    num_items: int,
    chunk_size: int,
) -> Keys:
    """The keys of a recursion; on several ranks each reads a share of the items, and they exchange what they made.

    Args:
        recursion: its weights.
        correlation: phi.
        items: rows to float32 [n, M, d] on the device.
        num_items: m.
        chunk_size: rows read at a time.
    """
    rank, num_ranks = ranks()
    shares = [slice(num_items * r // num_ranks, num_items * (r + 1) // num_ranks) for r in range(num_ranks)]
    mine = row_chunks(shares[rank].stop, chunk_size, shares[rank].start)
    width = recursion.joint.shape[1]
    if correlation.phi == "linear":
        # In float64, so that the cut into chunks and ranks does not show in the sum.
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
    """Rows of `items` or `users` to their projections, float32 [n, M, d]."""
    if name == "items":
        return lambda part: project_items(refiner, modalities, part)
    return lambda part: refiner.project(*user_rows(modalities, part, refiner))


def _sample(length: int, most: int = 2000) -> Tensor:
    """Rows spread evenly over the catalog: int64 [n]."""
    return torch.linspace(0, length - 1, min(most, length)).long()


def _mean_cosine(rows: Tensor, refiner: Refiner) -> float:
    """Mean cosine between the fused rows of some items, float32 [n, M, d]."""
    picked = F.normalize(refiner.fuse(rows), dim=1)
    size = len(picked)
    return float((picked.sum(0).square().sum() - size) / (size * (size - 1))) if size > 1 else 1.0
