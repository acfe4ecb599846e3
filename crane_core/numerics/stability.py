"""Measure how far the distribution of one day differs from that of the days before."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def population_stability_index(expected: Mapping[str, int], found: Mapping[str, int]) -> float:
    """Compute the population stability index of counts by category: the sum over (q - p) ln(q / p).

    By convention, values below 0.1 are stable and values above 0.25 are a shift. Half a row is added to every category
    on both sides, so that a category that is absent on one side gives a finite number.

    Args:
        expected: category to rows of the reference.
        found: category to rows of the distribution compared with it.
    """
    names = sorted({*expected, *found})
    if not names:
        return 0.0
    p, q = (np.array([counts.get(name, 0) for name in names], dtype=np.float64) + 0.5 for counts in (expected, found))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())
