"""The artifacts of the ETL as arrays: what the torch stages train and evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.errors import ArtifactError
from crane_core.schema import ITEM_IDX, SPLIT, TEST, TRAIN, USER_IDX, VALIDATION
from crane_core.store import Artifact


@dataclass(frozen=True)
class ItemLists:
    """A list of items for each user, in compressed rows.

    Attributes:
        indptr: int64 [num_users + 1].
        items: int32 [num_pairs], ascending within a user.
    """

    indptr: np.ndarray
    items: np.ndarray

    @classmethod
    def from_pairs(cls, users: np.ndarray, items: np.ndarray, num_users: int) -> ItemLists:
        """Group (user, item) pairs, any order, no pair twice."""
        order = np.lexsort((items, users))
        indptr = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(users, minlength=num_users), out=indptr[1:])
        return cls(indptr, items[order].astype(np.int32, copy=False))

    @property
    def num_users(self) -> int:
        return len(self.indptr) - 1

    def counts(self) -> np.ndarray:
        """int64 [num_users], the length of each list."""
        return np.diff(self.indptr)

    def users(self) -> np.ndarray:
        """int32 [num_pairs], the user of each entry of `items`."""
        return np.repeat(np.arange(self.num_users, dtype=np.int32), self.counts())

    def where(self, keep: np.ndarray) -> ItemLists:
        """The lists reduced to the entries where `keep`, bool [num_pairs], is true."""
        return ItemLists.from_pairs(self.users()[keep], self.items[keep], self.num_users)

    def rows(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entries of some users.

        Args:
            users: int [n].

        Returns:
            int64 [m] positions into `users`, int32 [m] items, in order.
        """
        starts, counts = self.indptr[users], self.indptr[users + 1] - self.indptr[users]
        positions = np.repeat(np.arange(len(users)), counts)
        within = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
        return positions, self.items[np.repeat(starts, counts) + within]


@dataclass(frozen=True)
class Interactions:
    """Users, items and who met what, split by time.

    Attributes:
        num_users, num_items: sizes of the id maps.
        train, validation, test: items per user.
    """

    num_users: int
    num_items: int
    train: ItemLists
    validation: ItemLists
    test: ItemLists

    def item_counts(self) -> np.ndarray:
        """int64 [num_items], training interactions of each item."""
        return np.bincount(self.train.items, minlength=self.num_items)

    def validation_users(self, most: int, seed: int) -> np.ndarray:
        """Users with validation items, ascending; a fixed sample where there are more than `most`."""
        users = np.flatnonzero(self.validation.counts() > 0)
        if len(users) > most:
            users = np.sort(np.random.default_rng(seed).choice(users, most, replace=False))
        return users


def load_interactions(artifact: Artifact) -> Interactions:
    """Read the output of `etl.interactions`.

    Raises:
        ArtifactError: an index lies outside the id maps.
    """
    num_users, num_items = artifact.facts["num_users"], artifact.facts["num_items"]
    table = pq.read_table(artifact.file("interactions"), columns=[USER_IDX, ITEM_IDX, SPLIT])
    users, items, split = (_column(table, name) for name in (USER_IDX, ITEM_IDX, SPLIT))
    for name, values, size in ((USER_IDX, users, num_users), (ITEM_IDX, items, num_items)):
        if len(values) and not 0 <= values.min() <= values.max() < size:
            raise ArtifactError(
                f"{artifact.path} has {name} outside 0..{size - 1}.", "Run etl.interactions again for this window."
            )
    train, validation, test = (
        ItemLists.from_pairs(users[split == part], items[split == part], num_users)
        for part in (TRAIN, VALIDATION, TEST)
    )
    return Interactions(num_users, num_items, train, validation, test)


def load_ids(artifact: Artifact, table: str, column: str) -> pa.ChunkedArray:
    """External ids or titles in the order of the indices.

    Args:
        artifact: output of `etl.interactions`.
        table: `users` or `items`.
        column: `user_id`, `item_id` or `title`.

    Returns:
        String array whose position is the index.
    """
    index = USER_IDX if table == "users" else ITEM_IDX
    rows = pq.read_table(artifact.file(table), columns=[index, column]).sort_by(index)
    return rows.column(column)


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table.column(name).to_numpy()
