"""Merge and certify the item graph: `python -m jobs.ml.graph --store URI --run RUN_ID`.

Leaves the symmetric normalised CSR graph `indptr.npy` int64, `indices.npy` int32, `values.npy` float32, and
`certificate.json`: recall against brute force with its interval, and the co-interaction lift over random pairs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import numpy as np

from crane_core.dataset import load_interactions
from crane_core.errors import ArtifactError
from crane_core.graph import build_graph, certify, co_interaction_lift, merge_shards, stratified_sample
from crane_core.knn import brute_force, unit_rows
from crane_core.matrix import open_matrix
from jobs.runner import Job, Result, run_stage

logger = logging.getLogger(__name__)

MIN_LIFT = 1.2


def run(job: Job) -> Result:
    config = job.config.knn
    for part in job.input_parts("ml.knn").values():
        part.verify()
    shards = [
        (
            part.facts["start"],
            part.facts["stop"],
            open_matrix(part.file("neighbours.npy")),
            open_matrix(part.file("similarities.npy")),
        )
        for part in job.input_parts("ml.knn").values()
    ]
    unit = unit_rows(open_matrix(job.input("ml.refine").file("fused_items.npy")))
    neighbours, similarities = merge_shards(shards, len(unit))
    interactions = load_interactions(job.input("etl.interactions"))
    sample = stratified_sample(interactions.item_counts(), config.certificate_sample, seed=0)
    exact = {stratum: (rows, brute_force(unit, rows, config.k)) for stratum, rows in sample.items()}
    certificate = certify(neighbours, exact, seed=0)
    certificate |= {
        "k": neighbours.shape[1],
        "mean_similarity": float(similarities.mean()) if similarities.size else 0.0,
    }
    certificate["co_interaction"] = co_interaction_lift(neighbours, interactions.train, len(unit), seed=0)
    recall, lift = certificate["recall"], certificate["co_interaction"]["lift"]
    logger.info("certificate recall=%.4f low=%.4f lift=%.2f", recall["mean"], recall["low"], lift)
    if recall["low"] < config.min_recall:
        raise ArtifactError(
            f"The item graph has a certified recall@{config.k} of {recall['mean']:.3f} (at least {recall['low']:.3f}), "
            f"knn.min_recall is {config.min_recall}.",
            "Search more exactly or lower knn.min_recall.",
        )
    if lift < MIN_LIFT:
        logger.warning(
            "graph_on_garbage lift=%.2f expected>%.1f: the features say little about behaviour", lift, MIN_LIFT
        )
    graph = build_graph(neighbours)
    np.save(job.out / "indptr.npy", graph.indptr.astype(np.int64))
    np.save(job.out / "indices.npy", graph.indices.astype(np.int32))
    np.save(job.out / "values.npy", graph.data)
    (job.out / "certificate.json").write_text(json.dumps(certificate))
    return Result({"num_items": len(unit), "num_edges": int(graph.nnz), "certificate": certificate})


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.graph", run, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
