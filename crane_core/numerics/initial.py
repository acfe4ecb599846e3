"""Draw the initial weights of a layer."""

from __future__ import annotations

import torch
from torch import Tensor


def xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw weights from the uniform distribution of Glorot and Bengio (2010), float32; the last two sizes count."""
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
