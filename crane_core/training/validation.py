"""Choose among the ways to rank by the validation split."""

from __future__ import annotations

import torch
import torch.distributed as dist

from crane_core.dataset.interactions import Interactions
from crane_core.errors import TrainingError
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users, users_at_a_time
from crane_core.model.views import Rows
from crane_core.model_config import Train
from crane_core.ranks import ranks

STEERING_METRIC = "recall@20"
"""Metric by which every choice of a training is made."""


class Validation:
    """Measures rankings on the users with validation items, or on a fixed sample of them; the ranks share the users.

    Args:
        interactions: training items are masked, validation items are looked for.
        config: size and seed of the sample.
        device: where rows are ranked, and the ranks exchange their sums.
    """

    def __init__(self, interactions: Interactions, config: Train, device: torch.device) -> None:
        self._interactions = interactions
        self._users = interactions.validation_users(config.validation_users, config.seed)
        self._block = users_at_a_time(interactions.num_items, device)
        self._device = device

    def check(self) -> None:
        """Refuse a training that has nothing to choose an epoch by.

        Raises:
            TrainingError: no user has a validation item.
        """
        if not (self._interactions.validation.counts() > 0).any():
            raise TrainingError(
                f"None of the {self._interactions.num_users} users has a validation item, so no epoch can be told from "
                "another.",
                "Widen etl.validation_days, or deliver rows of the label 1 under etl.split=label.",
            )

    def best(self, rankings: dict[str, Rows]) -> tuple[str, dict[str, float]]:
        """Return the name of the ranking with the best Recall@20, and its metrics; 0 where there are no users."""
        rank, world_size = ranks()
        mine = self._users[rank::world_size]
        found = {}
        for name, rows in rankings.items():
            users, items = (each.to(self._device) for each in rows)
            ranked = rank_users(dot_product(users, items), self._interactions.train, mine, 20, self._block)
            metrics = user_metrics(ranked, self._interactions.validation, mine, (20,))
            sums = torch.tensor([values.sum() for values in metrics.values()], dtype=torch.float64)
            if world_size > 1:
                sums = sums.to(self._device)
                dist.all_reduce(sums)
            found[name] = dict(zip(metrics, (sums / max(len(self._users), 1)).tolist(), strict=True))
        best = max(found, key=lambda name: found[name][STEERING_METRIC])
        return best, found[best]
