"""Staged RCA: fit the weights on mini-batches, then run the whole catalog through them in chunks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crane_core.config import Refine
from crane_core.dataset import ItemLists
from crane_core.progress import track
from crane_core.rca import Correlation, Keys, Recursion, RecursiveCrossModalAttention

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Modality:
    """Features of the catalog and of the users in one modality.

    Attributes:
        name: its name.
        items: float32 [num_items, dim], standardised.
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
            config.phi, config.num_lists, config.num_probes, config.num_attention_landmarks, config.seed
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


def fit(modalities: list[Modality], train: ItemLists, aggregate: str, config: Refine) -> tuple[Refiner, dict[str, Any]]:
    """Fit projection, RCA and fusion on mini-batches of (user, item) rows.

    The refined profile of a user *without the target item* must rank the target above a sample of the catalog
    (sampled softmax over cosines; the user's other items are no negatives), and the modalities of one item must
    agree (InfoNCE). The sample also serves as the keys of RCA.

    Args:
        modalities: features and profiles.
        train: training items per user.
        aggregate: how the profiles were made, `sum` or `mean`.
        config: optimiser and sizes.

    Returns:
        The fitted refiner, and its curve and monitors as JSON values.
    """
    num_items = len(modalities[0].items)
    refiner = Refiner([m.items.shape[1] for m in modalities], profile_scales(modalities), config)
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
                refiner.project(*_item_rows(modalities, candidates)),
            ]
        )
        keys = refiner.project(*_item_rows(modalities, landmarks))
        _, refined = refiner.rca(keys, queries, config.chunk_size)
        fused = F.normalize(refiner.fuse(refined), dim=1)
        logits = fused[: len(users)] @ fused[len(users) :].T / config.temperature
        columns = torch.from_numpy(np.searchsorted(candidates, targets))
        logits = logits.masked_fill(_other_positives(train, users, candidates, columns), -torch.inf)
        ranking = F.cross_entropy(logits, columns)
        distinct = np.searchsorted(candidates, np.unique(targets))
        agreement = _agreement(refined[len(users) :][distinct], modalities, candidates[distinct], config.temperature)
        loss = ranking + config.agreement_weight * agreement
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == config.num_steps - 1:
            curve.append({"step": step, "ranking": ranking.item(), "agreement": float(agreement.detach())})
    return refiner.eval(), {"curve": curve}


@torch.no_grad()
def refine_catalog(refiner: Refiner, modalities: list[Modality], chunk_size: int) -> tuple[Tensor, Tensor, list[float]]:
    """Run every item and every user through the refiner, a chunk of rows at a time.

    Beyond the rows it returns it holds one recursion's keys, [num_items, d], and what a chunk needs.

    Args:
        refiner: fitted.
        modalities: features and profiles.
        chunk_size: rows per chunk.

    Returns:
        item rows float32 [num_items, M, d], user rows float32 [num_users, M, d], and the mean cosine between
        the fused rows of random items before the first and after each recursion: towards 1 the rows grow alike.
    """
    num_items, num_users = len(modalities[0].items), len(modalities[0].profiles)
    shape = (len(modalities), refiner.fusion.shape[1])
    items, users = torch.empty(num_items, *shape), torch.empty(num_users, *shape)
    for part in _chunks(num_items, chunk_size, "project_items"):
        items[part] = refiner.project(*_item_rows(modalities, np.arange(part.start, part.stop)))
    for part in _chunks(num_users, chunk_size, "project_users"):
        users[part] = refiner.project(*_user_rows(modalities, np.arange(part.start, part.stop), refiner))
    likeness = [_mean_cosine(items, refiner)]
    for _ in refine_rows(refiner.rca, items, users, chunk_size):
        likeness.append(_mean_cosine(items, refiner))
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
        keys = rca.correlation.prepare(recursion.joint_rows(items))
        for name, rows in (("users", users), ("items", items)):
            for part in _chunks(len(rows), chunk_size, f"rca_{number}_{name}"):
                rows[part] = recursion.refine(rows[part], keys, chunk_size)
        yield keys


def _chunks(length: int, chunk_size: int, event: str) -> Iterable[slice]:
    parts = [slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]
    return track(parts, len(parts), event, logger)


def _item_rows(modalities: list[Modality], rows: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [torch.from_numpy(np.asarray(m.items[rows])) for m in modalities],
        [torch.from_numpy(np.asarray(m.present[rows])) for m in modalities],
    )


def _user_rows(modalities: list[Modality], rows: np.ndarray, refiner: Refiner) -> tuple[list[Tensor], list[Tensor]]:
    scales = refiner.get_buffer("profile_scales")
    return (
        [torch.from_numpy(np.asarray(m.profiles[rows])) / scales[i] for i, m in enumerate(modalities)],
        [torch.from_numpy(np.asarray(m.counts[rows]) > 0) for m in modalities],
    )


def _profiles_without(
    modalities: list[Modality], users: np.ndarray, targets: np.ndarray, aggregate: str, refiner: Refiner
) -> tuple[list[Tensor], list[Tensor]]:
    """Profile rows with the target item taken out; absent where nothing is left."""
    scales = refiner.get_buffer("profile_scales")
    rows, present = [], []
    for index, modality in enumerate(modalities):
        counts = modality.counts[users].astype(np.float32)[:, None]
        sums = modality.profiles[users] * (counts if aggregate == "mean" else 1.0)
        left = counts - modality.present[targets, None]
        without = sums - np.where(modality.present[targets, None], modality.items[targets], 0)
        if aggregate == "mean":
            without = without / np.maximum(left, 1)
        rows.append(torch.from_numpy(np.where(left > 0, without, 0).astype(np.float32)) / scales[index])
        present.append(torch.from_numpy(left[:, 0] > 0))
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
        both = torch.from_numpy(modalities[a].present[items] & modalities[b].present[items])
        if both.any():
            left, right = F.normalize(rows[both, a], dim=1), F.normalize(rows[both, b], dim=1)
            total = total + F.cross_entropy(left @ right.T / temperature, torch.arange(len(left)))
    return total / max(len(pairs), 1)


def _mean_norm(rows: np.ndarray, keep: np.ndarray) -> float:
    picked = np.flatnonzero(keep)[:100_000]
    return float(np.linalg.norm(rows[picked], axis=1).mean()) if len(picked) else 0.0


def _mean_cosine(rows: Tensor, refiner: Refiner, sample: int = 2000) -> float:
    picked = rows[torch.linspace(0, len(rows) - 1, min(sample, len(rows))).long()]
    picked = F.normalize(refiner.fuse(picked), dim=1)
    size = len(picked)
    return float((picked.sum(0).square().sum() - size) / (size * (size - 1))) if size > 1 else 1.0
