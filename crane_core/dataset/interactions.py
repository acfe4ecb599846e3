"""Read the interactions of the ETL into arrays, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from crane_core.errors import ArtifactError
from crane_core.schema import (
    EVENT_TIME,
    ITEM_ID,
    ITEM_IDX,
    SPLIT,
    STATE,
    TEST,
    TITLE,
    TOMBSTONE,
    TRAIN,
    USER_IDX,
    VALIDATION,
    WEIGHT,
)
from crane_core.storage.artifacts import Artifact

BLOCK_ROWS = 1 << 20
"""Interactions that are read or sorted at a time."""


@dataclass(frozen=True)
class ItemLists:
    """A list of items for each user, as compressed sparse rows.

    Attributes:
        indptr: int64 [num_users + 1].
        items: int32 [num_pairs], ascending within a user.
    """

    indptr: np.ndarray
    items: np.ndarray

    @classmethod
    def from_pairs(cls, users: np.ndarray, items: np.ndarray, num_users: int) -> ItemLists:
        """Group distinct (user, item) pairs, given in any order, by user."""
        order = np.lexsort((items, users))
        indptr = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(users, minlength=num_users), out=indptr[1:])
        return cls(indptr, items[order].astype(np.int32, copy=False))

    @property
    def num_users(self) -> int:
        return len(self.indptr) - 1

    def counts(self) -> np.ndarray:
        """Return the length of each list, int64 [num_users]."""
        return np.diff(self.indptr)

    def users(self) -> np.ndarray:
        """Return the user of each entry of `items`, int32 [num_pairs]."""
        return np.repeat(np.arange(self.num_users, dtype=np.int32), self.counts())

    def where(self, keep: np.ndarray) -> ItemLists:
        """Keep only the entries where `keep`, bool [num_pairs], is true."""
        kept = np.concatenate([[0], np.cumsum(keep)])
        return ItemLists(kept[self.indptr], self.items[keep])

    def holds(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Tell for each pair whether the item is in the user's list: int [n], int [n] -> bool [n], by binary search."""
        low, stop = self.indptr[users], self.indptr[users + 1]
        high, searched = stop.copy(), np.flatnonzero(low < stop)
        while len(searched):
            middle = (low[searched] + high[searched]) // 2
            is_below = self.items[middle] < items[searched]
            low[searched[is_below]] = middle[is_below] + 1
            high[searched[~is_below]] = middle[~is_below]
            searched = searched[low[searched] < high[searched]]
        found = low < stop
        found[found] = self.items[low[found]] == items[found]
        return found

    def rows(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries of some users.

        Args:
            users: int [n].

        Returns:
            int64 [m] positions in `users`, ascending, and int32 [m] items.
        """
        starts, counts = self.indptr[users], self.indptr[users + 1] - self.indptr[users]
        positions = np.repeat(np.arange(len(users)), counts)
        within = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
        return positions, self.items[np.repeat(starts, counts) + within]


@dataclass(frozen=True)
class Interactions:
    """Interactions of users with items, split by time.

    Attributes:
        num_users, num_items: sizes of the id maps.
        train, validation, test: items per user.
        tombstones: int, numbers of items that an earlier run had and this one has not; they are never recommended.
        weights: float32 [num_train], what each training interaction counts, in the order of `train.items`; None where
            all count 1.
        ages: float32 [num_train], days from each training interaction to the end of the training period, in the same
            order; None where the data have no times or are not split by them.
    """

    num_users: int
    num_items: int
    train: ItemLists
    validation: ItemLists
    test: ItemLists
    tombstones: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    weights: np.ndarray | None = None
    ages: np.ndarray | None = None

    def decayed(self, half_life: float | None) -> np.ndarray:
        """Return what each training interaction counts at the end of the training period.

        Args:
            half_life: days in which an interaction loses half of its weight; None for no decay.

        Returns:
            float64 [num_train], in the order of `train.items`.
        """
        counts = np.ones(len(self.train.items)) if self.weights is None else self.weights.astype(np.float64)
        if half_life is None:
            return counts
        assert self.ages is not None, "without times there is no decay"
        return counts * 0.5 ** (self.ages / half_life)

    def popularity(self, half_life: float | None = None) -> np.ndarray:
        """Return the (decayed) weight of the training interactions of each item, float64 [num_items]."""
        return np.bincount(self.train.items, weights=self.decayed(half_life), minlength=self.num_items)

    def mean_weight(self) -> float:
        """Return the mean weight of the training interactions, 1 where there are none."""
        return float(self.decayed(None).mean()) if len(self.train.items) else 1.0

    def item_counts(self) -> np.ndarray:
        """Count the training interactions of each item, int64 [num_items]."""
        return np.bincount(self.train.items, minlength=self.num_items)

    def cold_items(self) -> np.ndarray:
        """Return the items without a training interaction, tombstones excepted: int64, ascending."""
        return np.setdiff1d(np.flatnonzero(self.item_counts() == 0), self.tombstones)

    def validation_users(self, most: int, seed: int) -> np.ndarray:
        """Return the users with validation items, ascending; a fixed sample of them if there are more than `most`."""
        users = np.flatnonzero(self.validation.counts() > 0)
        if len(users) > most:
            users = np.sort(np.random.default_rng(seed).choice(users, most, replace=False))
        return users


def load_interactions(artifact: Artifact) -> Interactions:
    """Read the output of `etl.interactions`, a block of rows at a time.

    Memory holds the lists, 4 bytes per interaction, weight and age of the training interactions, 4 bytes each, and one
    block.

    Raises:
        ArtifactError: an index lies outside the id maps.
    """
    num_users, num_items = artifact.facts["num_users"], artifact.facts["num_items"]
    counts = {part: np.zeros(num_users, dtype=np.int64) for part in (TRAIN, VALIDATION, TEST)}
    names = (USER_IDX, ITEM_IDX, SPLIT)
    for users, items, split in blocks_of(artifact, names):
        for name, values, size in ((USER_IDX, users, num_users), (ITEM_IDX, items, num_items)):
            if len(values) and not 0 <= values.min() <= values.max() < size:
                raise ArtifactError(
                    f"{artifact.path} has {name} outside 0..{size - 1}.",
                    f"Remove {artifact.path} and run python -m jobs.etl.interactions for this run again.",
                )
        for part, lengths in counts.items():
            lengths += np.bincount(users[split == part], minlength=num_users)
    end = end_of_training(artifact)
    lists = {part: _OpenLists(lengths, with_values=part == TRAIN) for part, lengths in counts.items()}
    for users, items, split, weights, times in blocks_of(artifact, (*names, WEIGHT, EVENT_TIME)):
        days = np.zeros(len(users), dtype=np.float32) if end is None else _days_before(end, times)
        for part, open_lists in lists.items():
            own = split == part
            open_lists.append(users[own], items[own], weights[own], days[own])
    tombstones = np.empty(0, dtype=np.int64)
    if artifact.facts.get("num_tombstones", {}).get("items"):
        tombstones = np.flatnonzero(load_ids(artifact, "items", STATE).to_numpy() == TOMBSTONE)
    closed = {part: open_lists.close() for part, open_lists in lists.items()}
    weights, ages = lists[TRAIN].weights, lists[TRAIN].days
    return Interactions(
        num_users,
        num_items,
        closed[TRAIN],
        closed[VALIDATION],
        closed[TEST],
        tombstones,
        weights=None if (weights == 1).all() else weights,
        ages=None if end is None else ages,
    )


def end_of_training(artifact: Artifact) -> datetime | None:
    """Return the instant before which all training interactions of a temporal split lie; None for other splits."""
    instant = artifact.facts.get("cutoffs", {}).get("validation")
    return None if instant is None else datetime.fromisoformat(instant)


def _days_before(end: datetime, times: np.ndarray) -> np.ndarray:
    """Return the days from each time, datetime64 in UTC, to the end: float32, 0 for later ones."""
    naive = np.datetime64(end.astimezone(UTC).replace(tzinfo=None), "us")
    microseconds = naive.astype(np.int64) - times.astype("datetime64[us]").astype(np.int64)
    return np.maximum(microseconds / 86_400_000_000, 0).astype(np.float32)


class _OpenLists:
    """Item lists of known lengths that are filled with blocks of pairs, given in any order.

    Args:
        lengths: int64 [num_users].
        with_values: keep the weight and the days of each pair, too.

    Attributes:
        weights, days: float32 [num_pairs] in the order of the lists; empty without values.
    """

    def __init__(self, lengths: np.ndarray, with_values: bool = False) -> None:
        self._indptr = np.concatenate([[0], np.cumsum(lengths)])
        self._items = np.empty(self._indptr[-1], dtype=np.int32)
        self._ends = self._indptr[:-1].copy()
        self.weights, self.days = (np.empty(self._indptr[-1] * with_values, dtype=np.float32) for _ in range(2))

    def append(self, users: np.ndarray, items: np.ndarray, weights: np.ndarray, days: np.ndarray) -> None:
        """Add pairs: int [n], int [n], float [n], float [n]."""
        order = np.argsort(users, kind="stable")
        users = users[order]
        starts = np.flatnonzero(np.diff(users, prepend=-1))
        lengths = np.diff(starts, append=len(users))
        places = self._ends[users] + np.arange(len(users)) - np.repeat(starts, lengths)
        self._items[places] = items[order]
        if len(self.weights):
            self.weights[places], self.days[places] = weights[order], days[order]
        self._ends[users[starts]] += lengths

    def close(self) -> ItemLists:
        """Sort each list, a block of users at a time, and return the lists."""
        lists = ItemLists(self._indptr, self._items)
        # A part holds the users whose lists make up about one block, but one user at least.
        blocks = self._indptr[1:] // BLOCK_ROWS
        for part in np.split(np.arange(lists.num_users), np.flatnonzero(np.diff(blocks)) + 1):
            if len(part):
                positions, items = lists.rows(part)
                order = np.lexsort((items, positions))
                block = slice(self._indptr[part[0]], self._indptr[part[-1] + 1])
                self._items[block] = items[order]
                for values in (self.weights, self.days):
                    if len(values):
                        values[block] = values[block][order]
        return lists


def blocks_of(artifact: Artifact, names: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield columns of the table `interactions` of `etl.interactions`, a block of rows at a time."""
    data = ds.dataset(artifact.file("interactions"), format="parquet", partitioning="hive")
    for batch in data.to_batches(columns=list(names), batch_size=BLOCK_ROWS, batch_readahead=1, fragment_readahead=1):
        yield tuple(batch.column(name).to_numpy(zero_copy_only=False) for name in names)


def load_ids(artifact: Artifact, table: str, column: str) -> pa.ChunkedArray:
    """Read external ids, titles or states in the order of the indices.

    Args:
        artifact: output of `etl.interactions`.
        table: `users` or `items`.
        column: `user_id`, `item_id`, `title` or `state`.

    Returns:
        Array of strings, whose position is the index.
    """
    index = USER_IDX if table == "users" else ITEM_IDX
    rows = pq.read_table(artifact.file(table), columns=[index, column]).sort_by(index)
    return rows.column(column)


def load_item_columns(artifact: Artifact) -> pa.Table:
    """Read `item_id` and the columns of the catalog that `etl.interactions` has carried, in the order of the indices.

    An artifact of an earlier version has none of these columns.
    """
    rows = pq.read_table(artifact.file("items")).sort_by(ITEM_IDX)
    carried = [name for name in rows.column_names if name not in (ITEM_IDX, ITEM_ID, TITLE, STATE)]
    return rows.select([ITEM_ID, *carried])
