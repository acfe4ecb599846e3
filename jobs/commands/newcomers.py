"""Recommend to a user without a row of their own: by a history given at the call, from the files of the export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from crane_core.errors import ArtifactError, ConfigError
from crane_core.model.fold_in import FOLD_IN, ROWS, FoldIn
from crane_core.schema import ITEM_ID
from crane_core.serving.histories import read_histories
from crane_core.storage.tensors import load_arrays
from jobs.commands.query import Served


def recommend_by_history(served: Served, items: Sequence[str], times: Sequence[str] | None, k: int) -> dict[str, Any]:
    """Return the best k items for somebody who met some items, and the most popular ones if all of them are unknown.

    Args:
        served: the champion and its export.
        items: ids of the items.
        times: ISO 8601, one for each item; None where they are not known.
        k: list length; a list of popular items has at most as many as were exported.

    Raises:
        ArtifactError: the export is of a version without fold-in.
        ConfigError: k is below 1.
        DataError: the times are no instants, or not as many as the items.
    """
    if k < 1:
        raise ConfigError(f"-k is {k}.", "Give -k 1 or more, for example -k 10.")
    arrays = load_arrays(served.export.file("embeddings.safetensors"))
    if ROWS not in arrays:
        raise ArtifactError(
            f"The export of version {served.version} (run {served.run_id}) cannot make a list of a history.",
            "Run the window again with this version (crane run), then crane promote --run RUN.",
        )
    fold_in = FoldIn.of(arrays, json.loads(served.export.file(FOLD_IN).read_text()))
    ids = pq.read_table(served.export.file("items.parquet"), columns=[ITEM_ID])[ITEM_ID].to_pandas()
    index = pd.Index(ids, dtype=object)
    histories = read_histories([list(items)], None if times is None else [list(times)], index, fold_in)
    is_folded = bool(histories.has_items()[0])
    titles = served.titles()
    if is_folded:
        scores = arrays["item_embeddings"] @ fold_in.fold(histories.history, 1)[0]
        scores[histories.history.items] = -np.inf
        order = np.argsort(-scores, kind="stable")[:k]
        order = order[scores[order] > -np.inf].tolist()
        found = [(ids[row], float(scores[row])) for row in order]
    else:
        popular = pq.read_table(served.export.file("popular.parquet")).sort_by("rank").to_pylist()[:k]
        found = [(row[ITEM_ID], row["score"]) for row in popular]
    return {
        "history": [{ITEM_ID: item, "title": titles.get(item)} for item in items],
        "unknown_items": [item for item in dict.fromkeys(items) if item not in index],
        "fallback": not is_folded,
        "model_version": served.version,
        "run": served.run_id,
        "items": [
            {"rank": rank, ITEM_ID: item, "score": score, "title": titles.get(item)}
            for rank, (item, score) in enumerate(found, start=1)
        ],
    }
