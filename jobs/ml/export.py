"""Write what the champion recommends: `python -m jobs.ml.export --store URI --run RUN_ID`.

The champion is looked up once, and exported from its own run. The artifact is the contract with whoever serves:

    recommendations/*.parquet   user_id, rank (from 1), item_id, score; at most `export.k` unseen items per user
    similar/*.parquet           item_id, rank, similar_item_id, similarity (cosine)
    popular.parquet             rank, item_id, score (training interactions): for users without recommendations
    embeddings.safetensors      user_embeddings f32 [num_users, d], item_embeddings f32 [num_items, d];
                                score = dot product; zeros for items that an earlier run knew and this one does not
    users.parquet, items.parquet  external ids (and titles); row number = row of the embeddings
    ann.faiss                   inner product over the item embeddings; id in the index = row of items.parquet

Names, types and meanings stay; what is added gets a new name. Without a champion there is nothing to export, and the
job says so.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.config import RunConfig
from crane_core.dataset import load_ids, load_interactions
from crane_core.export import write_popular, write_recommendations, write_similar
from crane_core.knn import write_index
from crane_core.pipeline import STAGES
from crane_core.schema import ITEM_ID, TITLE, USER_ID
from crane_core.store import ArtifactStore
from crane_core.tensors import load_arrays
from jobs.ml.desk import take_desk
from jobs.ml.device import use_device
from jobs.runner import Job, Result, produce, run_job

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
    train = load_interactions(source).train
    user_column = load_ids(source, "users", USER_ID)
    user_ids = user_column.to_numpy()
    item_column = load_ids(source, "items", ITEM_ID)
    item_ids = item_column.to_numpy()
    rows = load_arrays(trained.file("embeddings.safetensors"))
    users, items = rows["user_embeddings"], rows["item_embeddings"]
    for folder in ("recommendations", "similar"):
        (job.out / folder).mkdir()
    num_recommendations = write_recommendations(
        job.out / "recommendations" / "part-0.parquet", users, items, train, user_ids, item_ids, config.k, device=device
    )
    num_similar = write_similar(
        job.out / "similar" / "part-0.parquet", items, item_ids, config.num_similar, device=device
    )
    write_popular(job.out / "popular.parquet", train, item_ids, config.k)
    write_index(job.out / "ann.faiss", items)
    titles = load_ids(source, "items", TITLE)
    pq.write_table(pa.table({ITEM_ID: item_column, TITLE: titles}), job.out / "items.parquet")
    pq.write_table(pa.table({USER_ID: user_column}), job.out / "users.parquet")
    shutil.copyfile(trained.file("embeddings.safetensors"), job.out / "embeddings.safetensors")
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
