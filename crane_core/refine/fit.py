"""Staged RCA: fit the weights on mini-batches, then run the whole catalog through them in chunks.

In memory for experiments (`refine_catalog`), or from file to file, on one or many ranks and with restart
(`refine_to_files`), for catalogs of any size.
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
from torch import Tensor, nn

from crane_core.config import Refine
from crane_core.dataset.interactions import ItemLists
from crane_core.errors import DataError, TrainingError
from crane_core.progress import track
from crane_core.refine.recursion import Correlation, GramKeys, Keys, Recursion, RecursiveCrossModalAttention, slices
from crane_core.storage.local import LocalStorage
from crane_core.storage.matrix import open_matrix

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Modality:
    """Features of the catalog and of the users in one modality.

    Attributes:
        name: its name.
        items: float32 or float16 [num_items, dim], standardised.
        present: bool [num_items].
        profiles: float32 [num_users, dim], sum or mean over the user's training items.
        counts: int [num_users], items in each profile.
    """

    name: str
    items: np.ndarray
    present: np.ndarray
    profiles: np.ndarray
    counts: np.ndarray


class Refiner(nn.Module):
    """Projection of every modality, RCA, and the fusion `F = [X_1 ; ... ; X_M] W_F`.

    Args:
        dims: width of each modality.
        profile_scales: what each modality's profiles are divided by. Sums grow with the number of items; one
            constant per modality brings a typical profile to the length of an item row and keeps the differences
            in intensity between users.
        config: sizes and kernel.
    """

    def __init__(self, dims: list[int], profile_scales: list[float], config: Refine) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        dim = config.embedding_dim
        self.weights = nn.ParameterList(
            (torch.rand(width, dim, generator=generator) * 2 - 1) * (6 / (width + dim)) ** 0.5 for width in dims
        )
        self.biases = nn.Parameter(torch.zeros(len(dims), dim))
        self.missing = nn.Parameter(torch.randn(len(dims), dim, generator=generator) * 0.01)
        self.register_buffer("profile_scales", torch.tensor(profile_scales))
        correlation = Correlation(
            config.phi,
            config.num_lists,
            config.num_probes,
            config.num_attention_landmarks,
            config.seed,
            config.precision,
        )
        self.rca = RecursiveCrossModalAttention(len(dims), dim, config.num_recursions, correlation, generator)
        # Fusion starts as the plain average of the modalities.
        self.fusion = nn.Parameter(torch.eye(dim).repeat(len(dims), 1) / len(dims))

    def project(self, rows: list[Tensor], present: list[Tensor]) -> Tensor:
        """`X_m = raw_m W_m + b_m`, a learned vector where the modality is missing.

        Args:
            rows: per modality float32 [n, dim_m].
            present: per modality bool [n].

        Returns:
            float32 [n, M, d].
        """
        projected = [
            torch.where(mask[:, None], block @ self.weights[m] + self.biases[m], self.missing[m])
            for m, (block, mask) in enumerate(zip(rows, present, strict=True))
        ]
        return torch.stack(projected, dim=1)

    def fuse(self, rows: Tensor) -> Tensor:
        """`[X_1 ; ... ; X_M] W_F`: float [n, M, d] -> [n, d]."""
        return rows.flatten(1) @ self.fusion


def profile_scales(modalities: list[Modality]) -> list[float]:
    """For each modality, mean length of the non-empty profiles over mean length of the present item rows."""
    scales = []
    for modality in modalities:
        profiles = _mean_norm(modality.profiles, modality.counts > 0)
        items = _mean_norm(modality.items, modality.present)
        scales.append(profiles / items if profiles > 0 and items > 0 else 1.0)
    return scales


def fit(
    modalities: list[Modality], train: ItemLists, aggregate: str, config: Refine, device: torch.device = CPU
) -> tuple[Refiner, dict[str, Any]]:
    """Fit projection, RCA and fusion on mini-batches of (user, item) rows.

    The refined profile of a user *without the target item* must rank the target above a sample of the catalog
    (sampled softmax over cosines; the user's other items are no negatives), and the modalities of one item must
    agree (InfoNCE). The sample also serves as the keys of RCA.

    Args:
        modalities: features and profiles.
        train: training items per user.
        aggregate: how the profiles were made, `sum` or `mean`.
        config: optimiser and sizes.
        device: where to fit.

    Returns:
        The fitted refiner, on the device, and its curve and monitors as JSON values.

    Raises:
        DataError: there is no item, or a feature that the fit meets is not finite.
        TrainingError: the loss is not finite.
    """
    num_items = len(modalities[0].items)
    if num_items == 0:
        raise DataError("There is no item to refine.", "Widen the window or deliver features.")
    refiner = Refiner([m.items.shape[1] for m in modalities], profile_scales(modalities), config).to(device)
    optimiser = torch.optim.Adam(refiner.parameters(), lr=config.learning_rate)
    generator = np.random.default_rng(config.seed)
    train_users = train.users()
    curve = []
    for step in track(range(config.num_steps), config.num_steps, "fit_rca", logger):
        picked = generator.integers(len(train.items), size=config.batch_size)
        users, targets = train_users[picked], train.items[picked]
        landmarks = generator.choice(num_items, size=min(config.num_landmarks, num_items), replace=False)
        candidates = np.unique(np.concatenate([targets, landmarks]))
        queries = torch.cat(
            [
                refiner.project(*_profiles_without(modalities, users, targets, aggregate, refiner)),
                refiner.project(*_item_rows(modalities, candidates, device)),
            ]
        )
        keys = refiner.project(*_item_rows(modalities, landmarks, device))
        _, refined = refiner.rca(keys, queries, config.chunk_size)
        fused = F.normalize(refiner.fuse(refined), dim=1)
        logits = fused[: len(users)] @ fused[len(users) :].T / config.temperature
        columns = torch.from_numpy(np.searchsorted(candidates, targets))
        logits = logits.masked_fill(_other_positives(train, users, candidates, columns).to(device), -torch.inf)
        columns = columns.to(device)
        ranking = F.cross_entropy(logits, columns)
        distinct = np.searchsorted(candidates, np.unique(targets))
        agreement = _agreement(refined[len(users) :][distinct], modalities, candidates[distinct], config.temperature)
        loss = ranking + config.agreement_weight * agreement
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == config.num_steps - 1:
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"The loss of the RCA fit is {loss.item()} at step {step}.", "Lower refine.learning_rate."
                )
            curve.append({"step": step, "ranking": ranking.item(), "agreement": float(agreement.detach())})
    return refiner.eval(), {"curve": curve}


def project_items(refiner: Refiner, modalities: list[Modality], rows: np.ndarray | slice) -> Tensor:
    """Projections of some items, float32 [n, M, d].

    Raises:
        DataError: a feature is not finite.
    """
    return refiner.project(*_item_rows(modalities, rows, refiner.fusion.device))


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
        for part in _tracked(slices(len(rows), chunk_size), f"project_{name}"):
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
            for part in _tracked(slices(len(rows), chunk_size), f"rca_{number}_{name}"):
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
    rank, num_ranks = _ranks()
    device, shape = refiner.fusion.device, (len(modalities), refiner.fusion.shape[1])
    sizes = {"users": len(modalities[0].profiles), "items": len(modalities[0].items)}
    chunks = [(name, part) for name in sizes for part in slices(sizes[name], chunk_size)]
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
        return _to(device, np.array(open_matrix(sources[name])[part]))

    if frozen:
        keys = frozen(step)
    else:
        keys = _prepare(recursion, refiner.rca.correlation, lambda part: read("items", part), num_items, chunk_size)
        if keep_keys and _ranks()[0] == 0:
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
    rank, num_ranks = _ranks()
    shares = [slice(num_items * r // num_ranks, num_items * (r + 1) // num_ranks) for r in range(num_ranks)]
    mine = slices(shares[rank].stop, chunk_size, shares[rank].start)
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


def _ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _tracked(work: list[Any], event: str) -> Iterator[Any]:
    return track(work, len(work), event, logger)


def _projection(refiner: Refiner, modalities: list[Modality], name: str) -> Callable[[slice], Tensor]:
    """Rows of `items` or `users` to their projections, float32 [n, M, d]."""
    if name == "items":
        return lambda part: project_items(refiner, modalities, part)
    return lambda part: refiner.project(*_user_rows(modalities, part, refiner))


def _item_rows(
    modalities: list[Modality], rows: np.ndarray | slice, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    return (
        # Widened where they are used: half precision halves the way to a GPU.
        [_to(device, _finite(m.items[rows], m.name, "items")).float() for m in modalities],
        [_to(device, m.present[rows]) for m in modalities],
    )


def _user_rows(
    modalities: list[Modality], rows: np.ndarray | slice, refiner: Refiner
) -> tuple[list[Tensor], list[Tensor]]:
    device, scales = refiner.fusion.device, refiner.get_buffer("profile_scales")
    return (
        [_to(device, _finite(m.profiles[rows], m.name, "users")) / scales[i] for i, m in enumerate(modalities)],
        [_to(device, m.counts[rows] > 0) for m in modalities],
    )


def _finite(rows: np.ndarray, modality: str, whose: str) -> np.ndarray:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DataError(
            f"Modality {modality} has NaN or infinity in {bad.sum()} of {len(rows)} rows of {whose} that were read.",
            "Run etl.features and etl.profiles again: they set such rows aside.",
        )
    return rows


def _to(device: torch.device, rows: np.ndarray) -> Tensor:
    """A copy of rows of a memory map, on the device; through page-locked memory when that is a GPU."""
    host = torch.from_numpy(np.array(rows))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _profiles_without(
    modalities: list[Modality], users: np.ndarray, targets: np.ndarray, aggregate: str, refiner: Refiner
) -> tuple[list[Tensor], list[Tensor]]:
    """Profile rows with the target item taken out; absent where nothing is left."""
    device, scales = refiner.fusion.device, refiner.get_buffer("profile_scales")
    rows, present = [], []
    for index, modality in enumerate(modalities):
        counts = modality.counts[users].astype(np.float32)[:, None]
        profiles = _finite(modality.profiles[users], modality.name, "users")
        sums = profiles * (counts if aggregate == "mean" else 1.0)
        left = counts - modality.present[targets, None]
        without = sums - np.where(modality.present[targets, None], modality.items[targets], 0)
        if aggregate == "mean":
            without = without / np.maximum(left, 1)
        rows.append(_to(device, np.where(left > 0, without, 0).astype(np.float32)) / scales[index])
        present.append(_to(device, left[:, 0] > 0))
    return rows, present


def _other_positives(train: ItemLists, users: np.ndarray, candidates: np.ndarray, columns: Tensor) -> Tensor:
    """bool [users, candidates]: the user's training items, the target itself excepted."""
    rows, items = train.rows(users)
    found = np.searchsorted(candidates, items)
    hit = candidates[np.minimum(found, len(candidates) - 1)] == items
    mask = torch.zeros(len(users), len(candidates), dtype=torch.bool)
    mask[torch.from_numpy(rows[hit]), torch.from_numpy(found[hit])] = True
    mask[torch.arange(len(users)), columns] = False
    return mask


def _agreement(rows: Tensor, modalities: list[Modality], items: np.ndarray, temperature: float) -> Tensor:
    """InfoNCE between every two modalities of the same items, over the items that have both."""
    total = rows.new_zeros(())
    pairs = [(a, b) for a in range(len(modalities)) for b in range(a)]
    for a, b in pairs:
        both = torch.from_numpy(modalities[a].present[items] & modalities[b].present[items]).to(rows.device)
        if both.any():
            left, right = F.normalize(rows[both, a], dim=1), F.normalize(rows[both, b], dim=1)
            total = total + F.cross_entropy(left @ right.T / temperature, torch.arange(len(left), device=rows.device))
    return total / max(len(pairs), 1)


def _mean_norm(rows: np.ndarray, keep: np.ndarray) -> float:
    picked = np.flatnonzero(keep)[:100_000]
    # Squares leave half precision long before the numbers do.
    return float(np.linalg.norm(rows[picked].astype(np.float32), axis=1).mean()) if len(picked) else 0.0


def _sample(length: int, most: int = 2000) -> Tensor:
    """Rows spread evenly over the catalog: int64 [n]."""
    return torch.linspace(0, length - 1, min(most, length)).long()


def _mean_cosine(rows: Tensor, refiner: Refiner) -> float:
    """Mean cosine between the fused rows of some items, float32 [n, M, d]."""
    picked = F.normalize(refiner.fuse(rows), dim=1)
    size = len(picked)
    return float((picked.sum(0).square().sum() - size) / (size * (size - 1))) if size > 1 else 1.0
