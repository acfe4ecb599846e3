"""Read the test split: the work of `jobs.ml.evaluate`."""

from __future__ import annotations

import json

import torch

from crane_core.dataset.interactions import load_ids, load_interactions, load_item_columns
from crane_core.evaluation.baselines import (
    choose_half_life,
    item_knn,
    popular_for_strangers,
    popularity,
    recent_popularity,
)
from crane_core.evaluation.ranking import Scorer, dot_product
from crane_core.evaluation.rules import ItemRules, item_rules
from crane_core.evaluation.summary import rank_test, summarise, summarise_rules, summarise_unknown_users
from crane_core.schema import USER_ID
from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import open_matrix
from jobs.ml.device import use_device
from jobs.ml.training import load_embeddings
from jobs.runner import Job, Result


def run(job: Job) -> Result:
    device = use_device(job.config.runtime)
    config = job.config.evaluate
    source = job.input("etl.interactions")
    interactions = load_interactions(source)
    half_life = choose_half_life(interactions, job.config.head.half_lives)
    models = {
        "crane": popular_for_strangers(_scorer(job.input("ml.train"), device), interactions, half_life),
        "lightgcn": popular_for_strangers(_scorer(job.input("ml.behaviour"), device), interactions, half_life),
        "item_knn": item_knn(interactions),
        "recent_popularity": recent_popularity(interactions, half_life),
        "popularity": popularity(interactions),
    }
    tested = rank_test(models, interactions, config)
    report = summarise(tested, open_matrix(job.input("ml.refine").file("fused_items.npy")), config)
    report["half_life"] = half_life
    report["cold"] = summarise_unknown_users(source.file("cold"), interactions, half_life, config.user_block)
    if job.config.export.rules.are_set():
        rules = item_rules(job.config.export.rules, load_item_columns(source), job.config.window.end)
        score = _scorer(job.input("ml.train"), device, rules)
        score = popular_for_strangers(score, interactions, half_life, rules.factors)
        report["rules"] = summarise_rules(tested, score, rules, config, device)
    (job.out / "metrics.json").write_text(json.dumps(report))
    tested.write_per_user(job.out / "per_user.parquet", load_ids(source, "users", USER_ID))
    return Result({name: report[name] for name in ("users", "half_life", "models", "differences")})


def _scorer(trained: Artifact, device: torch.device, rules: ItemRules | None = None) -> Scorer:
    users, items = load_embeddings(trained)
    added = None if rules is None or rules.added is None else torch.from_numpy(rules.added).to(device)
    return dot_product(users.to(device), items.to(device), added)
