"""Decide what may be shown: the rules of `export.rules`, for the items of a model at one instant.

A list is a walk along the user's falling scores. It leaves out items that cannot be had, items that the user has and
that are not bought again, and further items of a category that the list holds often enough. Boosts change the scores. A
list for which fewer than k items are left is shorter. This module imports no torch, since a served model uses it; the
ranking has the same walk for many users at a time (`numerics/top_k.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from crane_core.config import Rules
from crane_core.dataset.interactions import ItemLists
from crane_core.errors import DataError
from crane_core.schema import AVAILABLE_FROM, AVAILABLE_UNTIL, CATEGORY, IN_STOCK, ITEM_ID

AVAILABILITY = (IN_STOCK, AVAILABLE_FROM, AVAILABLE_UNTIL)
ELIGIBILITY = pa.schema(
    [
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field("from", pa.timestamp("us", tz="UTC")),
        pa.field("until", pa.timestamp("us", tz="UTC")),
    ]
)


@dataclass(frozen=True)
class ItemRules:
    """Rules for the items of a model.

    Attributes:
        factors: float32 [num_items], what the odds of an item are multiplied by; 0 where it is never shown.
        is_repeated: bool [num_items], whether an item is shown to users who have it.
        categories: int32 [num_items], number of the item's category; -1 where it has none.
        most: items of a category in a list; None for any number.
        facts: JSON values that tell of the rules: their instant `at`, `settings`, and `counts` of what each one covers.
    """

    factors: np.ndarray
    is_repeated: np.ndarray
    categories: np.ndarray
    most: int | None
    facts: dict[str, Any]

    @property
    def added(self) -> np.ndarray | None:
        """Return what is added to the scores of the items: float32 [num_items], -inf where one is never shown.

        None where nothing is added.
        """
        if (self.factors == 1).all():
            return None
        with np.errstate(divide="ignore"):
            return np.log(self.factors)

    def had(self, seen: ItemLists) -> ItemLists:
        """Return the items that a user is not shown, of those that the user has."""
        return seen.where(~self.is_repeated[seen.items]) if self.is_repeated.any() else seen

    def best(self, table: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the best items of each row of a table of scores, equal ones by row number.

        Args:
            table: float32 [n, num_items], -inf for what is not shown.
            k: list length, at most num_items.

        Returns:
            int64 [n, k] items by falling score, -1 where fewer than k may be shown; float32 [n, k] scores.
        """
        width = k if self.most is None else min(4 * k, table.shape[1])
        top = np.argpartition(-table, width - 1, axis=1)[:, :width]
        values = np.take_along_axis(table, top, axis=1)
        order = np.lexsort((top, -values), axis=1)
        values = np.take_along_axis(values, order, axis=1)
        items = np.where(values > -np.inf, np.take_along_axis(top, order, axis=1), -1)
        if self.most is None:
            return items, values
        found, scores = np.full((len(table), k), -1, dtype=np.int64), np.full((len(table), k), -np.inf, np.float32)
        for row, candidates in enumerate(items):
            taken = self.first(candidates[candidates >= 0].tolist(), k)
            if len(taken) < k and candidates[-1] >= 0:
                order = np.argsort(-table[row], kind="stable")
                taken = self.first(order[table[row, order] > -np.inf].tolist(), k)
            found[row, : len(taken)], scores[row, : len(taken)] = taken, table[row, taken]
        return found, scores

    def first(self, order: Iterable[int], k: int) -> list[int]:
        """Walk along items, best first, and return the first k within `most` of a category.

        Args:
            order: rows of items; none that is never shown.
            k: list length.
        """
        taken: list[int] = []
        counts: Counter[int] = Counter()
        for item in order:
            if len(taken) == k:
                break
            category = int(self.categories[item])
            if self.most is None or category < 0 or counts[category] < self.most:
                counts[category] += 1
                taken.append(item)
        return taken


def no_rules(num_items: int) -> ItemRules:
    """Return the rules by which every item may be shown to everybody who does not have it."""
    nothing = np.zeros(num_items, dtype=bool)
    return ItemRules(np.ones(num_items, np.float32), nothing, np.full(num_items, -1, np.int32), None, {})


def item_rules(rules: Rules, columns: pa.Table, at: datetime) -> ItemRules:
    """Find what the rules say about the items of a model at one instant.

    Args:
        rules: of the configuration.
        columns: `item_id` and the columns of the catalog, a row per item; null where the catalog has no value.
        at: the lists are shown from this instant on: `window.end`.

    Raises:
        DataError: the rules read a column that is not there, or leave out every item.
    """
    check_columns(rules, columns.column_names)
    num_items = columns.num_rows
    hidden = _hidden(columns, at) if rules.available else {}
    is_hidden = np.logical_or.reduce([np.zeros(num_items, dtype=bool), *hidden.values()])
    if num_items and is_hidden.all():
        raise DataError(
            f"At {at:%Y-%m-%d %H:%M} UTC none of the {num_items} items may be shown: "
            f"{', '.join(f'{name} {int(found.sum())}' for name, found in hidden.items())}.",
            "Correct in_stock, available_from and available_until of the catalog, or set export.rules.available=false.",
        )
    factors, boosted = np.ones(num_items, dtype=np.float32), {}
    for column, values in rules.boosts.items():
        found = pc.cast(columns[column], pa.string()).to_numpy(zero_copy_only=False)
        each = {value: found == value for value in values}
        for value, is_boosted in each.items():
            factors[is_boosted] *= values[value]
        boosted[column] = {value: int(is_boosted.sum()) for value, is_boosted in each.items()}
    categories, names = np.full(num_items, -1, dtype=np.int32), np.empty(0, dtype=object)
    if CATEGORY in columns.column_names:
        coded = columns[CATEGORY].combine_chunks().dictionary_encode()
        categories = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int32)
        names = coded.dictionary.to_numpy(zero_copy_only=False)
    is_repeated = np.isin(categories, [n for n, name in enumerate(names) if name in rules.repeat_categories])
    counts = {
        "left_out": {name: int(found.sum()) for name, found in hidden.items()},
        "items_shown": int(num_items - is_hidden.sum()),
        "bought_again": int(is_repeated.sum()),
        "boosted": boosted,
    }
    facts = {"at": at.isoformat(), "settings": rules.model_dump(mode="json"), "counts": counts}
    factors[is_hidden] = 0
    return ItemRules(factors, is_repeated, categories, rules.max_per_category, facts)


def check_columns(rules: Rules, names: Collection[str]) -> None:
    """Check that the catalog has the columns that the rules read.

    Raises:
        DataError: it does not.
    """
    wanted = {column: f"boosts.{column}" for column in rules.boosts}
    if rules.repeat_categories or rules.max_per_category is not None:
        wanted[CATEGORY] = "repeat_categories" if rules.repeat_categories else "max_per_category"
    missing = {column: rule for column, rule in wanted.items() if column not in names}
    if rules.available and not set(AVAILABILITY) & set(names):
        missing[" or ".join(AVAILABILITY)] = "available"
    if missing:
        column, rule = next(iter(missing.items()))
        raise DataError(
            f"export.rules.{rule} needs the column {column} of the catalog, whose columns are "
            f"{', '.join(sorted(names)) or 'id and title alone'}.",
            "Deliver items/*.parquet with the column (text, flags, numbers or instants), or leave the rule out.",
        )


def eligibility(columns: pa.Table) -> pa.Table:
    """Return when each item that is in stock may be shown, schema `ELIGIBILITY`: null for no start or no end.

    Args:
        columns: `item_id` and the columns of the catalog.
    """
    nothing = pa.nulls(columns.num_rows, ELIGIBILITY.field("from").type)
    bounds = [columns[name] if name in columns.column_names else nothing for name in (AVAILABLE_FROM, AVAILABLE_UNTIL)]
    table = pa.table([columns[ITEM_ID], *bounds], schema=ELIGIBILITY)
    if IN_STOCK not in columns.column_names:
        return table
    return table.filter(pc.fill_null(columns[IN_STOCK], True))


def _hidden(columns: pa.Table, at: datetime) -> dict[str, np.ndarray]:
    """Return which items cannot be had, by the first reason that applies: bool [num_items] each."""
    instant = pa.scalar(at, ELIGIBILITY.field("from").type)
    tests = {
        "sold_out": (IN_STOCK, pc.invert),
        "not_yet": (AVAILABLE_FROM, lambda values: pc.greater(values, instant)),
        "no_longer": (AVAILABLE_UNTIL, lambda values: pc.less_equal(values, instant)),
    }
    found: dict[str, np.ndarray] = {}
    before = np.zeros(columns.num_rows, dtype=bool)
    for reason, (name, test) in tests.items():
        if name in columns.column_names:
            applies = pc.fill_null(test(columns[name]), False).to_numpy()
            found[reason] = applies & ~before
            before |= applies
    return found


def rules_of(facts: Mapping[str, Any], columns: pa.Table) -> ItemRules:
    """Return the rules whose `ItemRules.facts` stand under `rules`, for the items of a table; without any, no rules."""
    if not facts.get("rules"):
        return no_rules(columns.num_rows)
    told = facts["rules"]
    return item_rules(Rules.model_validate(told["settings"]), columns, datetime.fromisoformat(told["at"]))
