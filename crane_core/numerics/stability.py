"""How far the distribution of one day has moved from that of the days before it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def population_stability_index(expected: Mapping[str, int], found: Mapping[str, int]) -> float:
    """Population stability index of counts by category: sum over (q - p) ln(q / p).

    Below 0.1 is taken for stable and above 0.25 for a shift. Every category counts half a row more on both sides, so
    that one which is new or gone gives a finite number.

    Args:
        expected: category to rows of the reference.
        found: category to rows of what is compared with it.
    """
    names = sorted({*expected, *found})
    if not names:
        return 0.0
    p, q = (np.array([counts.get(name, 0) for name in names], dtype=np.float64) + 0.5 for counts in (expected, found))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())
