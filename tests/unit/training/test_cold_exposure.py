"""How much cold items are shown: by a given share, by recall, or by their share of the validation interactions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.model.views import Rows
from crane_core.training.cold_exposure import cold_offset

NUM_USERS, NUM_WARM, NUM_COLD = 120, 200, 100


def world(num_cold_rows: int) -> tuple[Interactions, Rows]:
    """Users who each take five warm items and some cold ones; cold scores are three too low."""
    generator = np.random.default_rng(0)
    size = NUM_WARM + NUM_COLD
    users, items = (torch.from_numpy(generator.standard_normal((n, 8))).float() for n in (NUM_USERS, size))
    scores = (users @ items.T).numpy()
    taken = [(user, item) for user in range(NUM_USERS) for item in np.argsort(-scores[user, :NUM_WARM])[:5]]
    best_cold = np.argsort(-scores[:, NUM_WARM:], axis=1) + NUM_WARM
    taken += [(row % NUM_USERS, best_cold[row % NUM_USERS, row // NUM_USERS]) for row in range(num_cold_rows)]
    pairs = np.array(taken)
    everything = ItemLists.from_pairs(np.full(NUM_WARM, NUM_USERS), np.arange(NUM_WARM, dtype=np.int32), NUM_USERS + 1)
    validation = ItemLists.from_pairs(pairs[:, 0], pairs[:, 1].astype(np.int32), NUM_USERS + 1)
    log = Interactions(NUM_USERS + 1, size, everything, validation, validation)
    bias = torch.where(torch.arange(size) < NUM_WARM, 0.0, -3.0)
    rows = torch.cat([users, torch.zeros(1, 8)]), items
    return log, (torch.cat([rows[0], torch.ones(NUM_USERS + 1, 1)], 1), torch.cat([rows[1], bias[:, None]], 1))


def share_at(offset: float, rows: Rows) -> float:
    scores = rows[0][:NUM_USERS] @ rows[1].T
    scores[:, NUM_WARM:] += offset
    return float((scores.topk(20).indices >= NUM_WARM).float().mean())


@pytest.mark.parametrize("exposure", [0.0, 0.1, 0.6, 1.0])
def test_a_given_share_of_the_places_is_met(exposure: float) -> None:
    log, rows = world(300)
    offset = cold_offset(rows, log, np.arange(NUM_USERS), exposure)
    assert share_at(offset, rows) == pytest.approx(exposure, abs=0.06)


def test_recall_decides_where_there_are_enough_cold_rows() -> None:
    log, rows = world(300)
    offset = cold_offset(rows, log, np.arange(NUM_USERS), None)
    assert offset == pytest.approx(3.0, abs=1.0)
    assert share_at(offset, rows) <= 1.5 * 300 / (300 + 5 * NUM_USERS)


def test_with_few_cold_rows_they_get_at_most_their_share() -> None:
    log, rows = world(30)
    offset = cold_offset(rows, log, np.arange(NUM_USERS), None)
    assert 0.01 < share_at(offset, rows) <= 30 / (30 + 5 * NUM_USERS)


def test_cold_items_that_nothing_tells_apart_are_not_shown() -> None:
    log, (users, items) = world(300)
    items[NUM_WARM:, :-1] = 0
    assert share_at(cold_offset((users, items), log, np.arange(NUM_USERS), None), (users, items)) == 0
    assert share_at(cold_offset((users, items), log, np.arange(NUM_USERS), 0.5), (users, items)) > 0.3


def test_without_cold_rows_none_is_shown_and_without_cold_items_nothing_is_added() -> None:
    log, rows = world(0)
    assert share_at(cold_offset(rows, log, np.arange(NUM_USERS), None), rows) == 0
    warm = ItemLists.from_pairs(np.full(300, NUM_USERS), np.arange(300, dtype=np.int32), NUM_USERS + 1)
    everything_warm = Interactions(NUM_USERS + 1, 300, warm, log.validation, log.test)
    assert cold_offset(rows, everything_warm, np.arange(NUM_USERS), None) == 0.0
