"""Read the test split, once: `python -m jobs.ml.evaluate --store URI --run RUN_ID`.

Leaves `metrics.json` (every model with intervals, paired differences to the baselines, slices, cold items, unknown
users) and `per_user.parquet`, the metrics of each user, for later paired tests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from crane_core.dataset.interactions import Interactions, ItemLists, load_ids, load_interactions
from crane_core.errors import DataError
from crane_core.evaluation.baselines import item_knn, popular_for_strangers, popularity
from crane_core.evaluation.cold import rank_cold, summarise_cold
from crane_core.evaluation.metrics import coverage, popularity_bias, user_metrics
from crane_core.evaluation.ranking import Scorer, dot_product, rank_users, without
from crane_core.evaluation.slices import interest_entropy, slices_of_test
from crane_core.graph.candidates import unit_rows
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.schema import ITEM_IDX, REASON, SPLIT, TEST, USER_ID, USER_IDX
from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import open_matrix
from jobs.ml.device import use_device
from jobs.ml.training import load_embeddings
from jobs.runner import Job, Result, run_stage

logger = logging.getLogger(__name__)


def run(job: Job) -> Result:
    device = use_device(job.config.runtime)
    config = job.config.evaluate
    source = job.input("etl.interactions")
    interactions = load_interactions(source)
    users = np.flatnonzero(interactions.test.counts() > 0)
    if len(users) == 0:
        raise DataError(
            f"None of the {interactions.num_users} known users has an item in the test period.",
            "Lengthen etl.test_days or choose another etl.split.",
        )
    models = {
        "crane": popular_for_strangers(_scorer(job.input("ml.train"), device), interactions),
        "lightgcn": popular_for_strangers(_scorer(job.input("ml.behaviour"), device), interactions),
        "item_knn": item_knn(interactions),
        "popularity": popularity(interactions),
    }
    models = {name: without(score, interactions.gone) for name, score in models.items()}
    ranked = {
        name: rank_users(score, interactions.train, users, max(config.ks), config.user_block)
        for name, score in models.items()
    }
    per_user = {name: user_metrics(lists, interactions.test, users, config.ks) for name, lists in ranked.items()}
    report: dict[str, Any] = {"users": len(users), "models": {}, "differences": {}, "slices": {}}
    for name, metrics in per_user.items():
        intervals = bootstrap(metrics, config.num_bootstrap, config.seed)
        report["models"][name] = {metric: interval.as_dict() for metric, interval in intervals.items()} | {
            "coverage@20": coverage(ranked[name], interactions.num_items - len(interactions.gone)),
            "popularity_bias@20": popularity_bias(ranked[name], users, interactions.train, interactions.num_items),
        }
        if name != "crane":
            differences = paired_bootstrap(per_user["crane"], metrics, config.num_bootstrap, config.seed)
            report["differences"][name] = {metric: interval.as_dict() for metric, interval in differences.items()}
        logger.info(
            "model=%s recall@20=%.4f ndcg@20=%.4f", name, *(metrics[m].mean() for m in ("recall@20", "ndcg@20"))
        )
    items = unit_rows(open_matrix(job.input("ml.refine").file("fused_items.npy")))
    parts = slices_of_test(interactions, interest_entropy(items, interactions.train, config.seed))
    for label, lists in parts.items():
        members = np.flatnonzero(np.isin(users, np.flatnonzero(lists.counts() > 0)))
        report["slices"][label] = {"users": len(members)} | {
            name: {
                metric: float(values.mean()) if len(members) else None
                for metric, values in user_metrics(ranked[name][members], lists, users[members], (20,)).items()
            }
            for name in models
        }
    cold = parts["cold_items"]
    members = np.flatnonzero(cold.counts()[users] > 0)
    per_cold_user = {
        name: user_metrics(ranked[name][members], cold, users[members], (20,))
        | rank_cold(score, interactions, users[members], config.user_block)
        for name, score in models.items()
    }
    report["cold_items"] = summarise_cold(interactions, per_cold_user, config.num_bootstrap, config.seed)
    report["cold"] = _cold(source.file("cold"), interactions, config.user_block)
    (job.out / "metrics.json").write_text(json.dumps(report))
    _write_per_user(job.out / "per_user.parquet", users, load_ids(source, "users", USER_ID), interactions, per_user)
    return Result({name: report[name] for name in ("users", "models", "differences")})


def _scorer(trained: Artifact, device: torch.device) -> Scorer:
    users, items = load_embeddings(trained)
    return dot_product(users.to(device), items.to(device))


def _cold(path: Path, interactions: Interactions, block: int) -> dict[str, object]:
    """Held-out rows outside the id maps, by reason; unknown users are shown what is popular."""
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
        lists = rank_users(without(popularity(interactions), interactions.gone), nothing, everyone, 20, block)
        metrics = {m: float(v.mean()) for m, v in user_metrics(lists, relevant, everyone, (20,)).items()}
    return {"rows": counts, "unknown_users": num_users, "popularity": metrics}


def _write_per_user(
    path: Path,
    users: np.ndarray,
    user_ids: pa.ChunkedArray,
    interactions: Interactions,
    per_user: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    columns = {
        USER_IDX: pa.array(users, pa.int32()),
        USER_ID: user_ids.take(pa.array(users)),
        "num_relevant": pa.array(interactions.test.counts()[users], pa.int32()),
    }
    columns |= {
        f"{name}.{metric}": pa.array(values, pa.float32())
        for name, metrics in per_user.items()
        for metric, values in metrics.items()
    }
    pq.write_table(pa.table(columns), path)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.evaluate", run, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
