"""The folder of a served model: safetensors, JSON and Parquet, verified before the model is used.

    embeddings.safetensors   user_embeddings f32 [num_users, d], item_embeddings f32 [num_items, d]; since format 2
                             history_rows f32 [num_items, d] and history_constant f32 [d], for the fold-in
    seen.safetensors         indptr i64 [num_users + 1], items i32 [num_pairs]: training items of each user
    popularity.safetensors   popularity f32 [num_items]: (decayed) weight of the training interactions of each item
    weights.safetensors      the trained weights behind the embeddings
    users.parquet            user_id in the order of the rows
    items.parquet            item_id, title and the columns of the catalog, in the order of the rows
    model.json               format, sizes, run and window; since format 2 history, which says how to fold in; in format
                             3 rules, which say what may be shown
    checksums.json           size and sha256 of every other file

MLflow loads it through `_load_pyfunc`. Nothing in the folder can execute, and `release.mlmodel.served_folder` refuses
an MLmodel file around it that names another loader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.config import Rules
from crane_core.dataset.interactions import ItemLists, load_ids, load_interactions, load_item_columns
from crane_core.errors import ArtifactError, DataError
from crane_core.evaluation.rules import ItemRules, item_rules, no_rules, rules_of
from crane_core.model.fold_in import CONSTANT, ROWS, FoldIn, History
from crane_core.schema import ITEM_ID, TITLE, USER_ID
from crane_core.serving.histories import HISTORY, TIMES, Histories, is_given, read_histories
from crane_core.storage.artifacts import Artifact, check_files, sha256_file
from crane_core.storage.tensors import load_arrays, save_arrays, tensor_shapes

WITHOUT_FOLD_IN, FORMAT, WITH_RULES = 1, 2, 3
"""Formats of folders: without fold-in, as of earlier versions; the usual; with rules, which those would not obey."""
CHECKSUMS = "checksums.json"
_POPULARITY = "popularity.safetensors"
DEFAULT_K = 20
USER_BLOCK = 256


@dataclass(frozen=True)
class Recommender:
    """The part of a run that is served: users with training items, and items that are no tombstones, renumbered.

    Attributes:
        user_ids, item_ids, titles: external ids and titles in row order.
        user_embeddings, item_embeddings: float32 [num_users, d] and [num_items, d]; the score is the dot product.
        seen: training items of each user, never recommended to them.
        popularity: float32 [num_items], (decayed) weight of the training interactions; orders the list of the unknown.
        fold_in: makes a user's row of a history; None for a training of an earlier version.
        likeness: float32 [num_items, d'], rows whose cosines say how alike items are; None: `item_embeddings` do.
        history: the events of `seen`, in its order, with weights and ages; None where they are not known.
        columns: `item_id` and the columns of the catalog, in row order; None where they are not known.
        rules: what may be shown; None: all that a user does not have.
    """

    user_ids: pa.ChunkedArray
    item_ids: pa.ChunkedArray
    titles: pa.ChunkedArray
    user_embeddings: np.ndarray
    item_embeddings: np.ndarray
    seen: ItemLists
    popularity: np.ndarray
    fold_in: FoldIn | None = None
    likeness: np.ndarray | None = None
    history: History | None = None
    columns: pa.Table | None = None
    rules: ItemRules | None = None

    @property
    def shown(self) -> ItemRules:
        """Return the rules, those that leave nothing out where there are none."""
        return self.rules or no_rules(len(self.item_ids))

    def save_embeddings(self, path: Path) -> None:
        """Write the embeddings as safetensors, and the arrays of the fold-in beside them."""
        arrays = {"user_embeddings": self.user_embeddings, "item_embeddings": self.item_embeddings}
        save_arrays(arrays | (self.fold_in.arrays() if self.fold_in else {}), path)

    def write_ids(self, folder: Path) -> None:
        """Write `users.parquet` and `items.parquet`; the row number is that of the embeddings."""
        pq.write_table(pa.table({USER_ID: self.user_ids}), folder / "users.parquet")
        columns = {} if self.columns is None else {name: self.columns[name] for name in self.columns.column_names}
        items = {ITEM_ID: self.item_ids, TITLE: self.titles} | columns
        pq.write_table(pa.table(items), folder / "items.parquet")


def load_recommender(
    interactions: Artifact, trained: Artifact, rules: Rules | None = None, at: datetime | None = None
) -> Recommender:
    """Read the artifacts of `etl.interactions` and of a training.

    Args:
        interactions: the users and items.
        trained: the rows.
        rules: what may be shown; None for no rules.
        at: the instant at which the rules are read: `window.end`.

    Raises:
        DataError: the rules do not fit the catalog.
    """
    rows, known = load_arrays(trained.file("embeddings.safetensors")), load_interactions(interactions)
    counts = known.train.counts()
    users = np.flatnonzero(counts > 0)
    items = np.setdiff1d(np.arange(known.num_items), known.tombstones)
    # Tombstones have no training interaction, so every item that was seen has a row among the others.
    seen = np.searchsorted(items, known.train.items).astype(np.int32)
    lists = ItemLists(np.concatenate([[0], np.cumsum(counts[users])]), seen)
    columns = load_item_columns(interactions).take(pa.array(items))
    return Recommender(
        load_ids(interactions, "users", USER_ID).take(pa.array(users)),
        load_ids(interactions, "items", ITEM_ID).take(pa.array(items)),
        load_ids(interactions, "items", TITLE).take(pa.array(items)),
        rows["user_embeddings"][users],
        rows["item_embeddings"][items],
        lists,
        known.popularity(_half_life(trained))[items].astype(np.float32),
        FoldIn.of(rows, trained.facts["history"]).of_items(items) if "history" in trained.facts else None,
        rows["likeness"][items] if "likeness" in rows else None,
        History(lists.users(), seen, known.decayed(None).astype(np.float32), known.ages),
        columns,
        item_rules(rules, columns, at) if rules is not None and rules.are_set() and at is not None else None,
    )


def _half_life(trained: Artifact) -> float | None:
    """Return the half-life of popularity that a training chose; None for no decay, as in models without times."""
    return (trained.facts.get("head") or {}).get("half_life")


def write_model(folder: Path, recommender: Recommender, weights: Path, facts: Mapping[str, Any]) -> None:
    """Write a trained model into a folder for serving.

    Args:
        folder: empty folder.
        recommender: users and items that it serves.
        weights: safetensors file with the trained weights.
        facts: run and window, JSON values.
    """
    recommender.save_embeddings(folder / "embeddings.safetensors")
    shutil.copyfile(weights, folder / "weights.safetensors")
    seen = recommender.seen
    save_arrays({"indptr": seen.indptr, "items": seen.items}, folder / "seen.safetensors")
    save_arrays({"popularity": recommender.popularity}, folder / _POPULARITY)
    recommender.write_ids(folder)
    num_users, num_items = len(recommender.user_ids), len(recommender.item_ids)
    sizes = {"num_users": num_users, "num_items": num_items, "num_seen": len(seen.items)}
    folds_in = {} if recommender.fold_in is None else {"history": recommender.fold_in.facts()}
    form: dict[str, Any] = {"format": FORMAT if folds_in else WITHOUT_FOLD_IN, **folds_in}
    if recommender.rules is not None:
        form |= {"format": WITH_RULES, "rules": recommender.rules.facts}
    (folder / "model.json").write_text(json.dumps({**form, **sizes, **facts}, indent=1, sort_keys=True))
    checksums = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())
    }
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1, sort_keys=True))


def verify_model(folder: Path) -> dict[str, Any]:
    """Compare every file with the checksums.

    Returns:
        The content of `model.json`.

    Raises:
        ArtifactError: a file is missing, added, changed, or of another format.
    """
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(folder, f"{CHECKSUMS} cannot be read ({error})") from error
    found = check_files(folder, checksums, CHECKSUMS)
    if found:
        raise _refused(folder, found)
    for name, expected in checksums.items():
        if sha256_file(folder / name) != expected["sha256"]:
            raise _refused(folder, f"{name} does not match its sha256")
    try:
        facts = json.loads((folder / "model.json").read_text())
        if facts["format"] not in (WITHOUT_FOLD_IN, FORMAT, WITH_RULES):
            raise _refused(folder, f"format {facts['format']!r} found, {WITHOUT_FOLD_IN} to {WITH_RULES} expected")
        sizes = [facts[name] for name in ("num_users", "num_items", "num_seen")]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise _refused(folder, f"model.json is none ({error!r})") from error
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise _refused(folder, f"model.json gives the sizes {sizes}")
    return facts


@dataclass(frozen=True)
class ServedModel:
    """A verified model in memory.

    Attributes:
        user_ids: external ids, position = row of `user_embeddings`.
        item_ids: external ids, position = row of `item_embeddings`.
        user_embeddings: float32 [num_users, d].
        item_embeddings: float32 [num_items, d].
        seen: training items of each user.
        popularity: float32 [num_items], orders the list of unknown users.
        facts: content of `model.json`.
        fold_in: makes a user's row of a history; None in a folder of format 1.
        rules: what may be shown; None: all that a user does not have.
    """

    user_ids: pd.Index
    item_ids: pd.Index
    user_embeddings: np.ndarray
    item_embeddings: np.ndarray
    seen: ItemLists
    popularity: np.ndarray
    facts: dict[str, Any]
    fold_in: FoldIn | None = None
    rules: ItemRules | None = None

    def recommend(self, users: np.ndarray, k: int, histories: Histories | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the best items of some users that they do not have and that the rules allow.

        Args:
            users: int [n] rows; -1 is an unknown user, who gets the items that are most popular now.
            k: list length; at most the size of the catalog is used.
            histories: of the users. A history with known items stands in place of what the model knows of the user,
                and its items are left out, too.

        Returns:
            int64 [n, k] item rows by falling score, -1 where fewer than k items are left; float32 [n, k] scores.
        """
        k = min(k, len(self.item_ids))
        rules = self.rules or no_rules(len(self.item_ids))
        added, had = rules.added, rules.had(self.seen)
        items = np.empty((len(users), k), dtype=np.int64)
        scores = np.empty((len(users), k), dtype=np.float32)
        for start in range(0, len(users), USER_BLOCK):
            block = users[start : start + USER_BLOCK]
            known = block >= 0
            table = np.empty((len(block), len(self.item_ids)), dtype=np.float32)
            table[~known] = np.where(rules.factors > 0, self.popularity * rules.factors, -np.inf)
            table[known] = self.user_embeddings[block[known]] @ self.item_embeddings.T
            is_scored = known
            if histories is not None:
                is_scored = known | self._fold(table, histories.part(start, start + len(block)), rules)
            if added is not None:
                table[is_scored] += added
            rows, masked = had.rows(block[known])
            table[np.flatnonzero(known)[rows], masked] = -np.inf
            items[start : start + len(block)], scores[start : start + len(block)] = rules.best(table, k)
        return items, scores

    def _fold(self, table: np.ndarray, histories: Histories, rules: ItemRules) -> np.ndarray:
        """Put the scores of users with a history into a table, float32 [n, num_items]; -inf for what they have.

        Returns:
            bool [n], the users with a history.
        """
        assert self.fold_in is not None
        history, folded = histories.history, histories.has_items()
        rows = self.fold_in.fold(history, len(table))[folded]
        table[folded] = rows @ self.item_embeddings.T
        had = ~rules.is_repeated[history.items]
        table[history.users[had], history.items[had]] = -np.inf
        return folded

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Recommend items for external user ids.

        Args:
            model_input: column `user_id`, strings. Optional columns `history`, a list of item ids or null, and
                `history_times`, a list of as many instants or null: see `read_histories`. A user with a known item in
                the history gets a list by that history, whether or not the model knows the user.
            params: `k`, the list length, 20 when absent.

        Returns:
            One row per input row: `user_id`; `item_ids`, a list of at most k ids by falling score; `scores`, floats
            of the same length; `fallback`, true where nothing is known of the user and the list is the most popular
            items; `unknown_items`, how many items of the history the model does not know.

        Raises:
            DataError: no column `user_id`, k below 1, or a history that cannot be read.
            ArtifactError: a history for a model of format 1.
        """
        if USER_ID not in model_input:
            raise DataError(
                f"Columns {list(model_input.columns)} hold no {USER_ID!r}.",
                f"Send a column {USER_ID} with the ids of users.",
            )
        k = int((params or {}).get("k", DEFAULT_K))
        if k < 1:
            raise DataError(f"k is {k}.", "Send a k of 1 or more, for example 10.")
        users = self.user_ids.get_indexer(model_input[USER_ID].astype(str))
        histories = self._histories(model_input)
        items, scores = self.recommend(users, k, histories)
        is_folded = np.zeros(len(users), dtype=bool) if histories is None else histories.has_items()
        ids = self.item_ids.to_numpy()
        return pd.DataFrame(
            {
                USER_ID: model_input[USER_ID].to_numpy(),
                "item_ids": [ids[row[row >= 0]].tolist() for row in items],
                "scores": [values[row >= 0].tolist() for row, values in zip(items, scores, strict=True)],
                "fallback": (users < 0) & ~is_folded,
                "unknown_items": np.zeros(len(users), dtype=np.int64) if histories is None else histories.num_unknown,
            }
        )

    def _histories(self, model_input: pd.DataFrame) -> Histories | None:
        """Return the histories of a request, None where it has none."""
        if HISTORY not in model_input or not model_input[HISTORY].map(is_given).any():
            return None
        if self.fold_in is None:
            raise ArtifactError(
                f"A model of format {self.facts.get('format')} cannot make a list of a history.",
                "Run the window again with this version (crane run), then crane promote --run RUN.",
            )
        times = model_input[TIMES].tolist() if TIMES in model_input else None
        return read_histories(model_input[HISTORY].tolist(), times, self.item_ids, self.fold_in)


def load_model(folder: Path) -> ServedModel:
    """Verify a model folder and read it.

    Raises:
        ArtifactError: it was tampered with, or its tables and tensors do not fit together.
    """
    facts = verify_model(folder)
    num_users, num_items, num_seen = facts["num_users"], facts["num_items"], facts["num_seen"]
    shapes = tensor_shapes(folder / "embeddings.safetensors")
    dim = shapes.get("user_embeddings", (0,))[-1]
    folds_in = facts["format"] == FORMAT or "history" in facts
    shapes |= tensor_shapes(folder / "seen.safetensors")
    # A model of an earlier version counts the training interactions instead.
    is_older = not (folder / _POPULARITY).exists()
    if not is_older:
        shapes |= tensor_shapes(folder / _POPULARITY)
    expected = {
        "user_embeddings": (num_users, dim),
        "item_embeddings": (num_items, dim),
        **({ROWS: (num_items, dim), CONSTANT: (dim,)} if folds_in else {}),
        "indptr": (num_users + 1,),
        "items": (num_seen,),
        **({} if is_older else {"popularity": (num_items,)}),
    }
    if shapes != expected:
        raise _refused(folder, f"tensor shapes {shapes} found, {expected} expected")
    embeddings = load_arrays(folder / "embeddings.safetensors")
    seen = load_arrays(folder / "seen.safetensors")
    ids = [
        pd.Index(pq.read_table(folder / name, columns=[column]).column(column).to_pandas(), dtype=object)
        for name, column in (("users.parquet", USER_ID), ("items.parquet", ITEM_ID))
    ]
    if [len(index) for index in ids] != [num_users, num_items]:
        raise _refused(folder, f"{[len(index) for index in ids]} ids found, {[num_users, num_items]} expected")
    return ServedModel(
        ids[0],
        ids[1],
        embeddings["user_embeddings"],
        embeddings["item_embeddings"],
        ItemLists(seen["indptr"], seen["items"]),
        np.bincount(seen["items"], minlength=num_items).astype(np.float32)
        if is_older
        else load_arrays(folder / _POPULARITY)["popularity"],
        facts,
        _fold_in(folder, embeddings, facts) if folds_in else None,
        _rules(folder, facts) if facts["format"] == WITH_RULES else None,
    )


def _fold_in(folder: Path, embeddings: dict[str, np.ndarray], facts: dict[str, Any]) -> FoldIn:
    try:
        return FoldIn.of(embeddings, facts["history"])
    except (ValueError, TypeError, KeyError) as error:
        raise _refused(folder, f"history in model.json does not say how to fold in ({error!r})") from error


def _rules(folder: Path, facts: dict[str, Any]) -> ItemRules:
    try:
        return rules_of(facts, pq.read_table(folder / "items.parquet"))
    except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
        raise _refused(folder, f"rules in model.json do not say what may be shown ({error!r})") from error


def _load_pyfunc(data_path: str) -> ServedModel:
    """Load the model for MLflow, which calls this function of the module that `loader_module` names."""
    return load_model(Path(data_path))


def _refused(folder: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"Model {folder} is refused: {found}.",
        "Run python -m jobs.ml.register --store STORE --run RUN, then crane promote --run RUN.",
    )
