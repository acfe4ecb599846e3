"""The search on a GPU by group maxima: on CUDA where there is one, else under Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="there is no Triton: make setup installs it on Linux")

from crane_core.graph import exact, maxima_triton
from crane_core.graph.candidates import GROUP, SearchResources, unit_rows, unpack
from crane_core.graph.exact import brute_force, nearest, top_fused
from crane_core.graph.maxima_triton import error_bound, group_maxima
from tests.worlds.planted import make_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dim", [1, 20, 64, 128])
@pytest.mark.parametrize("num_keys", [1, GROUP, 3 * GROUP + 7])
def test_maxima_are_exact_up_to_their_bound(dim: int, num_keys: int) -> None:
    generator = np.random.default_rng(dim)
    queries, keys = (unit_rows(generator.standard_normal((size, dim))) for size in (130, num_keys))
    found = group_maxima(*(torch.from_numpy(rows).to(DEVICE) for rows in (queries, keys))).cpu().numpy()
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    expected = np.stack([scores[:, at : at + GROUP].max(1) for at in range(0, num_keys, GROUP)], axis=1)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= error_bound(dim)


@pytest.mark.parametrize("dim", [1, 4, 16, 64])
def test_numbers_that_lose_most_are_within_the_bound(dim: int) -> None:
    """Each entry lies halfway between two bfloat16 numbers, and so does what is left of it."""
    entry = 2.0 ** np.floor(np.log2(dim**-0.5)) * (1 + 2.0**-8 - 2.0**-17 - 2.0**-20)
    rows = np.full((1, dim), entry if dim * entry**2 <= 1 else entry / 2, dtype=np.float32)
    found = group_maxima(*(torch.from_numpy(rows).to(DEVICE) for _ in range(2))).item()
    lost = abs(found - float((rows.astype(np.float64) ** 2).sum()))
    assert lost <= error_bound(dim)
    # Were the bound for 9 significant bits, as is sometimes said of bfloat16, this would be above it.
    assert dim > 4 or lost > 2.0**-17 * (rows.astype(np.float64) ** 2).sum()


def test_every_program_searches_its_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxima_triton, "_GROUPS_OF_A_PROGRAM", 2)
    test_maxima_are_exact_up_to_their_bound(20, 7 * GROUP + 7)


def test_a_neighbour_whose_group_looks_worse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maxima err by almost their bound: groups with the nearest keys lose it, all others gain it."""
    generator = np.random.default_rng(0)
    close = unit_rows(generator.standard_normal((1, 8)) + 3e-3 * generator.standard_normal((12 * GROUP, 8)))
    expected = brute_force(close, np.arange(40), 2)

    def err(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        maxima = (queries @ keys.T).view(len(queries), -1, GROUP).amax(2)
        largest = torch.zeros_like(maxima).scatter_(1, maxima.topk(4, dim=1).indices, 1.0)
        return maxima + 0.99 * error_bound(8) * (1 - 2 * largest)

    monkeypatch.setattr(maxima_triton, "group_maxima", err)
    found, _ = unpack(nearest(close, range(40), 2, resources=SearchResources(DEVICE), top=top_fused))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("memory", [1 << 30, 100_000])
def test_candidates_are_the_best_scores_and_bound_all_others(memory: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.nn.functional.normalize(torch.randn(size, 8, generator=generator)).to(DEVICE) for size in (70, 1000)
    )
    scores = queries @ keys.T
    values, found, others = top_fused(queries, keys, 3, memory)
    torch.testing.assert_close(values, scores.topk(3, dim=1).values)
    torch.testing.assert_close(scores.gather(1, found), values)
    scores.scatter_(1, found, -torch.inf)
    assert (scores.amax(1) <= others + 1e-6).all()


@pytest.mark.parametrize("kind", ["random", "near_ties", "some_duplicates", "zeros"])
def test_neighbours_equal_brute_force(kind: str) -> None:
    # Twelve groups, of which seven are searched.
    rows = np.concatenate([make_rows(kind), np.random.default_rng(0).standard_normal((1300, 8), np.float32)])
    found, _ = unpack(nearest(rows, range(len(rows)), 2, resources=SearchResources(DEVICE), top=top_fused))
    np.testing.assert_array_equal(found, brute_force(rows, np.arange(len(rows)), 2))


def test_rows_that_are_too_wide_are_searched_by_torch() -> None:
    gpu = torch.device("cuda")
    assert exact.top_on(gpu, exact.MOST_DIMS) is top_fused
    assert exact.top_on(gpu, exact.MOST_DIMS + 1) is exact.top_torch
    assert exact.top_on(torch.device("cpu"), 8) is exact.top_faiss
