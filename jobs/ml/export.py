"""Write what the champion recommends: `python -m jobs.ml.export --store URI --run RUN_ID`.

The champion is looked up once, and exported from its own run. The artifact is the contract with whoever serves:

    recommendations/*.parquet   user_id, rank (from 1), item_id, score; at most `export.k` unseen items per user
    similar/*.parquet           item_id, rank, similar_item_id, similarity (cosine)
    popular.parquet             rank, item_id, score (training interactions): for users without recommendations
    embeddings.safetensors      user_embeddings f32 [num_users, d], item_embeddings f32 [num_items, d];
                                score = dot product
    users.parquet, items.parquet  external ids (and titles); row number = row of the embeddings
    ann.faiss                   inner product over the item embeddings; id in the index = row of items.parquet

Names, types and meanings stay; what is added gets a new name. Without a champion there is nothing to export, and the
job says so.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.graph.faiss_search import write_index
from crane_core.serving.export import write_popular, write_recommendations, write_similar
from crane_core.serving.model_folder import load_recommender
from crane_core.stages import STAGES
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job
from jobs.ml.desk import take_desk
from jobs.ml.device import use_device
from jobs.runner import Job, Result, produce

logger = logging.getLogger(__name__)


def export(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Find the champion and its run, and make or find the artifact."""
    # Under the lease nobody is between moving the alias and testing through it.
    with take_desk(config.runtime, store, f"export run={arguments.run}") as desk:
        champion = desk.champion
        run_id = desk.registry.version(champion).run_id if champion else None
    if run_id is None:
        logger.info("skipped reason=no_champion")
        return {"status": "skipped", "reason": "There is no champion.", "version": None}
    recorded = store.run(run_id)["config"]
    own = RunConfig.model_validate({**recorded, "runtime": config.runtime.model_dump()})
    entry = produce(STAGES["ml.export"], run_id, "", own, store, run) | {"version": champion, "champion_run": run_id}
    if run_id != arguments.run:
        store.record(run_id, "ml.export", "", entry)
    return entry


def run(job: Job) -> Result:
    """Write the artifact of `job.run_id`, the champion's run."""
    config, runtime = job.config.export, job.config.runtime
    device = use_device(runtime)
    source, trained = job.input("etl.interactions"), job.input("ml.train")
    trained.verify()
    recommender = load_recommender(source, trained)
    users, items, seen = recommender.user_embeddings, recommender.item_embeddings, recommender.seen
    user_ids, item_ids = recommender.user_ids.to_numpy(), recommender.item_ids.to_numpy()
    for folder in ("recommendations", "similar"):
        (job.out / folder).mkdir()
    num_recommendations = write_recommendations(
        job.out / "recommendations" / "part-0.parquet", users, items, seen, user_ids, item_ids, config.k, device=device
    )
    num_similar = write_similar(
        job.out / "similar" / "part-0.parquet", items, item_ids, config.num_similar, device=device
    )
    write_popular(job.out / "popular.parquet", seen, item_ids, config.k)
    write_index(job.out / "ann.faiss", items)
    recommender.write_ids(job.out)
    recommender.save_embeddings(job.out / "embeddings.safetensors")
    logger.info("exported users=%d recommendations=%d similar=%d", len(users), num_recommendations, num_similar)
    return Result(
        {
            "num_users": len(users),
            "num_items": len(items),
            "num_recommendations": num_recommendations,
            "num_similar": num_similar,
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.export", export, argv)


if __name__ == "__main__":
    raise SystemExit(main())
