"""Monitors of a training: figures that show a failure, and the thresholds of warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.training.curve import GRADIENT, OVERWHELMED

COLLAPSE = 0.02
"""Least effective rank of the users' rows, as a share of the way from 1 to d; below it they have collapsed. LightGCN
under BPR passes through 0.036 (Last.fm 2K, d = 64) while it has learned popularity alone, and recovers."""


def effective_rank(rows: Tensor) -> float:
    """Return how many directions the rows spread over: exp of the entropy of the spectrum of their second moments.

    The spectrum is that of the second-moment matrix of the rows scaled to length 1, divided by its sum: a row's length
    changes neither the user's ranking nor this number. These are the squares of the singular values; the effective rank
    of Roy and Vetterli (EUSIPCO 2007) is the same function of the singular values themselves, which weighs weak
    directions more and is never smaller. O(n d^2), and d x d of memory beside the scaled rows.

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


def cosine_moments(rows: Tensor) -> tuple[float, float]:
    """Return mean and variance of the cosines of two different rows, from moments of the scaled rows.

    Args:
        rows: float32 [n, d]; a zero row has cosine 0 to all others.

    Returns:
        The mean is in [-1, 1], and 1 where all rows point one way; the variance is 0 there, and where they collapse.
        Both are 0 where there are fewer than two rows.
    """
    unit = F.normalize(rows, dim=1).double()
    num_pairs = max(len(unit) * (len(unit) - 1), 1)
    squares = unit.square().sum(1)
    mean = float(unit.sum(0).square().sum() - squares.sum()) / num_pairs
    second = float((unit.T @ unit).square().sum() - squares.square().sum()) / num_pairs
    return mean, max(second - mean**2, 0.0)


def warnings_of(entry: Mapping[str, float], dim: int) -> dict[str, str]:
    """Return the warnings that the monitors of an epoch give.

    Args:
        entry: of the curve; monitors that it does not hold give none.
        dim: width of the users' rows.

    Returns:
        A line for the log by the name of the failure.
    """
    found = {}
    rank = entry.get("effective_rank", math.inf)
    if rank < 1 + COLLAPSE * (dim - 1):
        found["collapse"] = (
            f"collapse epoch={entry['epoch']} effective_rank={rank:.2f} dim={dim} "
            f"mean_cosine={entry.get('mean_cosine', math.nan):.3f} "
            f"cosine_variance={entry.get('cosine_variance', math.nan):.2e}"
        )
    ranking = entry.get(f"{GRADIENT}ranking", math.inf)
    for name, norm in entry.items():
        if name.startswith(GRADIENT) and norm > OVERWHELMED * ranking:
            term = name.removeprefix(GRADIENT)
            found[f"overwhelmed by {term}"] = (
                f"overwhelmed epoch={entry['epoch']} term={term} gradient={norm:.2e} ranking_gradient={ranking:.2e}"
            )
    return found


def new_warnings(curve: Sequence[Mapping[str, float]], dim: int) -> list[str]:
    """Return the warnings of the last epoch that the epoch before did not give, a line for the log each.

    Args:
        curve: entries of all epochs so far.
        dim: width of the users' rows.
    """
    *before, last = [warnings_of(entry, dim) for entry in curve[-2:]]
    return [last[name] for name in sorted(set(last) - {name for each in before for name in each})]


def row_monitors(users: Tensor) -> dict[str, float]:
    """Return how alike the rows of the users have grown.

    Args:
        users: float32 [n, d], rows of the users with training interactions.
    """
    mean, variance = cosine_moments(users)
    return {"effective_rank": effective_rank(users), "mean_cosine": mean, "cosine_variance": variance}
