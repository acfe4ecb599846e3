"""Measure the share of neighbours that would change if RCA were built anew on the whole catalog."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.modalities import Modality
from crane_core.graph.exact import search
from crane_core.refine.growth import Anchors
from crane_core.refine.refiner import Refiner, project_items


@torch.no_grad()
def drift(refiner: Refiner, anchors: Anchors, modalities: list[Modality], k: int, chunk_size: int) -> float:
    """Return the share of neighbours that differ between the kept keys and the keys of this run, on a sample of items.

    The sample holds the anchors and as large a share of the items that are new since RCA was built. Its rows are
    refined twice: by the kept keys (those of the anchors as they were), and by the keys of the sample itself. The keys
    of every recursion are the rows of the recursion before.

    Args:
        refiner: with the weights that were kept.
        anchors: sample of the items that RCA was built on.
        modalities: features of this run.
        k: number of neighbours.
        chunk_size: rows at a time.
    """
    num_items, num_built = len(modalities[0].items), anchors.num_built
    share = min(num_items - num_built, round((num_items - num_built) * len(anchors.items) / num_built))
    new = np.random.default_rng(0).choice(np.arange(num_built, num_items), share, replace=False)
    device = refiner.fusion.device
    now = project_items(refiner, modalities, np.concatenate([anchors.items, np.sort(new)])).to(device)
    own, _ = refiner.rca(now, now[:0], chunk_size)
    _, kept = refiner.rca(torch.from_numpy(np.array(anchors.projections)).to(device), now, chunk_size)
    ours, theirs = (_neighbours(refiner, rows, k) for rows in (kept, own))
    if ours.shape[1] == 0:
        return 0.0
    return 1.0 - float((ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean())


def _neighbours(refiner: Refiner, rows: Tensor, k: int) -> np.ndarray:
    return search(refiner.fuse(rows).cpu().numpy(), range(len(rows)), k)[0]
