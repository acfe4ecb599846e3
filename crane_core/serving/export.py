"""Write the champion's recommendations as files with external ids, in bounded memory."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crane_core.config import Export
from crane_core.evaluation.ranking import SCORE_BYTES, dot_product, groups_of, rank_blocks
from crane_core.evaluation.rules import ItemRules, eligibility
from crane_core.graph.candidates import CPU, SearchResources
from crane_core.graph.exact import search
from crane_core.graph.faiss_search import write_index
from crane_core.model.fold_in import FOLD_IN
from crane_core.progress import track
from crane_core.schema import BECAUSE, ITEM_ID, USER_ID
from crane_core.serving.model_folder import Recommender
from crane_core.serving.reasons import Reasons

logger = logging.getLogger(__name__)

RECOMMENDATIONS = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field(BECAUSE, pa.string()),
    ]
)
SIMILAR = pa.schema(
    [
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("similar_item_id", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
    ]
)


def write_export(folder: Path, recommender: Recommender, config: Export, device: torch.device) -> dict[str, Any]:
    """Write everything that is exported of a recommender into an empty folder.

    Returns:
        Counts of users, items, recommendations and similar items; and what the rules left out, where there are any.
    """
    for name in ("recommendations", "similar"):
        (folder / name).mkdir()
    recommendations, similar = (folder / name / "part-0.parquet" for name in ("recommendations", "similar"))
    lists = write_recommendations(recommendations, recommender, config.k, device=device)
    num_similar = write_similar(similar, recommender, config.num_similar, device=device)
    write_popular(folder / "popular.parquet", recommender, config.k)
    write_index(folder / "ann.faiss", recommender.item_embeddings)
    recommender.write_ids(folder)
    if recommender.columns is not None:
        pq.write_table(eligibility(recommender.columns), folder / "eligibility.parquet")
    recommender.save_embeddings(folder / "embeddings.safetensors")
    if recommender.fold_in is not None:
        (folder / FOLD_IN).write_text(json.dumps(recommender.fold_in.facts(), indent=1))
    return {
        "num_users": len(recommender.user_ids),
        "num_items": len(recommender.item_ids),
        "num_recommendations": lists.num_rows,
        "num_short_lists": lists.num_short,
        "num_similar": num_similar,
        **({"rules": _told(recommender.rules, lists)} if recommender.rules else {}),
    }


def _told(rules: ItemRules, lists: Written) -> dict[str, Any]:
    return rules.facts | {"counts": rules.facts["counts"] | lists.by_rule}


@dataclass(frozen=True)
class Written:
    """Counts of written lists.

    Attributes:
        num_rows: recommendations.
        num_short: users with fewer than k of them.
        by_rule: what was left out of the lists: `had`, pairs of a user and an item that the user has; and
            `max_per_category`, items that would be in a list but for those of their category before them.
    """

    num_rows: int
    num_short: int
    by_rule: dict[str, int]


def write_recommendations(
    path: Path, recommender: Recommender, k: int, *, score_bytes: int = SCORE_BYTES, device: torch.device = CPU
) -> Written:
    """Write the best items of every user that may be shown, sorted by user id and rank.

    Args:
        path: Parquet file, schema `RECOMMENDATIONS`.
        recommender: users, items, and the training items that a user is not shown.
        k: items per user; users for whom fewer are left get fewer.
        score_bytes: bound of the score matrix in memory.
        device: where users are ranked.
    """
    user_ids, item_ids = recommender.user_ids.to_numpy(), recommender.item_ids.to_numpy()
    block = max(1, score_bytes // (4 * len(item_ids)))
    order = np.argsort(user_ids)
    num_rows, num_short = 0, 0
    rules = recommender.shown
    had, groups = rules.had(recommender.seen), groups_of(rules, device)
    with pq.ParquetWriter(path, RECOMMENDATIONS) as writer:
        sides = (recommender.user_embeddings, recommender.item_embeddings)
        added = None if rules.added is None else torch.from_numpy(rules.added).to(device)
        of_users, of_items = (torch.from_numpy(rows).to(device) for rows in sides)
        score = dot_product(of_users, of_items, added)
        reasons = _reasons(recommender, device)
        for users, values, indices in rank_blocks(score, had, order, k, block, groups):
            scores, items = values.numpy(), indices.numpy()
            rerank = np.lexsort((items, -scores), axis=1)
            scores, items = np.take_along_axis(scores, rerank, 1), np.take_along_axis(items, rerank, 1)
            keep = scores > -np.inf
            rank = np.broadcast_to(np.arange(1, scores.shape[1] + 1, dtype=np.int32), scores.shape)
            because = np.full(items.shape, -1) if reasons is None else reasons.of(users, items)
            columns = [np.repeat(user_ids[users], keep.sum(1)), rank[keep], item_ids[items[keep]], scores[keep]]
            columns.append(np.where(because[keep] >= 0, item_ids[because[keep]], None))
            writer.write_table(_table(columns, RECOMMENDATIONS))
            num_rows += int(keep.sum())
            num_short += int((keep.sum(1) < k).sum())
    left_out = {"had": len(had.items), "max_per_category": groups.num_left_out if groups else 0}
    return Written(num_rows, num_short, left_out)


def _reasons(recommender: Recommender, device: torch.device) -> Reasons | None:
    """Return what finds reasons; None for a model that does not tell them."""
    if recommender.fold_in is None or recommender.history is None:
        return None
    items, seen = recommender.item_embeddings, recommender.seen
    return Reasons(recommender.fold_in, items, seen, recommender.history, device, recommender.shown)


def write_similar(
    path: Path, recommender: Recommender, num_similar: int, *, block: int = 16384, device: torch.device = CPU
) -> int:
    """Write the items that are most like every item and may be shown, itself excluded, sorted by item id and rank.

    Args:
        path: Parquet file, schema `SIMILAR`.
        recommender: the items.
        num_similar: neighbours per item.
        block: items at a time.
        device: where they are compared.

    Returns:
        The number of rows.
    """
    item_ids = recommender.item_ids.to_numpy()
    order = np.argsort(item_ids)
    likeness = recommender.item_embeddings if recommender.likeness is None else recommender.likeness
    ids, rows = item_ids[order], likeness[order]
    is_shown = recommender.shown.factors[order] > 0
    keys = None if is_shown.all() else np.flatnonzero(is_shown)
    starts = range(0, len(rows), block)
    num_rows = 0
    with pq.ParquetWriter(path, SIMILAR) as writer:
        for start in track(starts, len(starts), "similar", logger):
            stop = min(start + block, len(rows))
            resources = SearchResources(device)
            neighbours, similarities = search(rows, range(start, stop), num_similar, keys=keys, resources=resources)
            count, width = neighbours.shape
            ranks = np.tile(np.arange(1, width + 1, dtype=np.int32), count)
            columns = [np.repeat(ids[start:stop], width), ranks, ids[neighbours.ravel()], similarities.ravel()]
            writer.write_table(_table(columns, SIMILAR))
            num_rows += neighbours.size
    return num_rows


def write_popular(path: Path, recommender: Recommender, k: int) -> None:
    """Write the k items that are most popular now and may be shown, for users without recommendations of their own."""
    item_ids, rules = recommender.item_ids.to_numpy(), recommender.shown
    counts = recommender.popularity * rules.factors
    order = np.argsort(-counts, kind="stable")
    top = np.array(rules.first(order[rules.factors[order] > 0].tolist(), k), dtype=np.int64)
    ranks = np.arange(1, len(top) + 1, dtype=np.int32)
    pq.write_table(pa.table({"rank": ranks, ITEM_ID: item_ids[top], "score": counts[top].astype(np.float32)}), path)


def _table(columns: list[np.ndarray], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
