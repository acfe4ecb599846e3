"""Projection of wide modalities: the axes of scikit-learn, in blocks, fitted on training rows only."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA, TruncatedSVD

from crane_core.dataset.standardisation import fit_projection, fit_standardisation, projected, standardised
from crane_core.storage import matrix


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float32]:
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 8 * 6 * 17)
    rng = np.random.default_rng(0)
    return (rng.standard_normal((100, 6)) * [5, 3, 2, 1, 0.5, 0.1] + 2).astype(np.float32)


def project(rows: NDArray, present: NDArray[np.bool_], used: NDArray[np.bool_], width: int, kind: str):
    axes = fit_projection(standardised(rows, present, "none", {}), used, width, kind)
    blocks = [values for _, values in projected(standardised(rows, present, "none", {}), present, axes)]
    return axes, np.concatenate(blocks)


def test_axes_are_those_of_scikit_learn(rows: NDArray[np.float32]) -> None:
    used = np.arange(100) < 70
    present = np.ones(100, dtype=bool)
    for kind, model in (("pca", PCA(3)), ("svd", TruncatedSVD(3, algorithm="arpack"))):
        axes, found = project(rows, present, used, 3, kind)
        model.fit(rows[used].astype(np.float64))
        expected = model.transform(rows.astype(np.float64))
        signs = np.sign((expected * found).sum(axis=0))
        np.testing.assert_allclose(found, expected * signs, rtol=1e-6, atol=1e-6)
        assert axes["axes"].shape == (3, 6) and (axes["axes"].max(axis=1) >= -axes["axes"].min(axis=1)).all()
    axes, _ = project(rows, present, used, 3, "pca")
    assert axes["explained"] == pytest.approx(PCA(3).fit(rows[used]).explained_variance_ratio_.sum(), rel=1e-5)


def test_only_training_rows_decide_and_missing_rows_stay_zero(rows: NDArray[np.float32]) -> None:
    used = np.arange(100) < 70
    present = np.arange(100) != 80
    other = rows.copy()
    other[70:] += 1000
    axes, found = project(rows, present, used, 2, "pca")
    again, moved = project(other, present, used, 2, "pca")
    assert axes["axes"].tobytes() == again["axes"].tobytes()
    assert found[:70].tobytes() == moved[:70].tobytes() and (moved[81:] != found[81:]).all()
    assert (found[80] == 0).all() and (found[79] != 0).any()


def test_only_items_with_training_interactions_are_fitted_on() -> None:
    raw = np.array([[1.0, 5.0], [3.0, 5.0], [1e6, -1e6], [7e6, 0.0]], dtype=np.float32)
    present, is_train = np.array([True, True, True, False]), np.array([True, True, False, True])
    fitted = fit_standardisation(raw, present, is_train, "zscore")
    assert fitted["mean"].tolist() == [2.0, 5.0] and fitted["scale"].tolist() == [1.0, 1.0]
