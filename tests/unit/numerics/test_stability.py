from __future__ import annotations

import math

import numpy as np
import pytest

from crane_core.numerics.stability import population_stability_index


def test_index_by_hand() -> None:
    """With 3.5 and 1.5 rows against 1.5 and 3.5: (0.4 ln(7/3)) twice."""
    assert population_stability_index({"a": 3, "b": 1}, {"a": 1, "b": 3}) == pytest.approx(0.8 * math.log(7 / 3))


def test_equal_shares_have_none_and_new_categories_a_finite_one() -> None:
    assert population_stability_index({"a": 100, "b": 300}, {"a": 100, "b": 300}) == 0
    assert population_stability_index({}, {}) == 0
    assert 0.25 < population_stability_index({"a": 1000}, {"a": 500, "b": 500}) < 10


def test_samples_of_one_distribution_are_stable_and_others_are_not() -> None:
    rng = np.random.default_rng(0)

    def sample(shares: list[float], size: int) -> dict[str, int]:
        return {str(n): int(count) for n, count in enumerate(rng.multinomial(size, shares))}

    shares = [0.4, 0.3, 0.2, 0.1]
    assert population_stability_index(sample(shares, 20_000), sample(shares, 2000)) < 0.02
    assert population_stability_index(sample(shares, 20_000), sample(shares[::-1], 2000)) > 0.25
