"""Write the champion's recommendations as files with external ids, in bounded memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crane_core.config import Export
from crane_core.evaluation.ranking import SCORE_BYTES, dot_product, rank_blocks
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


def write_export(folder: Path, recommender: Recommender, config: Export, device: torch.device) -> dict[str, int]:
    """Write everything that is exported of a recommender into an empty folder.

    Returns:
        Counts of users, items, recommendations and similar items.
    """
    for name in ("recommendations", "similar"):
        (folder / name).mkdir()
    recommendations, similar = (folder / name / "part-0.parquet" for name in ("recommendations", "similar"))
    num_recommendations = write_recommendations(recommendations, recommender, config.k, device=device)
    num_similar = write_similar(similar, recommender, config.num_similar, device=device)
    write_popular(folder / "popular.parquet", recommender, config.k)
    write_index(folder / "ann.faiss", recommender.item_embeddings)
    recommender.write_ids(folder)
    recommender.save_embeddings(folder / "embeddings.safetensors")
    if recommender.fold_in is not None:
        (folder / FOLD_IN).write_text(json.dumps(recommender.fold_in.facts(), indent=1))
    return {
        "num_users": len(recommender.user_ids),
        "num_items": len(recommender.item_ids),
        "num_recommendations": num_recommendations,
        "num_similar": num_similar,
    }


def write_recommendations(
    path: Path, recommender: Recommender, k: int, *, score_bytes: int = SCORE_BYTES, device: torch.device = CPU
) -> int:
    """Write the best unseen items of every user, sorted by user id and rank.

    Args:
        path: Parquet file, schema `RECOMMENDATIONS`.
        recommender: users, items, and the training items that a user is not shown.
        k: items per user; users who have seen almost everything get fewer.
        score_bytes: bound of the score matrix in memory.
        device: where users are ranked.

    Returns:
        The number of rows.
    """
    user_ids, item_ids = recommender.user_ids.to_numpy(), recommender.item_ids.to_numpy()
    block = max(1, score_bytes // (4 * len(item_ids)))
    order = np.argsort(user_ids)
    num_rows = 0
    with pq.ParquetWriter(path, RECOMMENDATIONS) as writer:
        sides = (recommender.user_embeddings, recommender.item_embeddings)
        score = dot_product(*(torch.from_numpy(rows).to(device) for rows in sides))
        reasons = _reasons(recommender, device)
        for users, values, indices in rank_blocks(score, recommender.seen, order, k, block):
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
    return num_rows


def _reasons(recommender: Recommender, device: torch.device) -> Reasons | None:
    """Return what finds reasons; None for a model that does not tell them."""
    if recommender.fold_in is None or recommender.history is None:
        return None
    items, seen = recommender.item_embeddings, recommender.seen
    return Reasons(recommender.fold_in, items, seen, recommender.history, device)


def write_similar(
    path: Path, recommender: Recommender, num_similar: int, *, block: int = 16384, device: torch.device = CPU
) -> int:
    """Write the items that are most like every item, itself excluded, sorted by item id and rank.

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
    starts = range(0, len(rows), block)
    num_rows = 0
    with pq.ParquetWriter(path, SIMILAR) as writer:
        for start in track(starts, len(starts), "similar", logger):
            stop = min(start + block, len(rows))
            neighbours, similarities = search(rows, range(start, stop), num_similar, resources=SearchResources(device))
            count, width = neighbours.shape
            ranks = np.tile(np.arange(1, width + 1, dtype=np.int32), count)
            columns = [np.repeat(ids[start:stop], width), ranks, ids[neighbours.ravel()], similarities.ravel()]
            writer.write_table(_table(columns, SIMILAR))
            num_rows += neighbours.size
    return num_rows


def write_popular(path: Path, recommender: Recommender, k: int) -> None:
    """Write the k items that are most popular now, for users without recommendations of their own."""
    item_ids, counts = recommender.item_ids.to_numpy(), recommender.popularity
    top = np.lexsort((np.arange(len(counts)), -counts))[:k]
    ranks = np.arange(1, len(top) + 1, dtype=np.int32)
    pq.write_table(pa.table({"rank": ranks, ITEM_ID: item_ids[top], "score": counts[top].astype(np.float32)}), path)


def _table(columns: list[np.ndarray], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
