"""Small served models, written down by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from safetensors.numpy import save_file

from crane_core.dataset.interactions import ItemLists
from crane_core.model.fold_in import Block, FoldIn
from crane_core.serving.model_folder import Recommender, ServedModel, write_model

Rows = dict[str, list[float]]
USERS: Rows = {"ann": [1, 0], "bob": [0, 1], "cyd": [1, 1]}
ITEMS: Rows = {"a": [3, 0], "b": [2, 2], "c": [0, 3], "d": [1, 0]}
SEEN = {"ann": ["a"], "bob": ["b", "c"], "cyd": ["b"]}
END = datetime(2026, 3, 1, tzinfo=UTC)
"""End of the training interactions."""
HISTORY_ROWS: Rows = {"a": [1, 0], "b": [1, 1], "c": [0, 2], "d": [0, 0]}


def make_model(users: Rows, items: Rows, seen: dict[str, list[str]]) -> ServedModel:
    """Make a model in memory from rows by external id and training items by user."""
    return ServedModel(
        pd.Index(list(users), dtype=object),
        pd.Index(list(items), dtype=object),
        np.array(list(users.values()), dtype=np.float32),
        np.array(list(items.values()), dtype=np.float32),
        _lists(users, items, seen),
        popularity(users, items, seen),
        {},
    )


def recommender(users: Rows = USERS, items: Rows = ITEMS, seen: dict[str, list[str]] = SEEN) -> Recommender:
    """Make a recommender with titles for all items but the last."""
    return Recommender(
        pa.chunked_array([list(users)]),
        pa.chunked_array([list(items)]),
        pa.chunked_array([[*(f"Title of {item}" for item in list(items)[:-1]), None]], pa.string()),
        np.array(list(users.values()), dtype=np.float32),
        np.array(list(items.values()), dtype=np.float32),
        _lists(users, items, seen),
        popularity(users, items, seen),
        fold_in(items),
    )


def fold_in(items: Rows = ITEMS) -> FoldIn:
    """Make a fold-in: the first coordinate halves in two days, the others are means and begin at 1."""
    width = len(next(iter(items.values())))
    rows = np.array([HISTORY_ROWS.get(item, [0.0] * width)[:width] for item in items], dtype=np.float32)
    blocks = (Block(1, 2.0), Block(width - 1, None, 1.0))
    return FoldIn(rows, np.float32([0, *[1] * (width - 1)]), blocks, 2.0, END)


def popularity(users: Rows, items: Rows, seen: dict[str, list[str]]) -> np.ndarray:
    """Count the training interactions of each item: float32 [num_items]."""
    return np.bincount(_lists(users, items, seen).items, minlength=len(items)).astype(np.float32)


def write(folder: Path, users: Rows = USERS, items: Rows = ITEMS, seen: dict[str, list[str]] = SEEN) -> Path:
    """Write a model folder."""
    source = folder.parent / f"{folder.name}-source"
    source.mkdir(parents=True)
    folder.mkdir()
    save_file({"scale": np.float32([1.0])}, source / "weights.safetensors")
    write_model(folder, recommender(users, items, seen), source / "weights.safetensors", {"run": "run-1"})
    return folder


def _lists(users: Rows, items: Rows, seen: dict[str, list[str]]) -> ItemLists:
    names, columns = list(users), list(items)
    pairs = [(names.index(user), columns.index(item)) for user, rows in seen.items() for item in rows]
    left, right = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    return ItemLists.from_pairs(left, right, len(names))
