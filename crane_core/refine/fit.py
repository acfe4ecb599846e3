"""Fit the RCA weights on mini-batches of (user, item) rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.config import Refine
from crane_core.dataset.interactions import ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.errors import DataError, TrainingError
from crane_core.progress import track
from crane_core.refine.refiner import CPU, Refiner, finite_rows, item_rows, profile_scales, to_device

logger = logging.getLogger(__name__)


def fit(
    modalities: list[Modality],
    train: ItemLists,
    aggregate: str,
    config: Refine,
    device: torch.device = CPU,
    weights: np.ndarray | None = None,
) -> tuple[Refiner, dict[str, Any]]:
    """Fit projection, RCA and fusion on mini-batches of (user, item) rows.

    The loss has two terms. The refined profile of a user *without the target item* must rank the target above a sample
    of the catalog (sampled softmax over cosines; other items of the user are no negatives). And the modalities of an
    item must agree (InfoNCE). The sample also provides the keys of RCA.

    Args:
        modalities: features and profiles.
        train: training items per user.
        aggregate: `sum` or `mean`, as the profiles were made.
        config: optimiser and sizes.
        device: where to fit.
        weights: float32 [num_train], what each training item counts in the profiles; None where all count 1.

    Returns:
        The fitted refiner on the device, and as JSON values `curve`: `step`, `ranking` and `agreement` of every tenth
        step and the last.

    Raises:
        DataError: there is no item, or a feature that the fit reads is not finite.
        TrainingError: the loss is not finite.
    """
    num_items = len(modalities[0].items)
    if num_items == 0:
        raise DataError(
            "There is no item to refine.",
            "Set window.start earlier, or deliver features/{modality}/*.parquet for the items of the log.",
        )
    refiner = Refiner([m.items.shape[1] for m in modalities], profile_scales(modalities), config).to(device)
    optimiser = torch.optim.Adam(refiner.parameters(), lr=config.learning_rate)
    generator = np.random.default_rng(config.seed)
    train_users = train.users()
    weights = np.ones(len(train.items), dtype=np.float32) if weights is None else weights
    totals = [
        np.bincount(train_users, weights=weights * modality.present[train.items], minlength=train.num_users)
        for modality in modalities
    ]
    curve = []
    for step in track(range(config.num_steps), config.num_steps, "fit_rca", logger):
        picked = generator.integers(len(train.items), size=config.batch_size)
        landmarks = generator.choice(num_items, size=min(config.num_landmarks, num_items), replace=False)
        batch = Batch(train_users[picked], train.items[picked], weights[picked], landmarks)
        profiles = profiles_without(modalities, totals, batch, aggregate, refiner)
        ranking, agreement = _losses(refiner, modalities, profiles, batch, train, config)
        loss = ranking + config.agreement_weight * agreement
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == config.num_steps - 1:
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"The loss of the RCA fit is {loss.item()} at step {step}.",
                    "Lower refine.learning_rate in a new run, for example to a tenth.",
                )
            curve.append({"step": step, "ranking": ranking.item(), "agreement": float(agreement.detach())})
    return refiner.eval(), {"curve": curve}


@dataclass(frozen=True)
class Batch:
    """A mini-batch of (user, target item) pairs and the sample of the catalog they are compared with.

    Attributes:
        users, targets: int [b], row numbers.
        weights: float32 [b], what the target counts in the user's profile.
        landmarks: int [l], distinct items.
    """

    users: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    landmarks: np.ndarray


def _losses(
    refiner: Refiner,
    modalities: list[Modality],
    profiles: tuple[list[Tensor], list[Tensor]],
    batch: Batch,
    train: ItemLists,
    config: Refine,
) -> tuple[Tensor, Tensor]:
    """Return the ranking loss and the agreement loss of a mini-batch; `profiles` come from `profiles_without`."""
    device = refiner.fusion.device
    candidates = np.unique(np.concatenate([batch.targets, batch.landmarks]))
    queries = torch.cat(
        [
            refiner.project(*profiles),
            refiner.project(*item_rows(modalities, candidates, device)),
        ]
    )
    keys = refiner.project(*item_rows(modalities, batch.landmarks, device))
    _, refined = refiner.rca(keys, queries, config.chunk_size)
    num_users = len(batch.users)
    fused = F.normalize(refiner.fuse(refined), dim=1)
    logits = fused[:num_users] @ fused[num_users:].T / config.temperature
    columns = torch.from_numpy(np.searchsorted(candidates, batch.targets))
    logits = logits.masked_fill(_other_positives(train, batch.users, candidates, columns).to(device), -torch.inf)
    ranking = F.cross_entropy(logits, columns.to(device))
    distinct = np.searchsorted(candidates, np.unique(batch.targets))
    agreement = _agreement(refined[num_users:][distinct], modalities, candidates[distinct], config.temperature)
    return ranking, agreement


def profiles_without(
    modalities: list[Modality], totals: list[np.ndarray], batch: Batch, aggregate: str, refiner: Refiner
) -> tuple[list[Tensor], list[Tensor]]:
    """Read the scaled profiles of some users without their target item; not present where no item is left.

    Args:
        modalities: features and profiles.
        totals: per modality float64 [num_users], weight of all items in each profile.
        batch: users and targets.
        aggregate: `sum` or `mean`, as the profiles were made.
        refiner: has the scales.

    Returns:
        per modality float32 [b, dim_m], and bool [b], present.

    Raises:
        DataError: a profile is not finite.
    """
    device, scales = refiner.fusion.device, refiner.get_buffer("profile_scales")
    rows, present = [], []
    for index, modality in enumerate(modalities):
        in_profile = modality.present[batch.targets]
        left = modality.counts[batch.users] - in_profile
        weights = np.where(in_profile, batch.weights, 0)[:, None]
        total = totals[index][batch.users].astype(np.float32)[:, None]
        profiles = finite_rows(modality.profiles[batch.users], modality.name, "users")
        sums = profiles * (total if aggregate == "mean" else 1.0)
        without = sums - weights * np.where(in_profile[:, None], modality.items[batch.targets], 0)
        if aggregate == "mean":
            remaining = total - weights
            without = without / np.where(remaining > 0, remaining, 1)
        is_left = left > 0
        rows.append(to_device(device, np.where(is_left[:, None], without, 0).astype(np.float32)) / scales[index])
        present.append(to_device(device, is_left))
    return rows, present


def _other_positives(train: ItemLists, users: np.ndarray, candidates: np.ndarray, columns: Tensor) -> Tensor:
    """Mark the training items of each user among the candidates, except the target: bool [b, candidates]."""
    rows, items = train.rows(users)
    found = np.searchsorted(candidates, items)
    hit = candidates[np.minimum(found, len(candidates) - 1)] == items
    mask = torch.zeros(len(users), len(candidates), dtype=torch.bool)
    mask[torch.from_numpy(rows[hit]), torch.from_numpy(found[hit])] = True
    mask[torch.arange(len(users)), columns] = False
    return mask


def _agreement(rows: Tensor, modalities: list[Modality], items: np.ndarray, temperature: float) -> Tensor:
    """Return the mean InfoNCE loss between every two modalities, over the items that have both."""
    total = rows.new_zeros(())
    pairs = [(a, b) for a in range(len(modalities)) for b in range(a)]
    for a, b in pairs:
        both = torch.from_numpy(modalities[a].present[items] & modalities[b].present[items]).to(rows.device)
        if both.any():
            left, right = F.normalize(rows[both, a], dim=1), F.normalize(rows[both, b], dim=1)
            total = total + F.cross_entropy(left @ right.T / temperature, torch.arange(len(left), device=rows.device))
    return total / max(len(pairs), 1)
