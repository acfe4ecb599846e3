"""Attention kernels against the dense formula, with gradients, extreme scores and rounding."""

import pytest
import torch

from crane_core.refine.attention import Correlation, attend
from tests.worlds.dense_attention import (
    EVERY,
    dense,
    list_of_each,
    relative_error,
    rows,
)


@EVERY
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_tiles_equal_the_dense_formula_and_its_gradients(correlation: Correlation, chunk_size: int) -> None:
    queries, keys = rows(0, 23, 6), rows(1, 31, 6)
    weight = rows(2, 23, 6)
    results = []
    for compute in (lambda q, k: attend(q, k, correlation, chunk_size), lambda q, k: dense(q, k, correlation)):
        q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        output = compute(q, k)
        (output * weight).sum().backward()
        results.append((output.detach(), q.grad, k.grad))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-12


@EVERY
def test_gradcheck(correlation: Correlation) -> None:
    inputs = (rows(3, 5, 3).requires_grad_(), rows(4, 11, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: attend(q, k, correlation, 2), inputs)


def test_tiled_softmax_equals_the_fused_kernel() -> None:
    """`block` with one list attends to all keys."""
    queries, keys = rows(10, 1500, 5), rows(11, 700, 5)
    tiled = attend(queries, keys, Correlation("block", num_lists=1))
    assert relative_error(tiled, attend(queries, keys, Correlation("softmax"))) < 1e-12


@pytest.mark.parametrize("correlation", [Correlation("softmax"), Correlation("block", num_lists=3, num_probes=3)])
@pytest.mark.parametrize("sign", [1, -1])
def test_softmax_survives_large_scores(correlation: Correlation, sign: int) -> None:
    keys = torch.tensor([[1.0], [3.0], [2.0]])
    output = attend(torch.tensor([[sign * 1e4]]), keys, correlation, chunk_size=1)
    assert output.item() == (3.0 if sign == 1 else 1.0)


def test_tanh_is_exact_near_zero_and_saturates() -> None:
    queries = torch.tensor([[0.0], [1e-6], [-1e-3], [0.5], [-8.0], [1e4], [-1e4]])
    found = attend(queries, torch.ones(1, 1), Correlation("tanh"))
    torch.testing.assert_close(found, torch.tanh(queries.double()).float(), rtol=3e-7, atol=0)


@EVERY
def test_float32_in_tiles_stays_within_1e_5_of_float64(correlation: Correlation) -> None:
    queries, keys = rows(8, 300, 64).float(), rows(9, 500, 64).float()
    found = attend(queries, keys, correlation, chunk_size=64).double()
    if correlation.phi == "block":
        lists = correlation.prepare(keys)
        seen = (list_of_each(lists) == lists.nearest(queries)[:, :, None]).any(1)
        scores = (queries.double() @ keys.double().T / 8).masked_fill(~seen, -torch.inf)
        expected = torch.softmax(scores, dim=1) @ keys.double()
    else:
        expected = dense(queries.double(), keys.double(), correlation)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("phi", ["softmax", "tanh", "block", "landmark"])
def test_bfloat16_rounds_the_inputs_and_sums_in_float32(phi: str) -> None:
    queries, keys = rows(24, 50, 64).float(), rows(25, 400, 64).float()
    found = attend(queries, keys, Correlation(phi, precision="bfloat16"))
    if phi == "block":
        # The lists are those of the keys as they came.
        lists = Correlation(phi).prepare(keys)
        lists.keys = lists.keys.bfloat16().float()
        expected = lists.attend(queries.bfloat16().float())
    else:
        expected = attend(queries.bfloat16().float(), keys.bfloat16().float(), Correlation(phi))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, attend(queries, keys, Correlation(phi)))
