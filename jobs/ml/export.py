"""Write what the champion recommends: `python -m jobs.ml.export --store URI --run RUN_ID`.

The champion is looked up once, and exported from its own run: `recommendations/` and `similar/` (Parquet, external
ids), `popular.parquet` for unknown users, `ann.faiss` (inner product over the item embeddings) and `items.parquet`,
whose row number is the id in the index. Without a champion there is nothing to export, and the job says so.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.config import RunConfig
from crane_core.dataset import load_ids, load_interactions
from crane_core.export import write_popular, write_recommendations, write_similar
from crane_core.knn import write_index
from crane_core.ledger import Ledger, settle
from crane_core.pipeline import STAGES
from crane_core.registry import open_registry
from crane_core.schema import ITEM_ID, TITLE, USER_ID
from crane_core.store import ArtifactStore
from crane_core.tensors import load_arrays
from jobs.ml.device import use_device
from jobs.runner import Job, Result, produce, run_job

logger = logging.getLogger(__name__)


def export(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Find the champion and its run, and make or find the artifact."""
    registry = open_registry(config.runtime, store.storage.uri)
    champion = settle(Ledger(store.storage, registry.name), registry)
    if champion is None:
        logger.info("skipped reason=no_champion")
        return {"status": "skipped", "reason": "There is no champion.", "version": None}
    run_id = registry.version(champion).run_id
    recorded = store.run(run_id)["config"]
    own = RunConfig.model_validate({**recorded, "runtime": config.runtime.model_dump()})
    entry = produce(STAGES["ml.export"], run_id, "", own, store, run) | {"version": champion, "champion_run": run_id}
    if run_id != arguments.run:
        store.record(run_id, "ml.export", "", entry)
    return entry


def run(job: Job) -> Result:
    """Write the artifact of `job.run_id`, the champion's run."""
    config, runtime = job.config.export, job.config.runtime
    use_device(runtime)
    source, trained = job.input("etl.interactions"), job.input("ml.train")
    trained.verify()
    train = load_interactions(source).train
    user_ids = load_ids(source, "users", USER_ID).to_numpy()
    item_column = load_ids(source, "items", ITEM_ID)
    item_ids = item_column.to_numpy()
    rows = load_arrays(trained.file("embeddings.safetensors"))
    users, items = rows["user_embeddings"], rows["item_embeddings"]
    for folder in ("recommendations", "similar"):
        (job.out / folder).mkdir()
    num_recommendations = write_recommendations(
        job.out / "recommendations" / "part-0.parquet", users, items, train, user_ids, item_ids, config.k
    )
    num_similar = write_similar(job.out / "similar" / "part-0.parquet", items, item_ids, config.num_similar)
    write_popular(job.out / "popular.parquet", train, item_ids, config.k)
    write_index(job.out / "ann.faiss", items)
    titles = load_ids(source, "items", TITLE)
    pq.write_table(pa.table({ITEM_ID: item_column, TITLE: titles}), job.out / "items.parquet")
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
