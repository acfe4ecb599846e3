"""Ridge regression against its closed form."""

import numpy as np
import pytest
import scipy.sparse as sp

from crane_core.numerics.ridge import ridge, sparse_ridge


def world(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(40, 9)) * (generator.random((40, 9)) < 0.4)
    return inputs, generator.normal(size=(40, 3))


def test_the_gradient_vanishes() -> None:
    inputs, targets = world()
    found = ridge(inputs, targets, 0.1)
    penalty = 0.1 * (inputs**2).sum(0).mean()
    np.testing.assert_allclose(inputs.T @ (inputs @ found - targets) + penalty * found, 0, atol=1e-10)


def test_the_penalty_does_not_depend_on_the_scale_of_the_inputs() -> None:
    inputs, targets = world()
    np.testing.assert_allclose(10 * ridge(10 * inputs, targets, 0.1), ridge(inputs, targets, 0.1), rtol=1e-9)


def test_inputs_of_zeros_explain_nothing() -> None:
    assert not ridge(np.zeros((5, 2)), np.ones((5, 3)), 0.1).any()


@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_conjugate_gradients_reach_the_closed_form(penalty: float) -> None:
    inputs, targets = world()
    expected = np.linalg.solve(inputs.T @ inputs + penalty * np.eye(9), inputs.T @ targets)
    np.testing.assert_allclose(sparse_ridge(sp.csr_array(inputs), targets, penalty, 9), expected, atol=1e-8)
    # A solved column stays as it is: there is nothing to divide by.
    again = sparse_ridge(sp.csr_array(inputs), targets * [1, 0, 1], penalty, 40)
    np.testing.assert_allclose(again, expected * [1, 0, 1], atol=1e-8)
