"""Fusion: scores by hand, and a trust that follows the validation split."""

import numpy as np
import pytest
import torch

from crane_core.config import Train
from crane_core.dataset import Interactions, ItemLists
from crane_core.fusion import choose_trust, fuse, score_spread


def rows(seed: int, num_users: int = 60, num_items: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_users, 5, generator=generator), torch.randn(num_items, 5, generator=generator)


def wanted(left: tuple, right: tuple, share: float) -> Interactions:
    """Users whose validation items are the top of a mixture of two models' scores."""
    scores = (1 - share) * left[0] @ left[1].T + share * right[0] @ right[1].T
    top = scores.topk(5, dim=1).indices.numpy()
    users = np.repeat(np.arange(60), 5)
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 60)
    return Interactions(60, 80, nothing, ItemLists.from_pairs(users, top.ravel(), 60), nothing)


def test_spread_is_the_standard_deviation_of_all_scores() -> None:
    users, items = rows(0)
    assert score_spread(users, items) == pytest.approx((users @ items.T).std(correction=0).item(), rel=1e-5)


def test_fused_scores_add_up_on_one_scale() -> None:
    behaviour, crane = rows(1), tuple(100 * part for part in rows(2))
    users, items = fuse(behaviour, crane, 0.5)
    left, right = behaviour[0] @ behaviour[1].T, crane[0] @ crane[1].T
    expected = left + 0.25 * right * left.std() / right.std()
    torch.testing.assert_close(users @ items.T, expected, rtol=1e-3, atol=1e-3)
    assert fuse(behaviour, crane, 0) is behaviour


def test_noise_is_not_trusted_and_a_second_opinion_is() -> None:
    behaviour, crane = rows(3), rows(4)
    assert choose_trust(behaviour, crane, wanted(behaviour, crane, 0.0), Train()).weight == 0.0
    both = choose_trust(behaviour, crane, wanted(behaviour, crane, 0.5), Train())
    assert 0.7 <= both.weight <= 1.4
    assert both.recall > both.curve[0][1]


def test_without_validation_items_nothing_is_trusted() -> None:
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 60)
    trust = choose_trust(rows(5), rows(6), Interactions(60, 80, nothing, nothing, nothing), Train())
    assert trust.weight == 0.0
