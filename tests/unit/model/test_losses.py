"""The losses by hand, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crane_core.model.losses import bpr, info_nce, sampled_softmax
from crane_core.model.views import Batch, Picked, Sample, SquaredNorms
from tests.worlds.trainings import draw


def test_bpr_by_hand() -> None:
    users = torch.tensor([[1.0, 2.0], [math.log(3), 0.0], [10.0, 0.0]])
    positives = torch.tensor([[3.0, 0.0], [2.0, 5.0], [-50.0, 0.0]])
    negatives = torch.tensor([[1.0, 1.0], [1.0, 7.0], [50.0, 0.0]])
    # Differences 0, log 3 and -1000: -log of 1/2, of 3/4, and a loss that grows linearly without overflow.
    assert bpr(users, positives, negatives).tolist() == pytest.approx([math.log(2), math.log(4 / 3), 1000.0])


def test_sampled_softmax_by_hand() -> None:
    users = torch.tensor([[2.0, 0.0], [0.0, 0.1], [5.0, 5.0]])
    positives = torch.tensor([[3.0, 3.0], [0.0, 7.0], [1.0, -1.0]])
    negatives = torch.tensor([[0.0, 4.0], [9.0, 0.0]])
    met = torch.tensor([[False, False], [True, False], [True, True]])
    # Cosines of the first user: 1/sqrt2 to the positive, 0 and 1 to the negatives; of the second: 1, (1,) 0.
    own = math.exp(1 / math.sqrt(2) / 0.5)
    expected = [-math.log(own / (own + 1 + math.exp(2))), -math.log(math.exp(2) / (math.exp(2) + 1)), 0.0]
    assert sampled_softmax(users, positives, negatives, met, 0.5).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_positive_among_its_own_negatives_would_count_twice() -> None:
    user = torch.tensor([[1.0, 0.0]])
    both = sampled_softmax(user, user, user, torch.tensor([[False]]), 0.2)
    assert both.item() == pytest.approx(math.log(2))


SAMPLED = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
NODES = torch.tensor([1, 0, 1, 3])


@pytest.mark.parametrize(
    "loss",
    [
        bpr,
        lambda users, positives, negatives: sampled_softmax(users, positives, negatives[:4], SAMPLED, 0.3),
        lambda users, positives, negatives: sampled_softmax(
            users[:3], positives, negatives[:4], SAMPLED[:3], 0.3, torch.tensor([2, 0, 2, 2, 1])
        ),
        lambda users, positives, _: info_nce(users, positives, NODES, Batch(NODES, NODES, NODES), 0.3),
        lambda users, positives, _: info_nce(
            users, positives, Sample(torch.tensor([0, 1, 3]), 7), Batch(NODES, NODES, NODES), 0.3
        ),
    ],
    ids=["bpr", "sampled_softmax", "rows of users", "info_nce", "info_nce of a sample"],
)
def test_gradients_of_the_losses(loss: Callable[..., Tensor]) -> None:
    rows = [draw(seed, 5, 3).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(loss, rows)


def test_info_nce_by_hand() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    others = torch.tensor([[3.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    nodes = torch.tensor([1, 0, 1, 1])
    batch = Batch(nodes, nodes, nodes)
    half = 1 / math.sqrt(2)
    # Node 0: cosines 1 to itself, 1/sqrt2 to node 1. Node 1: 0 to node 0, 1/sqrt2 to itself. Node 2 is not there.
    expected = sum(
        -own / 0.5 + math.log(math.exp(own / 0.5) + math.exp(other / 0.5)) for own, other in ((1.0, half), (half, 0.0))
    )
    assert info_nce(anchors, others, nodes, batch, 0.5).item() == pytest.approx(expected / 2)


def test_info_nce_of_the_ranks_adds_up() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, others = torch.randn(2, 20, 4, generator=generator)
    nodes = torch.randint(20, (50,), generator=generator)
    whole = info_nce(anchors, others, nodes, Batch(nodes, nodes, nodes), 0.2)
    parts = sum(info_nce(anchors, others, nodes, Batch(nodes, nodes, nodes, rank, 3), 0.2) for rank in range(3))
    torch.testing.assert_close(parts, whole)


def test_the_negatives_of_a_user_are_scored_once_for_all_rows() -> None:
    users, positives, negatives = (draw(seed, 5, 3).requires_grad_() for seed in range(3))
    rows = torch.tensor([1, 0, 1, 4, 1])
    weights = torch.arange(1.0, 6.0)
    once = sampled_softmax(users, positives, negatives[:4], SAMPLED, 0.3, rows)
    by_row = sampled_softmax(users[rows], positives, negatives[:4], SAMPLED[rows], 0.3)
    torch.testing.assert_close(once, by_row)
    for found, expected in zip(
        *(torch.autograd.grad((weights * loss).sum(), (users, positives, negatives)) for loss in (once, by_row)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_the_contrast_of_a_sample_is_that_of_all_on_average() -> None:
    """Each negative drawn stands for several. All nodes drawn are the whole loss."""
    anchors, others = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nodes = torch.arange(300)
    batch = Batch(nodes, nodes, nodes)
    whole = info_nce(anchors, others, nodes, batch, 0.5)
    torch.testing.assert_close(info_nce(anchors, others, Sample(nodes, 300), batch, 0.5), whole)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(300, generator=generator)[:60].sort().values for _ in range(200)]
    mean = torch.stack([info_nce(anchors, others, Sample(each, 300), batch, 0.5) for each in drawn]).mean()
    assert mean.item() == pytest.approx(whole.item(), abs=0.02)
    # Without the factor the sum would lack four fifths of its negatives.
    plain = torch.stack([info_nce(anchors, others, each, batch, 0.5) for each in drawn]).mean()
    assert plain.item() < whole.item() - 1


def test_a_single_node_has_nothing_to_be_contrasted_with() -> None:
    rows, node = draw(0, 4, 3).requires_grad_(), torch.tensor([2])
    for nodes in (node, Sample(node, 9)):
        loss = info_nce(rows, rows, nodes, Batch(node, node, node), 0.2)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, rows)[0].abs().sum() == 0


@pytest.mark.parametrize("most_waiting", [0, 5, 1000])
def test_gradients_of_picked_rows_and_norms_add_up(most_waiting: int) -> None:
    rows, nodes = draw(0, 6, 3), torch.tensor([4, 0, 4])
    plain, weights = rows.clone().requires_grad_(), draw(1, 3, 3)
    picked, norms = Picked(rows, most_waiting), SquaredNorms(rows)
    for factor in (1.0, 3.0):
        (factor * (plain[nodes] * weights).sum()).backward()
        (factor * (picked[nodes] * weights).sum()).backward()
    torch.testing.assert_close(picked.gradient(), plain.grad)
    torch.testing.assert_close(picked.gradient(), plain.grad)
    plain.grad = None
    for factor in (1.0, 3.0):
        expected, found = plain[nodes].square().sum(), norms.total(nodes)
        torch.testing.assert_close(found, expected)
        (factor * expected).backward()
        (factor * found).backward()
    torch.testing.assert_close(norms.gradient(), plain.grad)
