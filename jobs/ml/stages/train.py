"""Train CRANE beside the behavioural view: the work of `jobs.ml.train`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import torch

from crane_core.config import RunConfig
from crane_core.dataset.interactions import Interactions, end_of_training, load_interactions
from crane_core.dataset.modalities import load_modalities
from crane_core.model.content import Content, JointContent, joint_content, load_content, load_graph, neighbour_graph
from crane_core.model.crane import Crane
from crane_core.model.propagation import SymmetricGraph
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


def item_graph(job: Job) -> SymmetricGraph:
    """The item graph of the best epoch."""
    if job.config.crane.mode == "joint":
        return neighbour_graph(load_tensors(job.out / "weights.safetensors")["content.neighbours"])
    return load_graph(job.input("ml.graph"), torch.device("cpu"))


def run(job: Job) -> Result:
    summary, users, items = train(job, build)
    behaviour = load_embeddings(job.input("ml.behaviour"))
    interactions = load_interactions(job.input("etl.interactions"))
    chosen = choose_share(behaviour, (users, items), item_graph(job), interactions, job.config)
    validation = summary["validation"]
    if chosen.curve:
        logger.info("trust=%.1f recall@20=%.4f behaviour_alone=%.4f", chosen.share, chosen.recall, chosen.curve[0][1])
        validation |= {"fused_recall@20": chosen.recall}
    head = choose_head(chosen.rows, interactions, job.config)
    if head is not None:
        logger.info("head %s", " ".join(f"{name}={value}" for name, value in head.facts().items()))
    rows = chosen.rows if head is None else head.rows
    fold_in = fit_fold_in(chosen.rows, interactions) if head is None else head.fold_in
    fold_in = replace(fold_in, weight=interactions.mean_weight(), end=end_of_training(job.input("etl.interactions")))
    save_embeddings(job.out, *rows, fold_in)
    (job.out / "trust.json").write_text(json.dumps({"share": chosen.share, "curve": chosen.curve}))
    facts = {"trust": chosen.share, "head": head and head.facts(), "history": fold_in.facts()}
    return Result(summary | facts | {"validation": validation})


def lend(training: Training) -> None:
    """Run this node's ranks in the training that another node has started."""
    lend_ranks("ml.train", training, build)
