"""Initial weights: their bound, their spread and their seed."""

from __future__ import annotations

import pytest
import torch

from crane_core.numerics.initial import xavier, xavier_rows


@pytest.mark.parametrize("shape", [(300, 100), (4, 300, 100)])
def test_weights_fill_the_range_of_glorot_and_bengio(shape: tuple[int, ...]) -> None:
    """Uniform in plus or minus sqrt(6 / 400), whatever comes before the last two sizes."""
    weights = xavier(shape, torch.Generator().manual_seed(0))
    bound = 0.015**0.5
    assert (weights.shape, weights.dtype) == (shape, torch.float32)
    assert 0.99 * bound < weights.max() <= bound and -0.99 * bound > weights.min() >= -bound
    assert weights.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_the_generator_alone_decides() -> None:
    first, second = (xavier((3, 2), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kept", [slice(0, 70_000), slice(65_000, 65_600), slice(69_999, 70_000), slice(5, 5)])
def test_rows_that_are_kept_are_those_of_the_whole(kept: slice) -> None:
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    assert torch.equal(xavier_rows((70_000, 3), kept, first), xavier((70_000, 3), second)[kept])
    assert torch.equal(first.get_state(), second.get_state())
