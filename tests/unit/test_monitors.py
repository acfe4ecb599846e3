"""Monitors: numbers by hand, against every pair, and what they say of rows that are alike."""

import math

import pytest
import torch

from crane_core.monitors import effective_rank, mean_cosine


def test_effective_rank_by_hand() -> None:
    # Three rows along one axis and one along the other: the spectrum is 3/4, 1/4.
    rows = torch.tensor([[1.0, 0.0], [5.0, 0.0], [-2.0, 0.0], [0.0, 0.1]])
    assert effective_rank(rows) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert effective_rank(rows[:3]) == pytest.approx(1.0)
    assert effective_rank(3 * torch.eye(7)) == pytest.approx(7.0)
    assert effective_rank(torch.zeros(3, 2)) == 0.0
    assert effective_rank(torch.zeros(0, 2)) == 0.0


def test_mean_cosine_by_hand() -> None:
    half = 1 / math.sqrt(2)
    # Cosines: 0 between the axes, 1 / sqrt2 from either to the diagonal.
    assert mean_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])) == pytest.approx(2 * half / 3)
    assert mean_cosine(torch.tensor([[1.0, 1.0], [9.0, 9.0]])) == pytest.approx(1.0)
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-4.0, 0.0]])) == pytest.approx(-1.0)
    assert mean_cosine(torch.ones(1, 2)) == mean_cosine(torch.ones(0, 2)) == 0.0


def test_both_equal_the_plain_formula() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    rows[7] = 0
    unit = (rows / rows.norm(dim=1, keepdim=True)).nan_to_num().double()
    cosines = [float(unit[i] @ unit[j]) for i in range(50) for j in range(50) if i != j]
    assert mean_cosine(rows) == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)
    shares = torch.linalg.svdvals(unit) ** 2 / 49
    assert effective_rank(rows) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)
