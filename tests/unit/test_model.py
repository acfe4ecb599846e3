"""The losses, by hand."""

import math

import pytest
import torch

from crane_core.model import Batch, info_nce


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
