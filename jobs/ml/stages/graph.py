"""Merge and certify the item graph: the work of `jobs.ml.graph`."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np

from crane_core.config import Knn
from crane_core.dataset.interactions import load_interactions
from crane_core.errors import ArtifactError
from crane_core.graph.certificate import certify, co_interaction_lift, split_sample, stratified_sample
from crane_core.graph.exact import brute_force
from crane_core.graph.faiss_search import use_threads
from crane_core.graph.item_graph import build_graph, merge_shards
from crane_core.graph.lists import find_neighbours
from crane_core.storage.matrix import open_matrix
from jobs.ml.device import use_torch_threads
from jobs.runner import Job, Result

logger = logging.getLogger(__name__)

MIN_LIFT = 1.2
RAISE = 4
"""Factor of the number of probes when the certified recall is too low."""


def run(job: Job) -> Result:
    use_torch_threads(job.config.runtime)
    use_threads(job.config.runtime.num_threads)
    rows = open_matrix(job.input("ml.refine").file("fused_items.npy"))
    interactions = load_interactions(job.input("etl.interactions"))
    neighbours, similarities, certificate = _certified_lists(job, rows, interactions.item_counts())
    certificate |= {"co_interaction": co_interaction_lift(neighbours, interactions.train, len(rows), seed=0)}
    _check(certificate, job.config.knn)
    graph = build_graph(neighbours)
    np.save(job.out / "neighbours.npy", neighbours)
    np.save(job.out / "similarities.npy", similarities)
    np.save(job.out / "indptr.npy", graph.indptr.astype(np.int64))
    np.save(job.out / "indices.npy", graph.indices.astype(np.int32))
    np.save(job.out / "values.npy", graph.data)
    (job.out / "certificate.json").write_text(json.dumps(certificate))
    return Result({"num_items": len(rows), "num_edges": int(graph.nnz), "certificate": certificate})


def _certified_lists(
    job: Job, rows: np.ndarray, train_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Merge the shards, or search again with more probes where their recall is too low.

    Args:
        rows: float [num_items, d].
        train_counts: int [num_items], training interactions.

    Returns:
        int32 and float32 [num_items, k] neighbours and similarities, and their certificate.
    """
    config = job.config.knn
    neighbours, similarities = merge_shards(_shards(job), len(rows))
    sample = stratified_sample(train_counts, config.certificate_sample, seed=0)
    truth = brute_force(rows, np.unique(np.concatenate(list(sample.values()))), config.k, config.memory)
    exact = split_sample(sample, truth)
    certificate = certify(neighbours, exact, seed=0)
    attempts = [{"num_probes": config.num_probes, "recall": certificate["recall"]}]
    if certificate["recall"]["low"] < config.min_recall and config.approximate(len(rows)):
        more = config.model_copy(update={"num_probes": RAISE * config.num_probes})
        logger.warning(
            "raise num_probes=%d recall_low=%.4f min_recall=%.4f",
            *(more.num_probes, certificate["recall"]["low"], config.min_recall),
        )
        work = job.work / f"probes-{more.num_probes}"
        work.mkdir(exist_ok=True)
        neighbours, similarities = find_neighbours(rows, range(len(rows)), more, work=work)
        certificate = certify(neighbours, exact, seed=0)
        attempts.append({"num_probes": more.num_probes, "recall": certificate["recall"]})
    return (
        neighbours,
        similarities,
        certificate
        | {
            "k": neighbours.shape[1],
            "mean_similarity": float(similarities.mean()) if similarities.size else 0.0,
            "attempts": attempts if config.approximate(len(rows)) else [],
        },
    )


def _shards(job: Job) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Read the first and last row, the neighbours and the similarities of every shard."""
    parts = job.input_parts("ml.knn")
    for part in parts:
        part.verify()
    names = ("neighbours.npy", "similarities.npy")
    return [
        (part.facts["start"], part.facts["stop"], *(open_matrix(part.file(name)) for name in names)) for part in parts
    ]


def _check(certificate: dict[str, Any], config: Knn) -> None:
    """Log the certificate.

    Raises:
        ArtifactError: the certified recall is below `knn.min_recall`.
    """
    recall, lift = certificate["recall"], certificate["co_interaction"]["lift"]
    logger.info("certificate recall=%.4f low=%.4f lift=%.2f", recall["mean"], recall["low"], lift)
    if recall["low"] < config.min_recall:
        num_probes = certificate["attempts"][-1]["num_probes"] if certificate["attempts"] else config.num_probes
        raise ArtifactError(
            f"The item graph has a certified recall@{config.k} of {recall['mean']:.3f} (at least {recall['low']:.3f}), "
            f"knn.min_recall is {config.min_recall}; tried with {num_probes} probes.",
            "Raise knn.num_probes, set knn.mode=exact or lower knn.min_recall.",
        )
    if lift < MIN_LIFT:
        logger.warning(
            "graph_on_garbage lift=%.2f expected>%.1f: the features say little about behaviour", lift, MIN_LIFT
        )
