"""Recursions against the dense formula."""

import pytest
import torch
from torch import Tensor

from crane_core.refine.attention import Correlation
from crane_core.refine.recursion import RecursiveCrossModalAttention
from tests.worlds.dense_attention import (
    EVERY,
    dense,
    relative_error,
    rows,
)


@EVERY
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_recursions_equal_the_dense_formula_and_its_gradients(correlation: Correlation, num_modalities: int) -> None:
    dim, num_recursions = 4, 3
    generator = torch.Generator().manual_seed(5)
    rca = RecursiveCrossModalAttention(num_modalities, dim, num_recursions, correlation, generator).double()
    for parameter in rca.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    items, users = rows(6, 19, num_modalities, dim), rows(7, 8, num_modalities, dim)

    def attended(queries: Tensor, keys: Tensor) -> Tensor:
        return dense(queries, keys, correlation)

    def reference(items: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        for weights in rca.recursions:
            joint = torch.cat([items[:, m] for m in range(num_modalities)], dim=1) @ weights.joint + weights.joint_bias
            refined = [
                torch.stack(
                    [
                        x[:, m] + torch.relu(attended(x[:, m] @ weights.correlation[m], joint) @ weights.hidden[m])
                        for m in range(num_modalities)
                    ],
                    dim=1,
                )
                for x in (items, users)
            ]
            items, users = refined
        return items, users

    results = []
    for compute in (lambda i, u: rca(i, u, chunk_size=5), reference):
        rca.zero_grad()
        outputs = compute(items, users)
        sum((output * output).sum() for output in outputs).backward()
        results.append([*(o.detach() for o in outputs), *(p.grad.clone() for p in rca.parameters())])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


def test_no_recursion_leaves_rows_alone() -> None:
    rca = RecursiveCrossModalAttention(2, 3, 0, Correlation("softmax"), torch.Generator())
    items, users = torch.ones(4, 2, 3), torch.ones(5, 2, 3)
    refined = rca(items, users)
    assert refined[0] is items
    assert refined[1] is users
