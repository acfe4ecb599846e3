"""RCA on a GPU against float64 on the CPU: every correlation function, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from crane_core.config import Phi, Precision
from crane_core.refine.attention import Correlation
from crane_core.refine.recursion import RecursiveCrossModalAttention
from tests.bench.bench_rca import normalised, seen_by
from tests.bench.gpu.plan import Plan, Row, compared, distance, plain_cpu, worst

LIMITS: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 2e-2}
PHIS: tuple[Phi, ...] = ("softmax", "tanh", "block", "landmark", "linear")
SHAPES = [(1, 1, 64), (257, 70, 6), (2000, 3001, 64), (333, 1021, 100), (60, 300, 200)]
"""Queries, keys, width; the last is wider than the Triton kernels take. Few widths: a kernel is compiled for each."""
TOY_SHAPES = [(1, 1, 8), (37, 50, 6), (5, 33, 136)]
TRITON_ONLY = ("tanh", "block")


def run(plan: Plan) -> Iterator[Row]:
    """Compare the attention of odd sizes, then whole recursions with one to three modalities."""
    for phi in PHIS:
        for precision in ("float32", "bfloat16")[: 1 if phi == "linear" else 2]:
            errors = {}
            for number, shape in enumerate(plan.pick(SHAPES, TOY_SHAPES)):
                if shape[2] > 128 and phi in TRITON_ONLY:
                    continue
                # Under deterministic algorithms, torch fills new memory with NaN here: what is not written shows.
                for strict in (True, False) if number == 1 else (True,):
                    torch.use_deterministic_algorithms(strict)
                    for name, error in attention_errors(plan, phi, precision, shape, number).items():
                        errors[f"{name} {shape} deterministic={strict}"] = error
            torch.use_deterministic_algorithms(True)
            name, error = worst(errors)
            yield compared(f"attention {phi} {precision}", error, LIMITS[precision], worst=name)
    for phi in PHIS:
        errors = {}
        for num_modalities in (1, 2, 3):
            for name, error in recursion_errors(plan, phi, num_modalities).items():
                errors[f"{name}, {num_modalities} modalities"] = error
        name, error = worst(errors)
        yield compared(f"two recursions {phi}", error, 1e-4, worst=name)


def attention_errors(
    plan: Plan, phi: Phi, precision: Precision, shape: tuple[int, int, int], salt: int
) -> dict[str, float]:
    """Return the errors of the output and of both gradients."""
    num_queries, num_keys, dim = shape
    correlation = Correlation(phi, precision=precision, seed=salt)
    sizes = num_queries, num_keys, num_queries
    drawn = [plan.normal(10 * salt + number, size, dim) for number, size in enumerate(sizes)]
    queries, keys, incoming = plan.leaf(drawn[0]), plan.leaf(drawn[1]), drawn[2].to(plan.device)
    prepared = correlation.prepare(keys)
    found = prepared.attend(queries, chunk_size=100)
    found.backward(incoming)
    with torch.no_grad():
        again = prepared.attend(queries, chunk_size=100)
        asked = queries.bfloat16().float() if precision == "bfloat16" else queries
        seen = seen_by(prepared, asked, SimpleNamespace(correlation=correlation), num_keys)
    rounded = [each.bfloat16() if precision == "bfloat16" else each for each in drawn]
    exact = [each.double().requires_grad_() for each in rounded[:2]]
    expected = dense(*exact, phi, None if seen is None else seen.cpu())
    expected.backward(rounded[2].double())
    # Where one key is left, the gradient of the queries is zero but for rounding of its terms, incoming x key x key.
    least = 3e-2 * float(incoming.norm() * keys.detach().norm(dim=1).max() ** 2) / dim**0.5
    return {
        "output": distance(found, expected),
        "output without gradient": distance(again, expected),
        "queries": distance(queries.grad, exact[0].grad, least),
        "keys": distance(keys.grad, exact[1].grad, least),
    }


def dense(queries: Tensor, keys: Tensor, phi: Phi, seen: Tensor | None) -> Tensor:
    """Return the attention by its definition, with all scores in memory."""
    scores = queries @ keys.T / queries.shape[1] ** 0.5
    if seen is not None:
        return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=1) @ keys
    return normalised(scores, phi) @ keys


def recursion_errors(plan: Plan, phi: Phi, num_modalities: int) -> dict[str, float]:
    """Return the errors of two recursions and their gradients, to the same in float64 with the kernels for CPUs."""
    num_items, num_users, dim = plan.pick((700, 300, 64), (20, 7, 8))
    # All lists are probed, so that no rounding can change which keys a query attends to.
    correlation = Correlation(phi, num_lists=4, num_probes=4)
    exact = RecursiveCrossModalAttention(num_modalities, dim, 2, correlation, plan.generator(50)).double()
    model = copy.deepcopy(exact).float().to(plan.device)
    rows = [plan.normal(60 + size, size, num_modalities, dim) for size in (num_items, num_users)]
    incoming = [plan.normal(70 + size, size, num_modalities, dim) for size in (num_items, num_users)]
    given = [plan.leaf(each) for each in rows]
    references = [each.double().requires_grad_() for each in rows]
    found = model(*given, chunk_size=128)
    torch.autograd.backward(found, [each.to(plan.device) for each in incoming])
    with plain_cpu():
        expected = exact(*references, chunk_size=128)
        torch.autograd.backward(expected, [each.double() for each in incoming])
    errors = {}
    for name, number in (("items", 0), ("users", 1)):
        # What the recursions add: the rows themselves would hide an error.
        added, reference = (each[number].cpu().double() - rows[number] for each in (found, expected))
        errors[name] = distance(added, reference)
        passed, reference = (each[number].grad.cpu().double() - incoming[number] for each in (given, references))
        errors[f"gradient of {name}"] = distance(passed, reference)
    for (name, parameter), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        errors[f"gradient of {name}"] = distance(parameter.grad, reference.grad)
    return errors
