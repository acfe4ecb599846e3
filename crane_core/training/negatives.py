"""Draw items that a user has not met."""

from __future__ import annotations

from typing import Literal

import numpy as np

from crane_core.dataset.interactions import ItemLists

_ROUNDS = 50
"""Draws of a negative before the items left to the user are listed. Where a user has met half of the items, one in
10**15 is left after so many."""


class NegativeSampler:
    """Draws items that a user has not met.

    Args:
        train: training items per user.
        num_items: catalog size.
        pool: where shared negatives are drawn from, `warm` items or the whole `catalog`.

    Attributes:
        exhausted: bool [num_users], users who have met every item; no negative exists for them.
    """

    def __init__(self, train: ItemLists, num_items: int, pool: Literal["warm", "catalog"] = "warm") -> None:
        self.exhausted = train.counts() >= num_items
        self.num_items = num_items
        self._train = train
        self._pool = np.unique(train.items) if pool == "warm" else np.arange(num_items)

    def one_each(self, users: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw one item for each user, uniform over the items left, by rejection: int [n] -> int64 [n].

        None of the users is exhausted.
        """
        items = generator.integers(self.num_items, size=len(users))
        rejected = np.arange(len(users))
        for _ in range(_ROUNDS):
            rejected = rejected[self._train.holds(users[rejected], items[rejected])]
            if not len(rejected):
                return items
            items[rejected] = generator.integers(self.num_items, size=len(rejected))
        # A user who has met nearly all items would be rejected nearly forever.
        for row in rejected[self._train.holds(users[rejected], items[rejected])]:
            own = self._train.rows(users[[row]])[1]
            items[row] = generator.choice(np.setdiff1d(np.arange(self.num_items), own))
        return items

    def shared(self, users: np.ndarray, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw random items of the pool, the same for all users.

        Args:
            users: int [n].
            size: items drawn; the distinct ones among them are kept.
            generator: of the draw.

        Returns:
            Ascending int64 [m], m <= size; `met` of them.
        """
        items = np.unique(generator.choice(self._pool, size)).astype(np.int64)
        return items, self.met(users, items)

    def met(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return whether each user has met each item: int [n] and distinct int [m] -> bool [n, m]."""
        column = np.full(self.num_items, -1, dtype=np.int32)
        column[items] = np.arange(len(items))
        rows, known = self._train.rows(users)
        columns = column[known]
        met = np.zeros((len(users), len(items)), dtype=bool)
        met[rows[columns >= 0], columns[columns >= 0]] = True
        return met
