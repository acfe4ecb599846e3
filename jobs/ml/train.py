"""Train CRANE to its best validation recall: `python -m jobs.ml.train --store URI --run RUN_ID`.

Leaves `embeddings.safetensors` (`user_embeddings` and `item_embeddings`, scores are their dot products): CRANE's rows
beside the behavioural view, at the share the validation split trusts them with. Also `weights.safetensors`,
`curve.json` with one entry per epoch, and `trust.json` with the recall at every share tried.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import torch

from crane_core.config import RunConfig
from crane_core.content import load_content, load_graph
from crane_core.dataset import Interactions, load_interactions
from crane_core.fusion import choose_trust
from crane_core.model import Crane
from crane_core.store import ArtifactStore
from jobs.ml.launch import load_embeddings, save_embeddings, train
from jobs.runner import Job, Result, run_stage

logger = logging.getLogger(__name__)


def build(
    store: ArtifactStore, run_id: str, interactions: Interactions, config: RunConfig, device: torch.device
) -> Crane:
    with_users = config.train.semantic_users == "profiles"
    content = load_content(store.artifact(run_id, "ml.refine"), store.artifact(run_id, "ml.graph"), device, with_users)
    return Crane(interactions.num_users, interactions.num_items, content, config.train)


def run(job: Job) -> Result:
    summary, users, items = train(job, build)
    behaviour = load_embeddings(job.input("ml.behaviour"))
    interactions = load_interactions(job.input("etl.interactions"))
    graph = load_graph(job.input("ml.graph"), torch.device("cpu"))
    trust = choose_trust(behaviour, (users, items), graph, interactions, job.config.train)
    logger.info("trust=%.1f recall@20=%.4f behaviour_alone=%.4f", trust.share, trust.recall, trust.curve[0][1])
    save_embeddings(job.out, *trust.rows)
    (job.out / "trust.json").write_text(json.dumps({"share": trust.share, "curve": trust.curve}))
    return Result(
        summary | {"trust": trust.share, "validation": summary["validation"] | {"fused_recall@20": trust.recall}}
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.train", run, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
