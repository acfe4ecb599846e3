"""Monitors: numbers by hand, against every pair, and when they speak."""

import math

import numpy as np
import pytest
import torch

from crane_core.training.monitors import cosine_moments, effective_rank, warnings_of


def test_effective_rank_by_hand() -> None:
    # Three rows along one axis and one along the other: the spectrum is 3/4, 1/4.
    rows = torch.tensor([[1.0, 0.0], [5.0, 0.0], [-2.0, 0.0], [0.0, 0.1]])
    assert effective_rank(rows) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert effective_rank(rows[:3]) == pytest.approx(1.0)
    assert effective_rank(3 * torch.eye(7)) == pytest.approx(7.0)
    assert effective_rank(torch.zeros(3, 2)) == 0.0
    assert effective_rank(torch.zeros(0, 2)) == 0.0


def test_cosines_by_hand() -> None:
    half = 1 / math.sqrt(2)
    # Cosines: 0 between the axes, 1 / sqrt2 from either to the diagonal.
    mean, variance = cosine_moments(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]))
    assert (mean, variance) == pytest.approx((2 * half / 3, 1 / 3 - 2 / 9))
    assert cosine_moments(torch.tensor([[1.0, 1.0], [9.0, 9.0]])) == pytest.approx((1.0, 0.0))
    assert cosine_moments(torch.tensor([[1.0, 0.0], [-4.0, 0.0]])) == pytest.approx((-1.0, 0.0))
    assert cosine_moments(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-4.0, 0.0]])) == pytest.approx((-1 / 3, 8 / 9))
    assert cosine_moments(torch.ones(1, 2)) == cosine_moments(torch.ones(0, 2)) == (0.0, 0.0)


def test_both_equal_the_plain_formula() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    rows[7] = 0
    unit = (rows / rows.norm(dim=1, keepdim=True)).nan_to_num().double()
    cosines = [float(unit[i] @ unit[j]) for i in range(50) for j in range(50) if i != j]
    assert cosine_moments(rows) == pytest.approx((np.mean(cosines), np.var(cosines)), rel=1e-5)
    shares = torch.linalg.svdvals(unit) ** 2 / 49
    assert effective_rank(rows) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)


def test_effective_rank_is_that_of_squares_and_no_more_than_roy_and_vetterlis() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) * torch.tensor([9.0, 3.0, 1.0, 0.5, 0.1])
    values = torch.linalg.svdvals(torch.nn.functional.normalize(rows, dim=1).double())
    shares = values / values.sum()
    assert 1 < effective_rank(rows) < math.exp(-(shares * shares.log()).sum())


def test_the_signs_of_an_epoch() -> None:
    sound = {
        "epoch": 3,
        "effective_rank": 2.5,
        "mean_cosine": 0.9,
        "cosine_variance": 0.01,
        "gradient_ranking": 0.1,
        "gradient_contrast": 0.19,
        "gradient_regularisation": 0.0,
    }
    assert warnings_of(sound, 64) == {}
    assert warnings_of({"epoch": 3, "loss": 1.0}, 64) == {}
    assert list(warnings_of({"epoch": 3, "effective_rank": 2.0}, 64)) == ["collapse"], "an entry of an earlier version"
    # 1 + 0.02 * 63 is 2.26.
    collapsed = warnings_of(sound | {"effective_rank": 2.2}, 64)
    assert list(collapsed) == ["collapse"]
    assert collapsed["collapse"].startswith("collapse epoch=3 effective_rank=2.20 dim=64")
    overwhelmed = warnings_of(sound | {"gradient_contrast": 0.21}, 64)
    assert list(overwhelmed.values()) == [
        "overwhelmed epoch=3 term=contrast gradient=2.10e-01 ranking_gradient=1.00e-01"
    ]
