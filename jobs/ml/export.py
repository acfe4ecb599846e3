"""Write the champion's recommendations: `python -m jobs.ml.export --store URI --run RUN_ID`.

The champion is looked up once and exported from the run of its shipped model: the refit run, if there is one. An item
is unseen if that run's training holds no event of the user with it; a refit run's holds all before `window.end`. Lists
obey `export.rules` of that run at its `window.end` (crane_core/README.md, "What may be shown"); `rules` in the manifest
has them, with counts of what each one left out. The artifact is the contract with serving systems:

    recommendations/*.parquet   user_id, rank (from 1), item_id, score, because_item_id; at most `export.k` items per
                                user, unseen but for `repeat_categories`; less where fewer are left (`num_short_lists`).
                                Because: the item of the user's history that adds most to the score, by the sums below;
                                null where popularity alone would have put the item into the list
    similar/*.parquet           item_id, rank, similar_item_id, similarity (cosine); similar items that can be had
    popular.parquet             rank, item_id, score (popularity at `window.end`): for users without recommendations
    eligibility.parquet         item_id, from, until: when each item may be shown, instants in UTC; null from: always
                                begun, null until: never ended; `until` itself is out. An item without a row is out of
                                stock. It is what the catalog says, whether or not the rules obey it
    embeddings.safetensors      user_embeddings f32 [num_users, d], item_embeddings f32 [num_items, d];
                                score = dot product, and the logarithm of the item's boosts added;
                                history_rows f32 [num_items, d], history_constant f32 [d]
    history.json                weight, end, blocks (columns, half_life, power): how a history becomes a user's row
    content.safetensors, content.json  how the vectors of a new item become its row, see below
    users.parquet, items.parquet  external ids (and titles, and the columns of the catalog); row number = row of the
                                embeddings
    ann.faiss                   inner product over the item embeddings; id in the index = row of items.parquet

A user without a row, or one who has met more since, gets a row by the fold-in: one gather and one sum. Of every event j
of the history whose item is in `items.parquet`, an item counting once, by its latest event, take the days `age_j` since
it, counted from `end` or from the user's latest event if that is later, and 0 where there are no times. In each block,
with the half-life of the block,

    v_j = weight * 0.5 ** (age_j / half_life)         or weight, where half_life is null
    row[columns] = history_constant[columns] + sum_j v_j history_rows[item_j, columns] / (sum_j v_j) ** power

The scores are the dot products of the row with `item_embeddings`; items of the history are left out, and what
`eligibility.parquet` says cannot be had. Embeddings and index hold all items. A history without
a known item gets `popular.parquet`. An export of a model of an earlier version has no `history.json`.

An item that came after the run can be ranked at once, by a row from its vectors:
`crane_core.model.content_rows.load_content_rows(folder).rows({"text": vectors})`. Each modality is standardised by its
`kind` and `NAME.mean` and `NAME.scale`, projected by `NAME.centre` and `NAME.axes` where there are any, then centred by
`NAME.whitening_mean` and divided by `NAME.whitening_scale`; a missing one is 0. Side by side they are multiplied by
`whitening_axes` and divided by their length; the row is `white @ matrix + shift + constant`, or `constant` where every
modality is missing.

Names, types and meanings do not change; additions get new names. Without a champion nothing is exported, and the run
record says so.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.release.champion_lock import lock_champion
from crane_core.stages import STAGES, WHOLE
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import recorded_run, run_job
from jobs.runner import Job, Result, produce
from jobs.usage import Usage

logger = logging.getLogger(__name__)


def export(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Find the champion and its run, and make or find the artifact."""
    usage = Usage()
    # Under the lock no other process can be between moving the alias and testing the model through it.
    with lock_champion(config.runtime, store, f"export run={arguments.run}") as lock:
        champion = lock.champion
        version = lock.registry.version(champion) if champion else None
    if version is None:
        logger.info("skipped reason=no_champion")
        return {"status": "skipped", "reason": "There is no champion.", "version": None}
    run_id, shipped_run = version.run_id, version.shipped_run
    own = recorded_run(store, shipped_run, config.runtime)
    entry = usage.entry() | produce(STAGES["ml.export"], shipped_run, WHOLE, own, store, run)
    entry |= {"version": champion, "champion_run": run_id, "shipped_run": shipped_run}
    # What `ml.live` of a later run looks for.
    entry |= {"model": lock.registry.name, "window_end": own.window.end.isoformat()}
    if run_id != arguments.run:
        store.record(run_id, "ml.export", entry)
    return entry


def run(job: Job) -> Result:
    """Write the artifact of `job.run_id`, the champion's run; torch is imported only here."""
    from jobs.ml.stages import export as work

    return work.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.export", export, argv)


if __name__ == "__main__":
    raise SystemExit(main())
