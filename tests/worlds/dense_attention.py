"""Attention as the paper writes it, with rows x keys in memory, to compare the kernels with."""

import pytest
import torch
from torch import Tensor

from crane_core.refine.attention import Correlation, ListedKeys

DENSE = (Correlation("softmax"), Correlation("tanh"), Correlation("linear"))

SPARSE = (Correlation("block", num_lists=5, num_probes=2, seed=3), Correlation("landmark", num_landmarks=7, seed=3))

EVERY = pytest.mark.parametrize("correlation", DENSE + SPARSE, ids=lambda correlation: correlation.phi)


def dense(queries: Tensor, keys: Tensor, correlation: Correlation) -> Tensor:
    """The formula as the paper writes it, rows x keys in memory; the sparse forms as a mask of it."""
    scores = queries @ keys.T / queries.shape[1] ** 0.5
    if correlation.phi in ("tanh", "linear"):
        return (torch.tanh(scores) if correlation.phi == "tanh" else scores) @ keys / len(keys)
    if correlation.phi == "landmark":
        picked = torch.randperm(len(keys), generator=torch.Generator().manual_seed(correlation.seed))
        seen = torch.zeros(len(keys), dtype=torch.bool)
        seen[picked[: correlation.num_landmarks]] = True
        scores = scores.masked_fill(~seen, -torch.inf)
    if correlation.phi == "block":
        scores = scores.masked_fill(~in_nearest_lists(queries, keys, correlation), -torch.inf)
    return torch.softmax(scores, dim=1) @ keys


def in_nearest_lists(queries: Tensor, keys: Tensor, correlation: Correlation) -> Tensor:
    """Whether the query attends to the list of each key, bool [n, m]: the lists of the largest mean score."""
    cells = cell_of_each(correlation.prepare(keys))
    scores = (queries @ keys.T).detach()
    means = torch.stack([scores[:, cells == cell].mean(1) for cell in range(int(cells.max()) + 1)], dim=1)
    nearest = means.argsort(dim=1, descending=True)[:, : correlation.num_probes]
    return (cells == nearest[:, :, None]).any(1)


def cell_of_each(lists: ListedKeys) -> Tensor:
    """The list of each key, int64 [m], after a check that every key is in one list."""
    cells = torch.full((lists.bounds[-1],), -1)
    for cell, (start, stop) in enumerate(zip(lists.bounds, lists.bounds[1:], strict=False)):
        assert start < stop
        assert (cells[lists.order[start:stop]] == -1).all()
        cells[lists.order[start:stop]] = cell
    assert (cells >= 0).all()
    return cells


def rows(seed: int, *shape: int) -> Tensor:
    """Seeded standard normal rows, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry."""
    return float((found - expected).abs().max() / expected.abs().max())
