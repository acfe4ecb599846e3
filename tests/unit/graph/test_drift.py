"""Drift: exact with anchors for every item, and near that from a sample."""

import numpy as np
import pytest
import torch

from crane_core.config import Refine
from crane_core.graph.drift import drift
from crane_core.graph.exact import search
from crane_core.refine import growth
from crane_core.refine.catalog import refine_catalog
from crane_core.refine.growth import Anchors
from crane_core.refine.refiner import Refiner, project_items
from tests.worlds.catalogs import catalog


@pytest.mark.parametrize("phi", ["softmax", "tanh", "linear", "block", "landmark"])
def test_drift_is_what_keeping_the_keys_costs(phi: str) -> None:
    """With anchors for every item, the share of neighbours in which two whole refinements differ."""
    config = Refine(phi=phi, embedding_dim=8, num_recursions=2, seed=1)
    refiner = Refiner([6, 5], [1.0, 1.0], config)
    then, now = catalog(200), catalog(300, changed=(3, 4), shift=1.5)
    anchors = Anchors.choose(refiner, then, 0)
    assert anchors.items.tolist() == list(range(200)) and anchors.num_built == 200
    with torch.no_grad():
        _, kept = refiner.rca(torch.from_numpy(anchors.projections), project_items(refiner, now, np.arange(300)))
        own = refine_catalog(refiner, now, 512)[0]
        lists = [search(refiner.fuse(rows).numpy(), range(300), 5)[0] for rows in (kept, own)]
    differ = 1 - (lists[0][:, :, None] == lists[1][:, None, :]).any(axis=2).mean()
    found = drift(refiner, anchors, now, 5, 512)
    assert found == pytest.approx(differ) and found > 0
    assert drift(refiner, anchors, catalog(200), 5, 64) == 0


def test_drift_from_a_sample_is_near_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    refiner = Refiner([6, 5], [1.0, 1.0], Refine(phi="softmax", embedding_dim=8, num_recursions=2))
    now, found = catalog(300, shift=1.5), {}
    for size in (100, 200):
        monkeypatch.setattr(growth, "NUM_ANCHORS", size)
        found[size] = drift(refiner, Anchors.choose(refiner, catalog(200), 0), now, 5, 64)
    assert found[200] > 0.05 and found[100] == pytest.approx(found[200], rel=0.5)
