"""Fusion: scores by hand, and a trust that follows the validation split."""

import dataclasses

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.model_config import Choices
from crane_core.training import share as fusion
from crane_core.training.share import SHARES, choose_share, fuse
from tests.worlds.settings import model_config


def rows(seed: int, num_users: int = 61, num_items: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_users, 5, generator=generator), torch.randn(num_items, 5, generator=generator)


def wanted(left: tuple, right: tuple, share: float) -> Interactions:
    """Users whose validation items are the top of a mixture of two models' scores; every item is warm."""
    scores = (1 - share) * left[0] @ left[1].T + share * right[0] @ right[1].T
    top = scores[:60].topk(5, dim=1).indices.numpy()
    users = np.repeat(np.arange(60), 5)
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 60)
    # One more user has met the whole catalog, and nobody is asked about it.
    train = ItemLists.from_pairs(np.full(80, 60), np.arange(80, dtype=np.int32), 61)
    return Interactions(61, 80, train, ItemLists.from_pairs(users, top.ravel(), 61), nothing)


def test_fused_scores_add_up_on_one_scale() -> None:
    behaviour, crane = rows(1), tuple(100 * part for part in rows(2))
    users, items = fuse(behaviour, crane, 0.2)
    left, right = behaviour[0] @ behaviour[1].T, crane[0] @ crane[1].T
    expected = 0.8 * left + 0.2 * right * left.std() / right.std()
    torch.testing.assert_close(users @ items.T, expected, rtol=1e-3, atol=1e-3)
    alone, _ = fuse(behaviour, crane, 1.0)
    assert alone.shape == crane[0].shape


def test_noise_is_not_trusted_and_a_second_opinion_is() -> None:
    behaviour, crane = rows(3), rows(4)
    noise = choose_share(behaviour, crane, wanted(behaviour, crane, 0.0), model_config())
    assert noise.share == 0.0 and noise.rows is behaviour
    both = choose_share(behaviour, crane, wanted(behaviour, crane, 0.5), model_config())
    assert 0.3 <= both.share <= 0.7
    assert both.recall > both.curve[0][1]
    content = choose_share(behaviour, crane, wanted(behaviour, crane, 1.0), model_config())
    assert content.share >= 0.9


def test_without_validation_items_nothing_is_trusted() -> None:
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 60)
    chosen = choose_share(rows(5), rows(6), Interactions(60, 80, nothing, nothing, nothing), model_config())
    assert chosen.share == 0.0


def test_what_recall_cannot_tell_apart_ndcg_decides() -> None:
    behaviour, crane = rows(3), rows(4)
    interactions = wanted(behaviour, crane, 0.5)
    chosen = choose_share(behaviour, crane, interactions, model_config())
    users = interactions.validation_users(100, 0)
    found = {}
    for share in SHARES:
        mixed = fuse(behaviour, crane, share) if share else behaviour
        ranked = rank_users(dot_product(*mixed), interactions.train, users, 20)
        found[share] = user_metrics(ranked, interactions.validation, users, (20,))
    best = max(found.values(), key=lambda metrics: metrics["recall@20"].mean())["recall@20"]
    gaps = {share: best - metrics["recall@20"] for share, metrics in found.items()}
    near = [share for share, gap in gaps.items() if gap.mean() <= gap.std() / len(users) ** 0.5]
    assert len(near) > 1
    assert chosen.share == max(near, key=lambda share: found[share]["ndcg@20"].mean())


@pytest.mark.parametrize(
    ("lead", "ndcg", "expected"),
    [
        pytest.param(0.9, {0.3: 0.6}, 0.3, id="within one standard error NDCG decides"),
        pytest.param(1.1, {0.3: 0.6}, 0.8, id="beyond one it does not"),
        pytest.param(0.0, {}, 0.3, id="the smallest of equals"),
    ],
)
def test_shares_within_one_standard_error_are_one_choice(
    lead: float, ndcg: dict[float, float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over 64 users the lead of 0.8 on 0.3 is `lead` standard errors long; every other share is far behind.
    deviations = np.tile([-0.08, 0.08], 32)
    recalls = {0.8: np.full(64, 0.5), 0.3: 0.5 - lead * 0.01 - deviations}
    shares = iter(SHARES)

    def measured(*_: object) -> dict[str, np.ndarray]:
        share = next(shares)
        return {"recall@20": recalls.get(share, np.zeros(64)), "ndcg@20": np.full(64, ndcg.get(share, 0.5))}

    monkeypatch.setattr(fusion, "user_metrics", measured)
    behaviour, crane = rows(3), rows(4)
    assert choose_share(behaviour, crane, wanted(behaviour, crane, 0.5), model_config()).share == expected


def test_a_given_share_is_taken_as_it_is() -> None:
    behaviour, crane = rows(3), rows(4)
    interactions, config = wanted(behaviour, crane, 0.6), model_config()
    chosen = choose_share(behaviour, crane, interactions, config)
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 61)
    unseen = dataclasses.replace(interactions, validation=nothing)
    for share in (0.0, chosen.share):
        choices = Choices(behaviour_epochs=1, crane_epochs=1, crane_ranking="dot", share=share)
        given = choose_share(behaviour, crane, unseen, config.model_copy(update={"choices": choices}))
        assert (given.share, given.curve) == (share, [])
        expected = chosen.rows if share else behaviour
        assert all(torch.equal(*pair) for pair in zip(given.rows, expected, strict=True))
    assert chosen.share > 0
