"""Read the histories of a request: item ids of each user, and the times of the events where they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from crane_core.errors import DataError
from crane_core.model.fold_in import FoldIn, History

HISTORY, TIMES = "history", "history_times"
"""Columns of a request."""
_DAY = np.timedelta64(1, "D")
_FORM = "Send item ids as a list of strings, and for each of them, if at all, an instant as ISO 8601 text."


@dataclass(frozen=True)
class Histories:
    """What the rows of a request give as histories.

    Attributes:
        history: known items, each once in a row, with the weight and age of the latest event.
        num_unknown: int64 [n], ids of each row that the model does not know; they count for nothing.
    """

    history: History
    num_unknown: np.ndarray

    def has_items(self) -> np.ndarray:
        """Return which rows have a known item: bool [n]."""
        return np.bincount(self.history.users, minlength=len(self.num_unknown)) > 0

    def part(self, start: int, stop: int) -> Histories:
        """Return the histories of the rows from start up to stop."""
        own = slice(*np.searchsorted(self.history.users, (start, stop)).tolist())
        assert self.history.ages is not None
        of_part = (self.history.items, self.history.weights, self.history.ages)
        history = History(self.history.users[own] - start, *(values[own] for values in of_part))
        return Histories(history, self.num_unknown[start:stop])


def is_given(cell: Any) -> bool:
    """Return whether a cell of a request holds anything: not null and no empty list."""
    return len(_listed(cell, HISTORY, 0)) > 0 if not isinstance(cell, str) else True


def read_histories(ids: Sequence[Any], times: Sequence[Any] | None, items: pd.Index, fold_in: FoldIn) -> Histories:
    """Read the two columns of a request.

    An age is counted from the end of the training, or from the latest event of the row where that is later. Without
    times an event is as good as new.

    Args:
        ids: for each row a list of item ids, empty or null where there is no history.
        times: for each row a list of as many instants, null where they are not known; None for no column. An instant
            without a zone is in UTC.
        items: ids of the model's items in row order.
        fold_in: of the model.

    Raises:
        DataError: a cell is no list, an id is null, times are no instants or as many as the items.
    """
    events: list[tuple[int, str, pd.Timestamp | None]] = []
    for row, cell in enumerate(ids):
        events += _events(row, _listed(cell, HISTORY, row), _listed(None if times is None else times[row], TIMES, row))
    table = pd.DataFrame(events, columns=["row", "id", "time"])
    table["time"] = table["time"].astype("datetime64[us, UTC]")
    table = table.sort_values(["row", "id", "time"], kind="stable", na_position="first")
    table = table.drop_duplicates(["row", "id"], keep="last")
    table["item"] = items.get_indexer(table["id"])
    unknown = table["row"][table["item"] < 0]
    ages = _ages(table, fold_in.end)
    known = (table["item"] >= 0).to_numpy()
    columns = (table["row"].to_numpy(dtype=np.int64)[known], table["item"].to_numpy(dtype=np.int64)[known])
    weights = np.full(known.sum(), fold_in.weight)
    history = History(*columns, weights, ages[known])
    return Histories(history, np.bincount(unknown.to_numpy(dtype=np.int64), minlength=len(ids)))


def _listed(cell: Any, column: str, row: int) -> list[Any]:
    """Return a cell as a list; empty where it is null."""
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return []
    if isinstance(cell, list | tuple | np.ndarray):
        return list(cell)
    raise DataError(f"{column} of row {row} is {type(cell).__name__} {cell!r}, no list.", _FORM)


def _events(row: int, ids: list[Any], times: list[Any]) -> list[tuple[int, str, pd.Timestamp | None]]:
    """Return row, item id and instant of each event of one row."""
    if times and len(times) != len(ids):
        raise DataError(f"Row {row} has {len(ids)} items and {len(times)} times.", _FORM)
    for item in ids:
        if not isinstance(item, str | int | np.integer) or isinstance(item, bool):
            raise DataError(f"{HISTORY} of row {row} has {item!r}, no item id.", _FORM)
    instants = [_instant(time, row) for time in times] if times else [None] * len(ids)
    return [(row, str(item), time) for item, time in zip(ids, instants, strict=True)]


def _instant(time: Any, row: int) -> pd.Timestamp:
    """Return an instant in UTC."""
    if isinstance(time, str | datetime | np.datetime64):
        try:
            instant = pd.Timestamp(time)
            if not pd.isna(instant):
                return instant.tz_localize("UTC") if instant.tzinfo is None else instant.tz_convert("UTC")
        except (ValueError, OverflowError):
            pass
    raise DataError(f"{TIMES} of row {row} has {time!r}, no instant.", _FORM)


def _ages(table: pd.DataFrame, end: datetime | None) -> np.ndarray:
    """Return the days since each event, float64 [m]; 0 without times."""
    if end is None or not len(table):
        return np.zeros(len(table))
    newest = table.groupby("row")["time"].transform("max").clip(lower=pd.Timestamp(end).tz_convert("UTC"))
    days = (newest - table["time"]) / _DAY
    return days.fillna(0.0).to_numpy(dtype=np.float64)
