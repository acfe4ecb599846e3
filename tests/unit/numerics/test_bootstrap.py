"""Bootstrap intervals: coverage, pairing, and no users."""

import math

import numpy as np

from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap


def test_bootstrap_covers_the_mean_at_its_rate() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = bootstrap({"x": generator.normal(0.3, 1, size=80)}, 300, seed=trial)["x"]
        hits += interval.low <= 0.3 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_sees_a_small_steady_difference() -> None:
    generator = np.random.default_rng(2)
    reference = {"x": generator.normal(0, 1, size=200)}
    challenger = {"x": reference["x"] + 0.01 + generator.normal(0, 0.01, size=200)}
    interval = paired_bootstrap(challenger, reference, 500, seed=0)["x"]
    assert 0 < interval.low < 0.01 < interval.high


def test_no_users_have_no_interval() -> None:
    assert math.isnan(bootstrap({"x": np.empty(0)}, 100, seed=0)["x"].mean)
