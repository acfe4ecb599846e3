"""The k largest scores, against a full sort."""

from __future__ import annotations

import pytest
import torch

from crane_core.numerics.top_k import FEWEST_GROUPS, GROUP, top_k


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("num_columns", [60, 5 * FEWEST_GROUPS * GROUP, 50 * FEWEST_GROUPS * GROUP + 77])
@pytest.mark.parametrize("scattered", [True, False])
def test_they_are_those_of_a_full_sort(k: int, num_columns: int, scattered: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(9, num_columns, generator=generator)
    scores[1] = -torch.inf
    scores[2, k // 2 :] = -torch.inf
    scores[3] = scores[3].sort().values  # the largest in the last columns, behind the last whole group
    scores[4] = scores[4].sort(descending=True).values
    before = scores.clone()
    values, columns = top_k(scores, k, scattered)
    assert torch.equal(scores, before)
    assert torch.equal(values, scores.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(scores.gather(1, columns), values)
    assert all(len(row.unique()) == k for row in columns)


def test_equal_scores_are_all_columns_of_the_row() -> None:
    scores = torch.zeros(3, 5 * FEWEST_GROUPS * GROUP)
    values, columns = top_k(scores, 5)
    assert (values == 0).all() and all(len(row.unique()) == 5 for row in columns)
