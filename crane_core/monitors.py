"""What goes wrong with rows while they are learned, in numbers: rows that grow alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_rank(rows: Tensor) -> float:
    """How many directions the rows spread over: exp of the entropy of the spectrum (Roy and Vetterli, EUSIPCO 2007).

    Of the eigenvalues of the second-moment matrix of the rows scaled to length 1, divided by their sum: a row's
    length changes neither the user's ranking nor this number. O(n d^2), and d x d of memory beside the scaled rows.

    Args:
        rows: float32 [n, d].

    Returns:
        1 where all rows lie on one line, d where they spread evenly; 0 where every row is zero.
    """
    unit = F.normalize(rows, dim=1)
    spectrum = torch.linalg.eigvalsh((unit.T @ unit).double()).clamp(min=0)
    if not spectrum.sum() > 0:
        return 0.0
    return float(torch.special.entr(spectrum / spectrum.sum()).sum().exp())


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine of two different rows, from the sum of the scaled rows: no pair is computed.

    Args:
        rows: float32 [n, d]; a zero row has cosine 0 to all others.

    Returns:
        In [-1, 1]; 1 where all rows point one way, and 0 where there are fewer than two rows.
    """
    unit = F.normalize(rows, dim=1).double()
    num_rows = len(unit)
    squares = float(unit.sum(0).square().sum() - unit.square().sum())
    return squares / max(num_rows * (num_rows - 1), 1)
