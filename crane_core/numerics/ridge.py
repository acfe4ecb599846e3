"""Ridge regression on dense and on sparse inputs."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


def ridge(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """Return the `X` that makes `|inputs X - targets|^2 + penalty m |X|^2` smallest, with m the mean squared column.

    Args:
        inputs: float [n, d].
        targets: float [n, t].
        penalty: above 0.

    Returns:
        float64 [d, t]; zeros where all inputs are 0.
    """
    inputs, targets = inputs.astype(np.float64), targets.astype(np.float64)
    gram = inputs.T @ inputs
    mean = np.trace(gram) / len(gram)
    if mean == 0:
        return np.zeros((inputs.shape[1], targets.shape[1]))
    return np.linalg.solve(gram + penalty * mean * np.eye(len(gram)), inputs.T @ targets)


def sparse_ridge(inputs: sp.csr_array, targets: np.ndarray, penalty: float, iterations: int) -> np.ndarray:
    """Approach the `X` that makes `|inputs X - targets|^2 + penalty |X|^2` smallest, from 0 by conjugate gradients.

    Args:
        inputs: float [n, m].
        targets: float [n, t].
        penalty: above 0.
        iterations: steps; each multiplies by `inputs` and by its transpose once.

    Returns:
        [m, t], of the targets' type.
    """
    transposed = inputs.T.tocsr()
    found = np.zeros((inputs.shape[1], targets.shape[1]), dtype=targets.dtype)
    left = transposed @ targets
    direction, square = left.copy(), _squares(left)
    for _ in range(iterations):
        image = transposed @ (inputs @ direction) + penalty * direction
        step = _ratio(square, (direction * image).sum(0))
        found += step * direction
        left -= step * image
        before, square = square, _squares(left)
        direction = left + _ratio(square, before) * direction
    return found


def _squares(rows: np.ndarray) -> np.ndarray:
    return (rows * rows).sum(0)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the ratios; 0 where a column is solved and nothing is left to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
