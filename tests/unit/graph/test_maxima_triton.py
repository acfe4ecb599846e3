"""The search on a GPU by group maxima: on CUDA where there is one, else under Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="there is no Triton: make setup installs it on Linux")

from crane_core.graph import exact
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
