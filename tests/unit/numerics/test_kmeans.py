"""k-means against clusters of random centres."""

import torch
from torch import Tensor

from crane_core.numerics.kmeans import cluster
from tests.worlds.dense_attention import rows


def test_the_lists_are_tighter_than_cells_of_random_keys() -> None:
    keys = rows(23, 600, 2)

    def spread(clusters: Tensor) -> float:
        parts = [keys[clusters == number] for number in clusters.unique()]
        return sum(float((part - part.mean(0)).square().sum()) for part in parts)

    random = keys[torch.randperm(600, generator=torch.Generator().manual_seed(4))[:12]]
    assert spread(cluster(keys, 12, seed=4)) < 0.9 * spread(torch.cdist(keys, random).argmin(1))
