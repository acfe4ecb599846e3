"""The GPU kernels of RCA against float64: on CUDA where there is one, else under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="there is no Triton: make setup installs it on Linux")

from crane_core.config import Phi
from crane_core.errors import ConfigError
from crane_core.refine import attention_triton as rca_triton
from crane_core.refine import kernels
from crane_core.refine.attention import Correlation
from crane_core.refine.kernels import DensePhi, FusedAttention, attend_groups, attend_groups_backward, fused_softmax

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
GROUPS = np.array([(0, 3, 40, 41), (3, 140, 0, 40), (140, 150, 45, 130)])
"""A group of one key, one of more rows than a block, one of more keys; no query attends to keys 41 to 44."""


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, limit: float) -> bool:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max()) < limit


def dense(queries: Tensor, keys: Tensor, phi: Phi) -> Tensor:
    scores = queries @ keys.T / queries.shape[1] ** 0.5
    return torch.softmax(scores, dim=1) @ keys if phi == "softmax" else torch.tanh(scores) @ keys / len(keys)


@pytest.mark.parametrize("phi", ["softmax", "tanh"])
@pytest.mark.parametrize(("dtype", "limit"), PRECISIONS)
@pytest.mark.parametrize(("num_rows", "num_keys", "dim"), [(1, 1, 64), (150, 70, 64), (40, 200, 6), (20, 65, 128)])
def test_attention_and_its_gradients(
    phi: DensePhi, dtype: torch.dtype, limit: float, num_rows: int, num_keys: int, dim: int
) -> None:
    inputs = [rows(seed, size, dim).to(dtype) for seed, size in enumerate((num_rows, num_keys, num_rows))]
    exact = [each.double().requires_grad_() for each in inputs[:2]]
    expected = dense(*exact, phi)
    expected.backward(inputs[2].double())
    given = [each.to(DEVICE).requires_grad_() for each in inputs[:2]]
    found = FusedAttention.apply(*given, phi)
    found.backward(inputs[2].to(DEVICE))
    assert found.dtype == dtype
    assert close(found.detach(), expected.detach(), limit)
    # With one key softmax is constant: the gradient of its queries is zero but for rounding.
    pairs = zip(given, exact, strict=True) if num_keys > 1 or phi == "tanh" else [(given[1], exact[1])]
    for each, reference in pairs:
        assert close(each.grad, reference.grad, limit)


@pytest.fixture
def kernels_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of the device at hand take the kernels for GPUs."""
    monkeypatch.setattr(kernels, "GPU_TYPES", {DEVICE.type})


@pytest.mark.usefixtures("kernels_for_gpus")
@pytest.mark.parametrize("phi", ["softmax", "tanh", "landmark", "block"])
@pytest.mark.parametrize("dim", [6, 16])
def test_every_correlation_is_the_same_with_the_kernels_for_gpus(
    phi: Phi, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    correlation = Correlation(phi, num_lists=5, num_probes=2, num_landmarks=20)
    results = []
    for device, types in ((DEVICE, {DEVICE.type}), (torch.device("cpu"), set())):
        monkeypatch.setattr(kernels, "GPU_TYPES", types)
        queries, keys = (rows(seed, size, dim).to(device).requires_grad_() for seed, size in ((8, 37), (9, 60)))
        attended = correlation.prepare(keys).attend(queries, 16)
        attended.backward(rows(10, 37, dim).to(device))
        with torch.no_grad():
            without_gradient = correlation.prepare(keys).attend(queries, 16)
        results.append((attended.detach(), without_gradient, queries.grad, keys.grad))
    for found, expected in zip(*results, strict=True):
        assert close(found, expected.double(), 2e-6)


@pytest.mark.usefixtures("kernels_for_gpus")
@pytest.mark.parametrize("dim", [1, 6, 8, 130])
def test_fused_softmax_takes_every_width(dim: int) -> None:
    queries, keys = rows(11, 9, dim), rows(12, 30, dim)
    found = fused_softmax(queries.to(DEVICE), keys.to(DEVICE))
    assert found.shape == (9, dim)
    assert close(found, dense(queries.double(), keys.double(), "softmax"), 2e-6)


@pytest.mark.usefixtures("kernels_for_gpus")
def test_softmax_of_wide_rows_has_gradients_too() -> None:
    queries, keys = (rows(seed, size, 136).to(DEVICE).requires_grad_() for seed, size in ((13, 5), (14, 7)))
    Correlation("softmax").prepare(keys).attend(queries).sum().backward()
    exact = [each.detach().cpu().double().requires_grad_() for each in (queries, keys)]
    dense(*exact, "softmax").sum().backward()
    assert close(queries.grad, exact[0].grad, 2e-6)


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


COMPILE = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from crane_core.refine import attention_triton

for dtype, dim in [("bfloat16", 64), ("bfloat16", 128), ("float32", 64), ("float32", 128)]:
    for phi in ("softmax", "tanh"):
        for kernel in ("attend", "query_gradient", "key_gradient"):
            compiled = getattr(attention_triton, "_" + kernel)
            settings = attention_triton.constants(getattr(torch, dtype), dim, phi, kernel)
            options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
            special = {"scale": "fp32", "tiles": "*i64", "mass": "*fp32", "normaliser": "*fp32", "delta": "*fp32"}
            pointer = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
            names = compiled.arg_names
            types = {name: "constexpr" if name in settings else special.get(name, pointer) for name in names}
            # As at a launch with tensors: their addresses are multiples of 16 bytes.
            hints = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if types[name][0] == "*"}
            values = {(names.index(name),): value for name, value in settings.items()}
            source = ASTSource(compiled, types, values, hints)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            print(json.dumps([dtype, dim, phi, kernel, made.metadata.shared]))
"""
"""Compiles every kernel for an H100 or H200, which needs no GPU, and prints the bytes of shared memory of a program."""


@pytest.mark.slow
def test_the_kernels_compile_and_fit_into_shared_memory(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    made = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(made) == 24
    # 227 KiB are what an H100 or H200 has, 99 KiB what smaller GPUs of that age have.
    limits = {64: 99, 128: 227}
    assert not [each for each in made if each[-1] > limits[each[1]] * 1024]
