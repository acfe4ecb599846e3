"""The float32 searches for candidates against all scores."""

import pytest
import torch

from crane_core.graph import candidates, exact, faiss_search


@pytest.mark.parametrize("top", [faiss_search.top_faiss, exact.top_torch])
def test_candidates_are_the_best_scores(top: candidates.Top) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(size, 8, generator=generator) for size in (70, 333))
    scores = queries @ keys.T
    values, found, others = top(queries, keys, 15, 50_000)
    torch.testing.assert_close(values, scores.topk(15, dim=1).values)
    torch.testing.assert_close(scores.gather(1, found), values)
    scores.scatter_(1, found, -torch.inf)
    assert (scores.amax(1) <= others + 1e-6).all()
