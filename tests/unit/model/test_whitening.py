"""Whitened content against plain numpy; missing modalities, constant features, blocks."""

from __future__ import annotations

import numpy as np
import pytest

from crane_core.model.whitening import fit_whitening
from crane_core.storage import matrix


def features(seed: int = 0) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Two modalities of one width each; a tenth of the rows is missing in each, and a third of the items is cold."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((300, 5)) @ generator.standard_normal((5, 5)) * 40 + 7
    found = []
    for items in (mixed, generator.standard_normal((300, 3))):
        present = generator.random(300) > 0.1
        found.append((np.where(present[:, None], items, np.nan).astype(np.float32), present))
    found[1][1][:3] = found[0][1][:3] = False
    return found, generator.random(300) > 0.3


def by_hand(modalities: list[tuple[np.ndarray, np.ndarray]], is_warm: np.ndarray, most: int) -> np.ndarray:
    parts = []
    for items, present in modalities:
        used = items[present & is_warm].astype(np.float64)
        scale = np.sqrt(((used - used.mean(0)) ** 2).sum(1).mean())
        parts.append(np.where(present[:, None], (items - used.mean(0)) / scale, 0))
    rows = np.concatenate(parts, axis=1)
    variances, axes = np.linalg.eigh(rows[is_warm].T @ rows[is_warm] / is_warm.sum())
    variances, axes = variances[::-1][:most], axes[:, ::-1][:, :most]
    white = rows @ axes / np.sqrt(variances + 0.3 * variances.mean())
    return white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-12)


@pytest.mark.parametrize("most", [4, 8])
def test_rows_equal_those_by_hand_whatever_the_blocks(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modalities, is_warm = features()
    expected = by_hand(modalities, is_warm, most)
    for block_bytes in (matrix.BLOCK_BYTES, 700):
        monkeypatch.setattr(matrix, "BLOCK_BYTES", block_bytes)
        whitening = fit_whitening(modalities, is_warm, most)
        assert whitening is not None
        rows = whitening.rows(modalities).numpy()
        np.testing.assert_allclose(np.abs(rows @ rows.T), np.abs(expected @ expected.T), atol=1e-5)
    assert not rows[:3].any()
    np.testing.assert_allclose(
        np.linalg.norm(rows[3:], axis=1)[np.any([p for _, p in modalities], axis=0)[3:]], 1, 1e-5
    )


def test_features_that_say_nothing_give_no_whitening() -> None:
    everyone, constant = np.ones(20, dtype=bool), np.full((20, 4), 0.1, dtype=np.float32)
    assert fit_whitening([(constant, everyone)], everyone, 4) is None
    assert fit_whitening([(constant, ~everyone)], everyone, 4) is None
    assert fit_whitening([(np.eye(20, dtype=np.float32), everyone)], ~everyone, 4) is None


def test_a_modality_that_is_constant_among_warm_items_is_left_alone() -> None:
    generator = np.random.default_rng(0)
    everyone, is_warm = np.ones(40, dtype=bool), np.arange(40) < 30
    constant = np.where(is_warm[:, None], 0.1, 0.5).astype(np.float32)
    useful = generator.standard_normal((40, 3)).astype(np.float32)
    alone, both = (
        fit_whitening(modalities, is_warm, 8)
        for modalities in ([(useful, everyone)], [(useful, everyone), (constant, everyone)])
    )
    assert alone is not None and both is not None
    rows, expected = (
        each.rows([(useful, everyone), (constant, everyone)][: len(each.means)]) for each in (both, alone)
    )
    np.testing.assert_allclose((rows @ rows.T).numpy(), (expected @ expected.T).numpy(), atol=1e-5)
