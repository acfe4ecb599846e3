"""The metrics report on the test split: models with intervals, differences to CRANE, slices, cold items and users."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from crane_core.config import Evaluate
from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import DataError
from crane_core.evaluation.baselines import recent_popularity
from crane_core.evaluation.cold import rank_cold, summarise_cold
from crane_core.evaluation.evidence import summarise_evidence
from crane_core.evaluation.metrics import coverage, popularity_bias, user_metrics
from crane_core.evaluation.ranking import Scorer, groups_of, rank_users, without
from crane_core.evaluation.rules import ItemRules
from crane_core.evaluation.slices import interest_entropy, slices_of_test
from crane_core.graph.candidates import unit_rows
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.schema import ITEM_IDX, REASON, SPLIT, TEST, USER_ID, USER_IDX

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedTest:
    """Lists and metrics of several models for the users of the test split.

    Attributes:
        interactions: the dataset.
        users: int [n], known users with a test item, ascending.
        models: name to the scores it was ranked by; tombstones have none.
        ranked: name to int32 [n, k] items.
        per_user: name to metric to float64 [n].
    """

    interactions: Interactions
    users: np.ndarray
    models: Mapping[str, Scorer]
    ranked: Mapping[str, np.ndarray]
    per_user: Mapping[str, Mapping[str, np.ndarray]]

    def write_per_user(self, path: Path, user_ids: pa.ChunkedArray) -> None:
        """Write the metrics of each user, for paired tests later.

        Args:
            path: Parquet file: `user_idx`, `user_id`, `num_relevant` and a column `model.metric` each.
            user_ids: external ids of all users, position = index.
        """
        columns = {
            USER_IDX: pa.array(self.users, pa.int32()),
            USER_ID: user_ids.take(pa.array(self.users)),
            "num_relevant": pa.array(self.interactions.test.counts()[self.users], pa.int32()),
        }
        columns |= {
            f"{name}.{metric}": pa.array(values, pa.float32())
            for name, metrics in self.per_user.items()
            for metric, values in metrics.items()
        }
        pq.write_table(pa.table(columns), path)


def rank_test(models: Mapping[str, Scorer], interactions: Interactions, config: Evaluate) -> RankedTest:
    """Rank the whole catalog for every user of the test split with every model.

    Raises:
        DataError: no known user has an item in the test period.
    """
    users = np.flatnonzero(interactions.test.counts() > 0)
    if len(users) == 0:
        raise DataError(
            f"None of the {interactions.num_users} known users has an item in the test period.",
            "Lengthen etl.test_days or choose another etl.split.",
        )
    models = {name: without(score, interactions.tombstones) for name, score in models.items()}
    ranked = {
        name: rank_users(score, interactions.train, users, max(config.ks), config.user_block)
        for name, score in models.items()
    }
    per_user = {name: user_metrics(lists, interactions.test, users, config.ks) for name, lists in ranked.items()}
    return RankedTest(interactions, users, models, ranked, per_user)


def summarise(tested: RankedTest, item_rows: np.ndarray, config: Evaluate) -> dict[str, Any]:
    """Make the report of all models; those other than `crane` are compared with it.

    Args:
        tested: `crane` and other models on the test split.
        item_rows: float [num_items, d], rows that are close for similar items: they tell diverse from focused users.
        config: resamples, seed and block of users.

    Returns:
        JSON values: `users`, `models`, `differences`, `slices`, `cold_items` and `evidence`.
    """
    report: dict[str, Any] = {"users": len(tested.users)}
    report |= {"models": {name: _model(tested, name, config) for name in tested.models}}
    report |= {"differences": _differences(tested, config)}
    entropy = interest_entropy(unit_rows(item_rows), tested.interactions.train, config.seed)
    parts = slices_of_test(tested.interactions, entropy)
    report |= {"slices": {label: _slice(tested, lists) for label, lists in parts.items()}}
    report |= {"cold_items": _cold_items(tested, parts["cold_items"], config)}
    report |= {"evidence": summarise_evidence(tested.interactions, tested.users, tested.ranked)}
    return report


def summarise_rules(
    tested: RankedTest, score: Scorer, rules: ItemRules, config: Evaluate, device: torch.device
) -> dict[str, Any]:
    """Measure the lists of `crane` that obey the rules, beside those that do not.

    Held-out items are first events, so what is bought again counts nowhere: an item that is shown again takes the place
    of one that could be found.

    Args:
        tested: `crane` and other models on the test split.
        score: that of `crane`, boosts included.
        rules: for all items of the dataset.
        config: cut-offs, resamples, seed and block of users.
        device: of the scores.

    Returns:
        JSON values: `models` with `crane` under the rules; `differences`, with the rules minus without them, paired by
        user; `counts` of the rules; and `short_lists`, users with fewer items than a list has.
    """
    interactions, users = tested.interactions, tested.users
    left_out = np.union1d(interactions.tombstones, np.flatnonzero(rules.factors == 0))
    ranked = rank_users(
        without(score, left_out),
        rules.had(interactions.train),
        users,
        max(config.ks),
        config.user_block,
        groups_of(rules, device),
    )
    metrics = user_metrics(ranked, interactions.test, users, config.ks)
    ruled = replace(tested, ranked={"crane": ranked}, per_user={"crane": metrics})
    gains = paired_bootstrap(metrics, tested.per_user["crane"], config.num_bootstrap, config.seed)
    return {
        "models": {"crane": _model(ruled, "crane", config)},
        "differences": {"crane": {metric: gain.as_dict() for metric, gain in gains.items()}},
        "counts": rules.facts["counts"],
        "short_lists": int((ranked < 0).any(axis=1).sum()),
    }


def summarise_unknown_users(
    path: Path, interactions: Interactions, half_life: float | None, block: int
) -> dict[str, Any]:
    """Count the held-out rows outside the id maps, and measure recent popularity for unknown users.

    Args:
        path: Parquet files `cold` of `etl.interactions`.
        interactions: the dataset.
        half_life: of the popularity, days; None for no decay.
        block: users at a time.

    Returns:
        JSON values: `rows` of the test by reason, the number of `unknown_users`, and metrics of `popularity` for them.
    """
    rows = pq.read_table(path, columns=[USER_ID, ITEM_IDX, SPLIT, REASON])
    test = rows.filter(pc.equal(rows.column(SPLIT), TEST))
    counts = {entry["values"]: entry["counts"] for entry in test.column(REASON).value_counts().to_pylist()}
    known = test.filter(pc.and_(pc.equal(test[REASON], "unknown_user"), test[ITEM_IDX].is_valid()))
    ids = known.column(USER_ID).combine_chunks().dictionary_encode()
    num_users = len(ids.dictionary)
    metrics: dict[str, float] = {}
    if num_users:
        users = ids.indices.to_numpy().astype(np.int32)
        relevant = ItemLists.from_pairs(users, known.column(ITEM_IDX).to_numpy().astype(np.int32), num_users)
        nothing = ItemLists(np.zeros(num_users + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
        everyone = np.arange(num_users)
        popular = without(recent_popularity(interactions, half_life), interactions.tombstones)
        lists = rank_users(popular, nothing, everyone, 20, block)
        metrics = {m: float(v.mean()) for m, v in user_metrics(lists, relevant, everyone, (20,)).items()}
    return {"rows": counts, "unknown_users": num_users, "popularity": metrics}


def _model(tested: RankedTest, name: str, config: Evaluate) -> dict[str, Any]:
    """Return the metrics of one model with intervals, its coverage and its popularity bias."""
    interactions, metrics = tested.interactions, tested.per_user[name]
    intervals = bootstrap(metrics, config.num_bootstrap, config.seed)
    logger.info("model=%s recall@20=%.4f ndcg@20=%.4f", name, *(metrics[m].mean() for m in ("recall@20", "ndcg@20")))
    return {metric: interval.as_dict() for metric, interval in intervals.items()} | {
        "coverage@20": coverage(tested.ranked[name], interactions.num_items - len(interactions.tombstones)),
        "popularity_bias@20": popularity_bias(
            tested.ranked[name], tested.users, interactions.train, interactions.num_items
        ),
    }


def _differences(tested: RankedTest, config: Evaluate) -> dict[str, Any]:
    """Return `crane` minus every other model, paired by user, with intervals."""
    found = {}
    for name, metrics in tested.per_user.items():
        if name != "crane":
            differences = paired_bootstrap(tested.per_user["crane"], metrics, config.num_bootstrap, config.seed)
            found[name] = {metric: interval.as_dict() for metric, interval in differences.items()}
    return found


def _slice(tested: RankedTest, relevant: ItemLists) -> dict[str, Any]:
    """Return the means of all models over the users who have a test item in this slice."""
    members = np.flatnonzero(np.isin(tested.users, np.flatnonzero(relevant.counts() > 0)))
    return {"users": len(members)} | {
        name: {
            metric: float(values.mean()) if len(members) else None
            for metric, values in user_metrics(ranked[members], relevant, tested.users[members], (20,)).items()
        }
        for name, ranked in tested.ranked.items()
    }


def _cold_items(tested: RankedTest, cold: ItemLists, config: Evaluate) -> dict[str, Any] | None:
    """Return the metrics of cold test items, None where there are none."""
    members = np.flatnonzero(cold.counts()[tested.users] > 0)
    users = tested.users[members]
    per_user = {
        name: user_metrics(tested.ranked[name][members], cold, users, (20,))
        | rank_cold(score, tested.interactions, users, config.user_block)
        for name, score in tested.models.items()
    }
    return summarise_cold(tested.interactions, per_user, config.num_bootstrap, config.seed)
