"""The GPU kernels of RCA against float64: on CUDA where there is one, else under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch; to try it on a CPU: pip install triton")

from crane_core.errors import ConfigError
from crane_core.refine import attention_triton as rca_triton
from crane_core.refine.kernels import FusedTanh, attend_groups, attend_groups_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
GROUPS = [(0, 3, 40, 41), (3, 140, 0, 40), (140, 150, 45, 130)]
"""A group of one key, one of more rows than a block, one of more keys; no query attends to keys 41 to 44."""


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, limit: float) -> bool:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max()) < limit


def tanh_dense(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.tanh(queries @ keys.T / queries.shape[1] ** 0.5) @ keys / len(keys)


@pytest.mark.parametrize(("dtype", "limit"), PRECISIONS)
@pytest.mark.parametrize(("num_rows", "num_keys", "dim"), [(1, 1, 64), (150, 70, 64), (40, 200, 6), (20, 65, 128)])
def test_tanh_and_its_gradients(dtype: torch.dtype, limit: float, num_rows: int, num_keys: int, dim: int) -> None:
    inputs = [rows(seed, size, dim).to(dtype) for seed, size in enumerate((num_rows, num_keys, num_rows))]
    exact = [each.double().requires_grad_() for each in inputs[:2]]
    expected = tanh_dense(*exact)
    expected.backward(inputs[2].double())
    given = [each.to(DEVICE).requires_grad_() for each in inputs[:2]]
    found = FusedTanh.apply(*given, 4096)
    found.backward(inputs[2].to(DEVICE))
    assert found.dtype == dtype
    assert close(found.detach(), expected.detach(), limit)
    for each, reference in zip(given, exact, strict=True):
        assert close(each.grad, reference.grad, limit)


@pytest.mark.parametrize(("dtype", "limit"), PRECISIONS)
@pytest.mark.parametrize("scale", [1, 30])
def test_softmax_over_groups_and_its_gradients(dtype: torch.dtype, limit: float, scale: int) -> None:
    queries, keys, incoming = (rows(seed, size, 32).to(dtype) for seed, size in ((3, 150), (4, 130), (5, 150)))
    queries = queries * scale
    exact = [each.double() for each in (queries, keys, incoming)]
    expected, mass = attend_groups(exact[0], exact[1], GROUPS)
    found, found_mass = rca_triton.attend(queries.to(DEVICE), keys.to(DEVICE), GROUPS, "softmax")
    # Wide scores: a rounded one counts by its exponential.
    assert close(found, expected, limit * scale)
    assert close(found_mass, mass, limit)
    gradients = attend_groups_backward(exact[0], exact[2], expected, mass, exact[1], GROUPS)
    statistics = mass.float().to(DEVICE), (exact[2] * expected).sum(1).float().to(DEVICE)
    given = (queries.to(DEVICE), keys.to(DEVICE), incoming.to(DEVICE), statistics, GROUPS)
    backward = rca_triton.attend_backward(*given, "softmax")
    for part, reference in zip(backward, gradients, strict=True):
        assert close(part, reference, limit * scale)
    assert not backward[1][41:45].any()


def test_rows_that_are_too_wide_are_refused() -> None:
    with pytest.raises(ConfigError, match="up to 128 numbers, found 200"):
        rca_triton.attend(rows(6, 2, 200), rows(7, 3, 200), [(0, 2, 0, 3)], "tanh")
