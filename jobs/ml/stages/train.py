"""Train CRANE beside the behavioural view: the work of `jobs.ml.train`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import torch

from crane_core.config import RunConfig
from crane_core.dataset.interactions import Interactions, end_of_training, load_interactions
from crane_core.dataset.modalities import load_features, load_modalities
from crane_core.model.content import Content, JointContent, joint_content, load_content
from crane_core.model.content_rows import ContentMap, ContentRows, read_delivered, save_content_rows
from crane_core.model.crane import Crane
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.tensors import load_tensors
from crane_core.training.fold_in import fit_fold_in
from crane_core.training.head import choose_head
from crane_core.training.share import choose_share
from jobs.ml.nodes import Training
from jobs.ml.training import lend_ranks, load_embeddings, save_embeddings, train
from jobs.runner import Job, Result

logger = logging.getLogger(__name__)


def build(
    store: ArtifactStore, run_id: str, interactions: Interactions, config: RunConfig, device: torch.device
) -> Crane:
    refined = store.artifact(run_id, "ml.refine")
    content: Content | JointContent
    if config.crane.mode == "joint":
        modalities = load_modalities(store.artifact(run_id, "etl.features"), store.artifact(run_id, "etl.profiles"))
        fitted = load_tensors(refined.file("rca.safetensors"))
        content = joint_content(modalities, fitted, config.refine, config.knn, config.crane, device)
    else:
        with_users = config.crane.reads_users
        content = load_content(refined, store.artifact(run_id, "ml.graph"), device, with_users)
    return Crane(interactions.num_users, interactions.num_items, content, config)


def run(job: Job) -> Result:
    summary, users, items = train(job, build)
    behaviour = load_embeddings(job.input("ml.behaviour"))
    interactions = load_interactions(job.input("etl.interactions"))
    chosen = choose_share(behaviour, (users, items), interactions, job.config)
    validation = summary["validation"]
    if chosen.curve:
        logger.info("trust=%.1f recall@20=%.4f behaviour_alone=%.4f", chosen.share, chosen.recall, chosen.curve[0][1])
        validation |= {"fused_recall@20": chosen.recall}
    head = choose_head(chosen.rows, interactions, job.config, load_features(job.input("etl.features")))
    if head is not None:
        logger.info("head form=%s half_life=%s history=%s", head.form, head.half_life, head.history_half_life)
    rows = chosen.rows if head is None else head.rows
    fold_in = fit_fold_in(chosen.rows, interactions) if head is None else head.fold_in
    fold_in = replace(fold_in, weight=interactions.mean_weight(), end=end_of_training(job.input("etl.interactions")))
    save_embeddings(job.out, *rows, fold_in, None if head is None else head.likeness)
    if head is not None:
        _save_content_rows(job, head.content)
    (job.out / "trust.json").write_text(json.dumps({"share": chosen.share, "curve": chosen.curve}))
    facts = {"trust": chosen.share, "head": head and head.facts(), "history": fold_in.facts()}
    return Result(summary | facts | {"validation": validation})


def _save_content_rows(job: Job, content: ContentMap) -> None:
    """Write how the vectors of a new item become its row."""
    features = job.input("etl.features")
    modalities = {
        name: read_delivered(features.file(name), facts.get("delivered_dim", facts["dim"]))
        for name, facts in sorted(features.facts["modalities"].items())
    }
    save_content_rows(ContentRows(modalities, content), job.out)


def lend(training: Training) -> None:
    """Run this node's ranks in the training that another node has started."""
    lend_ranks("ml.train", training, build)
