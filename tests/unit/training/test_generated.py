"""Generated rows: a planted map is found, and no warm item is judged by its own row."""

from __future__ import annotations

import numpy as np
import torch

from crane_core.training.generated import generate


def planted(noise: float) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = np.random.default_rng(0)
    white = generator.standard_normal((500, 6)).astype(np.float32)
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    white[:5] = 0
    rows = white @ generator.standard_normal((6, 4)) + 3 + noise * generator.standard_normal((500, 4))
    return torch.from_numpy(white), torch.from_numpy(rows).float(), np.arange(500) % 4 > 0


def test_cold_items_get_the_row_that_their_content_says() -> None:
    white, rows, is_warm = planted(0.01)
    rows[~torch.from_numpy(is_warm)] = 77  # Nobody may look at the row of a cold item.
    _, truth, _ = planted(0.01)
    found, generator = generate(white, rows, is_warm, seed=0)
    cold = torch.from_numpy(~is_warm) & white.any(dim=1)
    # The penalty shrinks the rows, which a channel of unit spread makes up for.
    both = torch.stack([(each[cold] - each[cold].mean(0)).flatten() for each in (found, truth)])
    assert torch.corrcoef(both)[0, 1] > 0.99
    assert not found[:5].any()
    torch.testing.assert_close(generator.rows(white[cold]), found[cold])


def test_no_warm_item_sees_its_own_row() -> None:
    white, rows, is_warm = planted(0.1)
    before, _ = generate(white, rows, is_warm, seed=0)
    changed = rows.clone()
    changed[9] += 1000
    after, _ = generate(white, changed, is_warm, seed=0)
    assert torch.allclose(after[9], before[9], atol=1e-4)
    assert (after - before).abs().amax(dim=1).gt(1).sum() > 300


def test_without_warm_items_the_rows_are_zeros() -> None:
    white, rows, is_warm = planted(0.1)
    found, _ = generate(white, rows, ~np.ones_like(is_warm), seed=0)
    assert not found.any()
