"""Measure how many neighbours a catalog refined anew would replace."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.modalities import Modality
from crane_core.graph.exact import search
from crane_core.refine.refiner import Refiner, project_items


@torch.no_grad()
def drift(
    refiner: Refiner,
    anchors: np.ndarray,
    then: np.ndarray,
    num_then: int,
    modalities: list[Modality],
    k: int,
    chunk_size: int,
) -> float:
    """Share of the neighbours that keys of today would replace, among a sample of the items.

    The sample holds the anchors, and as large a share of the items that are new since. Its rows are refined by the keys
    that were kept, those of the anchors as they were, and by its own, every recursion by the rows of the one before.

    Args:
        refiner: with the weights that were kept.
        anchors: int [n], item numbers.
        then: float32 [n, M, d], the anchors' projections when RCA was built.
        num_then: number of items then.
        modalities: features of today.
        k: neighbours.
        chunk_size: rows at a time.
    """
    num_items = len(modalities[0].items)
    share = min(num_items - num_then, round((num_items - num_then) * len(anchors) / num_then))
    new = np.random.default_rng(0).choice(np.arange(num_then, num_items), share, replace=False)
    device = refiner.fusion.device
    now = project_items(refiner, modalities, np.concatenate([anchors, np.sort(new)])).to(device)
    own, _ = refiner.rca(now, now[:0], chunk_size)
    _, kept = refiner.rca(torch.from_numpy(np.array(then)).to(device), now, chunk_size)
    ours, theirs = (_neighbours(refiner, rows, k) for rows in (kept, own))
    if ours.shape[1] == 0:
        return 0.0
    return 1.0 - float((ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean())


def _neighbours(refiner: Refiner, rows: Tensor, k: int) -> np.ndarray:
    return search(refiner.fuse(rows).cpu().numpy(), range(len(rows)), k)[0]
