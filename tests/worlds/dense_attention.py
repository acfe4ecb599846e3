"""Attention by the formula of the paper, with all scores in memory, as the reference for kernels and keys."""

import pytest
import torch
from torch import Tensor

from crane_core.refine.attention import Correlation, ListedKeys

DENSE = (Correlation("softmax"), Correlation("tanh"), Correlation("linear"))

SPARSE = (Correlation("block", num_lists=5, num_probes=2, seed=3), Correlation("landmark", num_landmarks=7, seed=3))

EVERY = pytest.mark.parametrize("correlation", DENSE + SPARSE, ids=lambda correlation: correlation.phi)


def dense(queries: Tensor, keys: Tensor, correlation: Correlation) -> Tensor:
    """Compute attention by the formula of the paper; the sparse forms mask scores."""
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
    """Mark the keys in the lists that each query attends to, those with the largest mean scores: bool [n, m]."""
    numbers = list_of_each(correlation.prepare(keys))
    scores = (queries @ keys.T).detach()
    means = torch.stack([scores[:, numbers == number].mean(1) for number in range(int(numbers.max()) + 1)], dim=1)
    nearest = means.argsort(dim=1, descending=True)[:, : correlation.num_probes]
    return (numbers == nearest[:, :, None]).any(1)


def list_of_each(lists: ListedKeys) -> Tensor:
    """Return the list of each key, int64 [m]; check that every key is in one list."""
    numbers = torch.full((lists.bounds[-1],), -1)
    for number, (start, stop) in enumerate(zip(lists.bounds, lists.bounds[1:], strict=False)):
        assert start < stop
        assert (numbers[lists.order[start:stop]] == -1).all()
        numbers[lists.order[start:stop]] = number
    assert (numbers >= 0).all()
    return numbers


def rows(seed: int, *shape: int) -> Tensor:
    """Draw standard normal rows, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Divide the largest difference by the largest expected entry."""
    return float((found - expected).abs().max() / expected.abs().max())
