"""LightGCN: how items are ranked under either loss."""

from __future__ import annotations

import pytest
import torch

from crane_core.model.lightgcn import POWERS, LightGCN
from crane_core.model.views import Views
from tests.unit.model.test_crane import graph
from tests.worlds.settings import model_config


def lightgcn(loss: str) -> LightGCN:
    return LightGCN(1, 3, model_config(embedding_dim=2), loss)  # type: ignore[arg-type]


FINAL = torch.tensor([[3.0, 4.0], [0.0, 2.0], [12.0, 16.0], [-4.0, 3.0]])


def test_under_softmax_items_rank_by_cosine_times_a_power_of_their_length() -> None:
    found = lightgcn("softmax").rankings(Views(FINAL, FINAL, None), graph())
    assert list(found) == ["length^0", "length^0.25", "length^0.5", "length^0.75", "length^1"]
    for power, (users, items) in zip(POWERS, found.values(), strict=True):
        # Cosines 0.8, 1 and 0; lengths 2, 20 and 5.
        assert (users @ items.T)[0].tolist() == pytest.approx([0.8 * 2**power, 20**power, 0.0], abs=1e-6)


def test_under_bpr_items_rank_by_dot_product() -> None:
    ((users, items),) = lightgcn("bpr").rankings(Views(FINAL, FINAL, None), graph()).values()
    assert (users @ items.T)[0].tolist() == [8.0, 100.0, 0.0]


def test_under_softmax_the_length_of_a_user_decides_nothing() -> None:
    model, scaled = lightgcn("softmax"), FINAL * torch.tensor([[7.0], [1.0], [1.0], [1.0]])
    before, after = (model.rankings(Views(rows, rows, None), graph()) for rows in (FINAL, scaled))
    for name, (users, items) in before.items():
        torch.testing.assert_close(after[name][0] @ after[name][1].T, users @ items.T)
