"""Over random catalogs and rules, no list holds an ineligible item, and each is that of a plain loop."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from crane_core.config import Export, Rules
from crane_core.dataset.interactions import ItemLists
from crane_core.errors import DataError
from crane_core.evaluation.ranking import adding, dot_product, groups_of, rank_users
from crane_core.evaluation.rules import check_columns, eligibility, item_rules, rules_of
from crane_core.model.fold_in import Block, FoldIn, History
from crane_core.serving.export import write_export
from crane_core.serving.histories import Histories
from crane_core.serving.model_folder import Recommender, ServedModel

AT = datetime(2026, 3, 1, tzinfo=UTC)
CPU = torch.device("cpu")
SEEDS = range(200)


@dataclass(frozen=True)
class Shop:
    """A random catalog, who has what, and rules."""

    catalog: list[dict[str, Any]]
    users: np.ndarray
    items: np.ndarray
    had: np.ndarray
    popularity: np.ndarray
    rules: Rules
    k: int

    @classmethod
    def of(cls, seed: int) -> Shop:
        world = np.random.default_rng(seed)
        num_users, num_items = int(world.integers(1, 20)), int(world.integers(2, 90))
        categories = [None, *"abcdefgh"[: world.integers(1, 9)]]
        bounds = [None, AT - timedelta(days=1), AT, AT + timedelta(microseconds=1)]
        share = world.choice([0.0, 0.3, 0.8])
        catalog = [
            {
                "item_id": f"i{n}",
                "category": world.choice(categories),
                "available_from": world.choice(bounds) if world.random() < share else None,
                "available_until": world.choice(bounds) if world.random() < share else None,
                "in_stock": [None, True, False][world.integers(3)] if world.random() < share else True,
                "brand": ["acme", "other", None][world.integers(3)],
                "stars": [1, 2, None][world.integers(3)],
            }
            for n in range(num_items)
        ]
        # One can always be had, since rules that leave out everything are refused.
        catalog[0] |= {"available_from": None, "available_until": None, "in_stock": True}
        rules = Rules(
            available=bool(world.integers(2)),
            repeat_categories=tuple(world.choice(list("abcxy"), world.integers(3))),
            max_per_category=[None, 1, 2, 3][world.integers(4)],
            boosts=[{}, {"brand": {"acme": 2.0}}, {"brand": {"acme": 0.5, "other": 8}, "stars": {2: 4.0}}][
                world.integers(3)
            ],
        )
        # Whole numbers times 2^-8: products and sums are exact, and ties of scores are rare.
        rows = [world.integers(-2000, 2001, (size, 4)).astype(np.float32) / 256 for size in (num_users, num_items)]
        had = world.random((num_users, num_items)) < world.choice([0.05, 0.5])
        popularity = world.permutation(num_items).astype(np.float32)
        return cls(catalog, rows[0], rows[1], had, popularity, rules, int(world.integers(1, num_items + 1)))

    @property
    def columns(self) -> pa.Table:
        text, instant = pa.string(), pa.timestamp("us", "UTC")
        kinds = [text, text, instant, instant, pa.bool_(), text, pa.int64()]
        schema = pa.schema(list(zip(self.catalog[0], kinds, strict=True)))
        return pa.Table.from_pylist(self.catalog, schema)

    @property
    def seen(self) -> ItemLists:
        return ItemLists.from_pairs(*np.nonzero(self.had), len(self.had))

    def eligible(self, item: int) -> bool:
        row = self.catalog[item]
        return not self.rules.available or (
            row["in_stock"] is not False
            and (row["available_from"] is None or row["available_from"] <= AT)
            and (row["available_until"] is None or row["available_until"] > AT)
        )

    def repeated(self, item: int) -> bool:
        return self.catalog[item]["category"] in self.rules.repeat_categories

    def factor(self, item: int) -> float:
        boosts = self.rules.boosts
        values = {column: self.catalog[item][column] for column in boosts}
        return float(np.prod([boosts[c].get("" if v is None else str(v), 1.0) for c, v in values.items()]))

    def walk(self, scores: np.ndarray, had: np.ndarray) -> list[int]:
        """The list by a plain loop: scores float64 [num_items] with boosts, had bool [num_items]."""
        shown: list[int] = []
        counts: Counter[str] = Counter()
        for item in sorted(range(len(scores)), key=lambda item: (-scores[item], item)):
            category = self.catalog[item]["category"]
            is_full = category is not None and counts[category] == self.rules.max_per_category
            if len(shown) < self.k and self.eligible(item) and not is_full and (not had[item] or self.repeated(item)):
                shown.append(item)
                counts[category] += 1
        return shown

    def scores(self, user: int) -> np.ndarray:
        added = np.log(np.float32([self.factor(item) for item in range(len(self.items))]))
        return (self.users[user] @ self.items.T + added).astype(np.float32)

    def expected(self, user: int) -> list[int]:
        return self.walk(self.scores(user), self.had[user])

    def popular(self) -> list[int]:
        factors = np.float32([self.factor(item) for item in range(len(self.items))])
        return self.walk(self.popularity * factors, np.zeros(len(self.items), dtype=bool))

    def recommender(self) -> Recommender:
        ids = [f"u{n:02d}" for n in range(len(self.users))], [row["item_id"] for row in self.catalog]
        users, items = (pa.chunked_array([names]) for names in ids)
        return Recommender(
            *(users, items, items, self.users, self.items, self.seen, self.popularity),
            columns=self.columns,
            rules=item_rules(self.rules, self.columns, AT),
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_list_is_that_of_a_plain_loop_and_never_holds_an_ineligible_item(seed: int) -> None:
    shop = Shop.of(seed)
    rules, everyone = item_rules(shop.rules, shop.columns, AT), np.arange(len(shop.users))
    rows = torch.from_numpy(shop.users), torch.from_numpy(shop.items)
    added = rules.added
    fused = dot_product(*rows, None if added is None else torch.from_numpy(added))
    scorers = [fused, dot_product(*rows) if added is None else adding(dot_product(*rows), added)]
    expected = [shop.expected(user) for user in everyone]
    for score in scorers:
        groups = groups_of(rules, CPU)
        ranked = rank_users(score, rules.had(shop.seen), everyone, shop.k, 7, groups)
        assert [row[row >= 0].tolist() for row in ranked] == expected
    shown = [(user, item) for user, row in enumerate(ranked) for item in row[row >= 0].tolist()]
    assert all(shop.eligible(item) and (not shop.had[user, item] or shop.repeated(item)) for user, item in shown)
    for user in everyone:
        counts = Counter(shop.catalog[item]["category"] for reader, item in shown if reader == user)
        del counts[None]
        assert max(counts.values(), default=0) <= (shop.rules.max_per_category or len(shop.items))


@pytest.mark.parametrize("seed", SEEDS[::4])
def test_export_and_served_model_obey_the_same_rules(seed: int, tmp_path: Path) -> None:
    shop = Shop.of(seed)
    model = shop.recommender()
    facts = write_export(tmp_path, model, Export(k=shop.k, num_similar=3), CPU)
    lists = pq.read_table(tmp_path / "recommendations").to_pandas()
    found = lists.groupby("user_id")["item_id"].apply(list).to_dict()
    names = {f"u{user:02d}": [f"i{item}" for item in shop.expected(user)] for user in range(len(shop.users))}
    assert found == {user: items for user, items in names.items() if items}
    assert facts["num_short_lists"] == sum(len(items) < shop.k for items in names.values())
    popular = pq.read_table(tmp_path / "popular.parquet")["item_id"].to_pylist()
    assert popular == [f"i{item}" for item in shop.popular()]
    similar = pq.read_table(tmp_path / "similar")["similar_item_id"].to_pylist()
    assert all(shop.eligible(int(item[1:])) for item in similar)

    rules = item_rules(shop.rules, shop.columns, AT)
    items = pd.Index([row["item_id"] for row in shop.catalog])
    constant = FoldIn(shop.items, np.zeros(4, np.float32), (Block(4),))
    served = ServedModel(
        *(pd.Index(sorted(names)), items, shop.users, shop.items, shop.seen, shop.popularity, {}),
        fold_in=constant,
        rules=rules,
    )
    told = served.predict(pd.DataFrame({"user_id": [*sorted(names), "nobody"]}), {"k": shop.k})
    assert told["item_ids"].tolist() == [*(names[user] for user in sorted(names)), popular]
    # A history in place of the model's knowledge: the item is had, and its row is the user's.
    history = History(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1), np.zeros(1))
    folded, _ = served.recommend(np.array([-1]), shop.k, Histories(history, np.zeros(1, np.int64)))
    like = replace(shop, users=shop.items[:1], had=np.arange(len(shop.items))[None] == 0)
    assert folded[0][folded[0] >= 0].tolist() == like.expected(0)


@pytest.mark.parametrize("seed", SEEDS[::10])
def test_eligibility_says_when_an_item_may_be_shown(seed: int) -> None:
    """By the file, a serving system shows at any later instant what an export of that instant would."""
    shop = Shop.of(seed)
    shop = replace(shop, rules=Rules(available=True))
    rows = {row["item_id"]: row for row in eligibility(shop.columns).to_pylist()}
    for item, row in enumerate(shop.catalog):
        bounds = rows.get(row["item_id"])
        by_file = (
            bounds is not None
            and (bounds["from"] is None or bounds["from"] <= AT)
            and (bounds["until"] is None or bounds["until"] > AT)
        )
        assert by_file == shop.eligible(item)


def table(**columns: Any) -> pa.Table:
    size = len(next(iter(columns.values())))
    return pa.table({"item_id": [f"i{n}" for n in range(size)], **columns})


def test_counts_say_what_each_rule_covers() -> None:
    late, instant = AT + timedelta(hours=1), pa.timestamp("us", "UTC")
    columns = table(
        category=["tea", "tea", None, "pots"],
        available_from=pa.array([late, None, late, None], instant),
        available_until=pa.array([None, AT, None, late], instant),
        in_stock=[False, None, True, True],
        price=[3.0, 2.5, None, 3.0],
    )
    rules = Rules(available=True, repeat_categories=("tea",), boosts={"price": {3: 2}, "category": {"none": 2}})
    found = item_rules(rules, columns, AT)
    assert found.factors.tolist() == [0, 0, 0, 2]
    assert found.facts["counts"] == {
        "left_out": {"sold_out": 1, "not_yet": 1, "no_longer": 1},
        "items_shown": 1,
        "bought_again": 2,
        "boosted": {"price": {"3": 2}, "category": {"none": 0}},
    }
    again = rules_of({"rules": json.loads(json.dumps(found.facts))}, columns)
    assert again.facts == found.facts
    assert rules_of({}, columns).added is None


def test_what_cannot_be_obeyed_is_named() -> None:
    sold_out = table(in_stock=[False, False])
    with pytest.raises(DataError, match="none of the 2 items may be shown: sold_out 2") as error:
        item_rules(Rules(available=True), sold_out, AT)
    assert "export.rules.available=false" in error.value.remedy
    for rules, told in [
        (Rules(available=True), "rules.available needs the column in_stock or available_from or available_until"),
        (Rules(max_per_category=2), "rules.max_per_category needs the column category"),
        (Rules(repeat_categories=("tea",)), "rules.repeat_categories needs the column category"),
        (Rules(boosts={"brand": {"acme": 2}}), "rules.boosts.brand needs the column brand"),
    ]:
        with pytest.raises(DataError, match=told):
            check_columns(rules, ["price"])
    for boosts in ({"brand": {"acme": 0}}, {"brand": {"acme": float("inf")}}, {f"c{n}": {"a": 2} for n in range(11)}):
        with pytest.raises(ValidationError, match="factors from"):
            Rules(boosts=boosts)


def test_values_of_a_boost_are_text_whatever_yaml_reads() -> None:
    rules = Rules.model_validate({"boosts": {"on_sale": {True: 2}, "stars": {3: 2, 2.5: 3}, "empty": {}}})
    assert rules.boosts == {"on_sale": {"true": 2}, "stars": {"2.5": 3, "3": 2}}
    assert rules == Rules.model_validate(rules.model_dump(mode="json"))
