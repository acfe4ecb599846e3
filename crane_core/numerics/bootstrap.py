"""Confidence intervals by the bootstrap over users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over users and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(values: Mapping[str, np.ndarray], num_resamples: int, seed: int) -> dict[str, Interval]:
    """Compute percentile bootstrap intervals of means over users. All columns share the resamples, so they are paired.

    Args:
        values: name to float [n]; with n = 0 the intervals are NaN.
        num_resamples: number of resamples.
        seed: seed of the resampling.
    """
    table = np.stack([np.asarray(column, dtype=np.float64) for column in values.values()], axis=1)
    num_users = len(table)
    if num_users == 0:
        return {name: Interval(np.nan, np.nan, np.nan) for name in values}
    generator = np.random.default_rng(seed)
    means = np.empty((num_resamples, table.shape[1]))
    step = max(1, 4_000_000 // num_users)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        picks = generator.integers(num_users, size=(size, num_users))
        offsets = np.arange(size)[:, None] * num_users
        weights = np.bincount((picks + offsets).ravel(), minlength=size * num_users).reshape(size, num_users)
        means[start : start + size] = weights @ table / num_users
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    center = table.mean(axis=0)
    return {name: Interval(float(center[i]), float(low[i]), float(high[i])) for i, name in enumerate(values)}


def paired_bootstrap(
    challenger: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], num_resamples: int, seed: int
) -> dict[str, Interval]:
    """Compute intervals of the mean difference challenger - reference over the same users, for every shared metric."""
    differences = {name: challenger[name] - reference[name] for name in challenger if name in reference}
    return bootstrap(differences, num_resamples, seed)
