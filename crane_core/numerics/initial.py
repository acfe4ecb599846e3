"""Draw the initial weights of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ROWS = 1 << 16
"""Rows that are drawn at a time where only some are kept."""


def xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw weights from the uniform distribution of Glorot and Bengio (2010), float32; the last two sizes count."""
    return _scaled(torch.rand(shape, generator=generator), shape)


def xavier_rows(shape: tuple[int, int], kept: slice, generator: torch.Generator) -> Tensor:
    """Return some rows of what `xavier` draws; memory holds these and one block.

    All rows are drawn, so that a row does not depend on which others are kept.

    Args:
        shape: of all rows.
        kept: consecutive rows.
        generator: of the draw; it ends where `xavier` would leave it.
    """
    rows = torch.empty(kept.stop - kept.start, shape[1])
    for start in range(0, shape[0], _BLOCK_ROWS):
        block = torch.rand(min(_BLOCK_ROWS, shape[0] - start), shape[1], generator=generator)
        first, last = max(start, kept.start), min(start + len(block), kept.stop)
        if first < last:
            rows[first - kept.start : last - kept.start] = block[first - start : last - start]
    return _scaled(rows, shape)


def _scaled(uniform: Tensor, shape: tuple[int, ...]) -> Tensor:
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return (uniform * 2 - 1) * bound
