"""Make a list from the files of the export: by a history given at the call, or of one category of the catalog."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from crane_core.errors import ArtifactError, ConfigError, DataError
from crane_core.evaluation.rules import ItemRules, rules_of
from crane_core.model.fold_in import FOLD_IN, ROWS, FoldIn
from crane_core.schema import CATEGORY, ITEM_ID, ITEM_IDX, SPLIT, TITLE, TRAIN, USER_ID, USER_IDX
from crane_core.serving.histories import read_histories
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.tensors import load_arrays
from jobs.commands.query import NUM_EXAMPLES, Served, example_users


@dataclass(frozen=True)
class Exported:
    """The items of an export, and the rules that it obeys.

    Attributes:
        items: `items.parquet`.
        arrays: `embeddings.safetensors`.
        rules: what may be shown.
    """

    items: pa.Table
    arrays: dict[str, np.ndarray]
    rules: ItemRules

    @classmethod
    def of(cls, served: Served) -> Exported:
        """Read the files of the champion's export."""
        items = pq.read_table(served.export.file("items.parquet"))
        arrays = load_arrays(served.export.file("embeddings.safetensors"))
        return cls(items, arrays, rules_of(served.export.facts, items))

    def ids(self) -> pd.Index:
        """Return the ids of the items, in row order."""
        return pd.Index(self.items[ITEM_ID].to_pandas(), dtype=object)

    def of_category(self, category: str | None) -> np.ndarray:
        """Return which items are of a category, all for None: bool [num_items].

        Raises:
            DataError: there is none.
        """
        if category is None:
            return np.ones(self.items.num_rows, dtype=bool)
        if CATEGORY not in self.items.column_names:
            raise DataError(
                "The items of the champion have no category.",
                "Deliver items/*.parquet with a column category (text) for the next run, or leave --category out.",
            )
        is_member = pc.fill_null(pc.equal(self.items[CATEGORY], category), False).to_numpy()
        if not is_member.any():
            known = pc.value_counts(self.items[CATEGORY].drop_null()).to_pylist()
            known = sorted(known, key=lambda each: -each["counts"])[:NUM_EXAMPLES]
            raise DataError(
                f"No item of the champion is of the category {category!r}.",
                f"Give --category one of the catalog's, for example {', '.join(each['values'] for each in known)}.",
            )
        return is_member

    def best(self, row: np.ndarray, had: np.ndarray, category: str | None, k: int) -> list[dict[str, Any]]:
        """Return the best items for a user.

        Args:
            row: float32 [d], the user's row.
            had: int, rows of the items that the user has.
            category: of the items; a list of one category may hold any number of it. None for all.
            k: list length.
        """
        scores = self.arrays["item_embeddings"] @ row
        if self.rules.added is not None:
            scores = scores + self.rules.added
        scores[had[~self.rules.is_repeated[had]]] = -np.inf
        scores[~self.of_category(category)] = -np.inf
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > -np.inf]
        rows = self.rules.first(order.tolist(), k) if category is None else order[:k].tolist()
        return [self.shown(rank, row, float(scores[row])) for rank, row in enumerate(rows, start=1)]

    def shown(self, rank: int, row: int, score: float) -> dict[str, Any]:
        """Return an item of a list as JSON values."""
        item, title = (self.items[name][row].as_py() for name in (ITEM_ID, TITLE))
        return {"rank": rank, ITEM_ID: item, "score": score, "title": title or None}


def recommend_in_category(served: Served, store: ArtifactStore, user: str, category: str, k: int) -> dict[str, Any]:
    """Return the best k items of one category for a user of the data.

    Args:
        served: the champion and its export.
        store: holds the training interactions of the champion, which tell what the user has.
        user: its id.
        category: of the catalog.
        k: list length.

    Raises:
        ArtifactError: the training interactions were removed.
        ConfigError: k is below 1.
        DataError: the user or the category is unknown.
    """
    _check_length(k)
    exported = Exported.of(served)
    users = pd.Index(pq.read_table(served.export.file("users.parquet"))[USER_ID].to_pandas(), dtype=object)
    place = users.get_indexer([user])[0]
    if place < 0:
        raise DataError(
            f"User {user!r} has no recommendations in version {served.version} (run {served.run_id}).",
            f"Give an id of the data's {USER_ID} that has training interactions, for example "
            f"{', '.join(example_users(served))}.",
        )
    had = exported.ids().get_indexer(_items_of(served, store, user))
    items = exported.best(exported.arrays["user_embeddings"][place], had, category, k)
    told = {"model_version": served.version, "run": served.run_id}
    return {"user": user, "category": category, **told, "items": items}


def _items_of(served: Served, store: ArtifactStore, user: str) -> list[str]:
    """Return the items of a user's training interactions."""
    source = store.find("etl.interactions", served.export.manifest["inputs"]["etl.interactions"])
    if source is None:
        raise ArtifactError(
            f"The interactions that version {served.version} has learned from are not in the store any more.",
            "Leave --category out, or run the window again (crane run), then crane promote --run RUN.",
        )
    users = ds.dataset(source.file("users")).to_table([USER_IDX], filter=ds.field(USER_ID) == user)
    number = users[USER_IDX][0].as_py()
    own = (ds.field(USER_IDX) == number) & (ds.field(SPLIT) == TRAIN)
    rows = ds.dataset(source.file("interactions")).to_table([ITEM_IDX], filter=own)[ITEM_IDX]
    items = ds.dataset(source.file("items")).to_table([ITEM_ID], filter=ds.field(ITEM_IDX).isin(rows))
    return items[ITEM_ID].to_pylist()


def _check_length(k: int) -> None:
    if k < 1:
        raise ConfigError(f"-k is {k}.", "Give -k 1 or more, for example -k 10.")


def recommend_by_history(
    served: Served, items: Sequence[str], times: Sequence[str] | None, k: int, category: str | None = None
) -> dict[str, Any]:
    """Return the best k items for somebody who met some items, and the most popular ones if all of them are unknown.

    Args:
        served: the champion and its export.
        items: ids of the items.
        times: ISO 8601, one for each item; None where they are not known.
        k: list length; a list of popular items has at most as many as were exported.
        category: of the items; None for all.

    Raises:
        ArtifactError: the export is of a version without fold-in.
        ConfigError: k is below 1.
        DataError: the times are no instants, or not as many as the items; or the category is unknown.
    """
    _check_length(k)
    exported = Exported.of(served)
    if ROWS not in exported.arrays:
        raise ArtifactError(
            f"The export of version {served.version} (run {served.run_id}) cannot make a list of a history.",
            "Run the window again with this version (crane run), then crane promote --run RUN.",
        )
    fold_in = FoldIn.of(exported.arrays, json.loads(served.export.file(FOLD_IN).read_text()))
    index = exported.ids()
    histories = read_histories([list(items)], None if times is None else [list(times)], index, fold_in)
    is_folded = bool(histories.has_items()[0])
    titles = served.titles()
    if is_folded:
        row = fold_in.fold(histories.history, 1)[0]
        shown = exported.best(row, histories.history.items, category, k)
    else:
        popular = pq.read_table(served.export.file("popular.parquet")).sort_by("rank").to_pylist()
        is_member = exported.of_category(category)
        found = [(int(index.get_loc(each[ITEM_ID])), each["score"]) for each in popular]
        found = [(row, score) for row, score in found if is_member[row]][:k]
        shown = [exported.shown(rank, row, score) for rank, (row, score) in enumerate(found, start=1)]
    return {
        "history": [{ITEM_ID: item, "title": titles.get(item)} for item in items],
        "unknown_items": [item for item in dict.fromkeys(items) if item not in index],
        "fallback": not is_folded,
        "model_version": served.version,
        "run": served.run_id,
        "items": shown,
    }
